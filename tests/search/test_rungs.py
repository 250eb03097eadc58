from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.search.pareto import fronts
from nas.search.results import Metric
from nas.search.rungs import (
    MARGIN,
    MIN_FINISHED,
    Standing,
    Standings,
    certain_losers,
    is_tied,
    last_rung,
    paired_difference,
    project,
    projected_spread,
    promotable,
    steepness,
)
from nas.spec import RungSpec

SPEC = RungSpec(num_trained=3, keep_untrained=0.75, keep=0.34)


def kl(*documents: float) -> Metric:
    return Metric.from_documents(documents, higher_is_better=False)


def exact(trial: int, value: float, *, depth: int = 4, forced: bool = False) -> Standing:
    """A standing without noise: every block has the same KL, so only equal values tie."""
    return Standing(trial=trial, depth=depth, kl=kl(value, value), forced=forced)


@st.composite
def standings(draw: st.DrawFn, *, noisy: bool = True) -> list[Standing]:
    blocks = 5 if noisy else 1
    value = st.floats(0.01, 5.0).map(lambda number: round(number, 3))
    return [
        Standing(
            trial=number,
            depth=draw(st.integers(3, 5)),
            kl=kl(*(draw(value) for _ in range(blocks))),
            forced=draw(st.integers(0, 4)) == 0,
        )
        for number in range(draw(st.integers(0, 14)))
    ]


specs = st.builds(
    RungSpec,
    keep_untrained=st.floats(0.05, 1.0),
    keep=st.floats(0.05, 1.0),
    keep_depth=st.floats(0.0, 1.0),
    max_tie_growth=st.floats(1.0, 4.0),
    seed_spread=st.sampled_from([0.0, 0.01, 0.1]),
)
properties = settings(max_examples=60, deadline=None)


@properties
@given(standings(), standings(), specs, st.integers(0, 2), st.booleans(), st.booleans(), st.randoms())
def test_results_that_came_and_went_leave_no_trace(field, gone, spec, rung, complete, has_costs, random):
    def costs(standing):
        return replace(standing, costs=(float(standing.depth),)) if has_costs else standing

    kept = Standings(rung)
    arrivals = [*(("add", costs(one)) for one in field), *(("try", costs(replace(one, trial=one.trial + 100))) for one in gone)]
    random.shuffle(arrivals)
    for what, standing in arrivals:
        kept.add(standing if what == "add" else replace(standing, kl=kl(*reversed(standing.kl.documents))))
    for what, standing in arrivals:
        if what == "try":
            kept.add(standing)
            assert kept.remove(standing.trial)
            assert not kept.remove(standing.trial)

    ordered = sorted(map(costs, field), key=lambda standing: (standing.kl.value, standing.trial))
    assert kept.promotable(spec=spec, complete=complete) == promotable(rung, ordered, spec=spec, complete=complete)
    assert [standing.trial for standing in ordered if standing.trial not in kept] == []


@properties
@given(standings(), specs, st.integers(0, 2), st.booleans(), st.randoms())
def test_the_order_of_arrival_does_not_matter(field, spec, rung, complete, random):
    shuffled = list(field)
    random.shuffle(shuffled)

    assert promotable(rung, shuffled, spec=spec, complete=complete) == promotable(rung, field, spec=spec, complete=complete)


@properties
@given(standings(), specs, st.integers(0, 2), st.booleans(), st.floats(0.0, 5.0), st.data())
def test_a_better_score_never_hurts(field, spec, rung, complete, gain, data):
    promoted = promotable(rung, field, spec=spec, complete=complete)
    if not promoted:
        return
    lucky = data.draw(st.sampled_from(promoted))
    # Better by the same on every block: the noise of its differences stays what it was.
    improved = [replace(standing, kl=kl(*(value - gain for value in standing.kl.documents))) if standing.trial == lucky else standing for standing in field]

    assert lucky in promotable(rung, improved, spec=spec, complete=complete)


@properties
@given(standings(), specs, st.integers(0, 2), st.booleans())
def test_forced_trials_always_go_on_and_take_no_place(field, spec, rung, complete):
    sampled = [standing for standing in field if not standing.forced]
    forced = {standing.trial for standing in field if standing.forced}

    promoted = set(promotable(rung, field, spec=spec, complete=complete))

    assert promoted == forced | set(promotable(rung, sampled, spec=spec, complete=complete))


@properties
@given(standings(), specs, st.integers(1, 2), st.booleans())
def test_ties_enlarge_a_trained_rung_at_most_by_the_growth(field, spec, rung, complete):
    sampled = [standing for standing in field if not standing.forced]
    share = spec.keep * len(sampled)
    num_best = max(1, math.ceil(share - 1e-9)) if complete else math.floor(share + 1e-9)

    promoted = promotable(rung, sampled, spec=spec, complete=complete)

    assert min(num_best, len(sampled)) <= len(promoted) <= max(num_best, num_best * spec.max_tie_growth + 1e-9)


@properties
@given(standings(), specs, st.integers(1, 2), st.booleans())
def test_nobody_goes_on_for_a_tie_past_a_better_one(field, spec, rung, complete):
    spec = replace(spec, keep_depth=0.0)
    sampled = sorted((standing for standing in field if not standing.forced), key=lambda standing: (standing.kl.value, standing.trial))

    promoted = promotable(rung, sampled, spec=spec, complete=complete)

    assert list(promoted) == [standing.trial for standing in sampled[: len(promoted)]]


@properties
@given(standings(), specs)
def test_each_depth_class_has_its_share_of_the_first_trained_rung_within_the_growth(field, spec):
    sampled = [standing for standing in field if not standing.forced]
    promoted = set(promotable(1, sampled, spec=spec, complete=True))
    num_best = max(1, math.ceil(spec.keep * len(sampled) - 1e-9))
    room = math.floor(spec.max_tie_growth * num_best + 1e-9)
    owed = {}
    for depth in {standing.depth for standing in sampled}:
        members = sorted((standing for standing in sampled if standing.depth == depth), key=lambda standing: (standing.kl.value, standing.trial))
        owed |= {standing.trial: standing for standing in members[: math.ceil(spec.keep * spec.keep_depth * len(members) - 1e-9)]}

    assert owed.keys() <= promoted or len(promoted) == room


def test_a_depth_class_that_is_worse_throughout_still_has_its_best_in_the_second_trained_rung():
    shallow = [exact(number, 9.0 + number, depth=3) for number in range(6)]
    deep = [exact(number, 1.0 + number / 100, depth=5) for number in range(6, 18)]
    spec = RungSpec(keep=0.34, keep_depth=0.5, seed_spread=0.0)

    assert set(promotable(1, shallow + deep, spec=spec, complete=True)) == {6, 7, 8, 9, 10, 11, 12, 0, 1}
    assert not {0, 1} & set(promotable(1, shallow + deep, spec=replace(spec, keep_depth=0.0), complete=True))
    assert not {0, 1} & set(promotable(2, shallow + deep, spec=spec, complete=True))


@properties
@given(st.lists(st.integers(1, 400), min_size=2, max_size=14), st.sampled_from([0.0, 0.01, 0.05]))
def test_a_larger_spread_between_seeds_only_adds(values, spread):
    field = [exact(number, value / 100) for number, value in enumerate(values)]
    spec = RungSpec(keep=0.34, seed_spread=spread)

    assert set(promotable(1, field, spec=spec, complete=True)) <= set(promotable(1, field, spec=spec, complete=True, seed_spread=2 * spread + 0.01))


def test_results_that_another_seed_could_swap_are_tied():
    # Blocks that agree exactly: only the seeds are uncertain, 1 % each, so the difference is within 1.96 x sqrt(2) %.
    assert is_tied(kl(1.02, 1.02), kl(1.0, 1.0), seed_spread=0.01)
    assert not is_tied(kl(1.03, 1.03), kl(1.0, 1.0), seed_spread=0.01)
    assert not is_tied(kl(1.02, 1.02), kl(1.0, 1.0), seed_spread=0.0)


@properties
@given(st.lists(st.lists(st.floats(0.01, 5.0), min_size=4, max_size=4), min_size=2, max_size=2), st.floats(0.0, 0.2))
def test_the_quick_test_never_separates_what_the_blocks_do_not(documents, spread):
    better, worse = sorted((kl(*values) for values in documents), key=lambda metric: metric.value)
    difference = paired_difference(worse, better)
    width = 1.96 * math.hypot(difference.standard_error, spread * math.hypot(worse.value, better.value))

    assert is_tied(worse, better, seed_spread=spread) == (difference.value <= width)


@st.composite
def costly(draw: st.DrawFn) -> list[Standing]:
    number = st.integers(1, 6)
    return [
        Standing(trial=trial, depth=4, kl=kl(draw(number) / 2, draw(number) / 2), forced=False, costs=(float(draw(number)), float(draw(number))))
        for trial in range(draw(st.integers(1, 12)))
    ]


@properties
@given(costly(), specs, st.booleans(), st.randoms())
def test_with_several_objectives_whole_fronts_go_first_whatever_the_order(field, spec, complete, random):
    field = [replace(standing, trial=number) for number, standing in enumerate(field)]
    front = dict(zip((standing.trial for standing in field), fronts([(standing.kl.value, *standing.costs) for standing in field]), strict=True))
    share = spec.keep * len(field)
    num_best = max(1, math.ceil(share - 1e-9)) if complete else math.floor(share + 1e-9)
    shuffled = list(field)
    random.shuffle(shuffled)

    promoted = promotable(2, field, spec=spec, complete=complete)

    assert promoted == promotable(2, shuffled, spec=spec, complete=complete)
    assert num_best <= len(promoted) <= num_best * spec.max_tie_growth + 1e-9 or not promoted
    for better in (index for index in front if index not in promoted):
        # Whoever stays behind is on no better front than the best share ends with.
        assert front[better] >= sorted(front.values())[max(num_best - 1, 0)]


def test_a_cheaper_student_goes_on_beside_a_better_one():
    field = [
        Standing(trial=0, depth=4, kl=kl(1.0, 1.0), forced=False, costs=(9.0,)),
        Standing(trial=1, depth=4, kl=kl(2.0, 2.0), forced=False, costs=(5.0,)),
        Standing(trial=2, depth=4, kl=kl(2.5, 2.5), forced=False, costs=(6.0,)),
    ]
    spec = RungSpec(keep=0.6, max_tie_growth=1.0)

    assert promotable(2, field, spec=spec, complete=True) == (0, 1)
    assert promotable(
        2, [replace(standing, costs=()) for standing in field], spec=RungSpec(keep=0.34, max_tie_growth=1.0, seed_spread=0.0), complete=False
    ) == (0,)


@properties
@given(standings(), specs, st.integers(1, 2))
def test_a_complete_rung_promotes_at_least_what_synchronous_halving_would(field, spec, rung):
    sampled = sorted((standing for standing in field if not standing.forced), key=lambda standing: (standing.kl.value, standing.trial))
    synchronous = {standing.trial for standing in sampled[: math.floor(spec.keep * len(sampled))]}

    assert synchronous <= set(promotable(rung, field, spec=spec, complete=True))


@properties
@given(standings(), specs, st.integers(0, 2), st.booleans())
def test_the_promoted_come_best_first(field, spec, rung, complete):
    value = {standing.trial: standing.kl.value for standing in field}
    promoted = [value[trial] for trial in promotable(rung, field, spec=spec, complete=complete)]

    assert promoted == sorted(promoted)


@properties
@given(standings(), specs, st.booleans())
def test_every_depth_class_keeps_its_share_of_the_untrained_rung(field, spec, complete):
    promoted = set(promotable(0, field, spec=spec, complete=complete))

    for depth in {standing.depth for standing in field}:
        members = {standing.trial for standing in field if standing.depth == depth and not standing.forced}
        assert len(promoted & members) == math.ceil(spec.keep_untrained * len(members) - 1e-9)


def test_a_depth_class_that_is_worse_throughout_still_goes_on_untrained():
    shallow = [exact(number, 9.0 + number, depth=3) for number in range(4)]
    deep = [exact(number, 1.0 + number, depth=5) for number in range(4, 8)]

    assert promotable(0, shallow + deep, spec=RungSpec(keep_untrained=0.5), complete=True) == (4, 5, 0, 1)


def test_a_trained_rung_waits_until_its_share_is_a_whole_trial():
    field = [exact(0, 1.0), exact(1, 2.0)]

    assert promotable(1, field, spec=SPEC, complete=False) == ()
    assert promotable(1, [*field, exact(2, 3.0)], spec=SPEC, complete=False) == (0,)


def test_the_only_trial_of_a_complete_rung_goes_on():
    assert promotable(1, [exact(7, 3.0)], spec=SPEC, complete=True) == (7,)


def test_whoever_is_tied_with_the_last_one_goes_on_and_a_clear_loser_does_not():
    best = Standing(trial=0, depth=4, kl=kl(1.0, 2.0, 3.0, 4.0), forced=False)
    tied = Standing(trial=1, depth=4, kl=kl(1.3, 1.8, 3.4, 3.9), forced=False)
    # Clearly worse on every block, although its mean lies well inside the spread between blocks.
    loser = Standing(trial=2, depth=4, kl=kl(1.5, 2.5, 3.5, 4.5), forced=False)

    assert promotable(1, [best, tied, loser], spec=RungSpec(keep=0.3, max_tie_growth=3.0), complete=True) == (0, 1)


def test_without_growth_ties_stay_behind():
    assert promotable(1, [exact(0, 1.0), exact(1, 1.0), exact(2, 1.0)], spec=RungSpec(keep=0.34, max_tie_growth=1.0), complete=False) == (0,)


def test_nobody_goes_on_from_the_last_rung():
    assert last_rung(SPEC) == 3
    assert promotable(3, [exact(0, 1.0, forced=True)], spec=SPEC, complete=True) == ()


def test_a_share_that_is_whole_is_not_rounded_up():
    assert len(promotable(1, [exact(number, float(number)) for number in range(100)], spec=RungSpec(keep=0.07), complete=True)) == 7


def test_results_over_different_documents_are_not_compared():
    with pytest.raises(ValueError, match="expected the same ones on both sides, got 2 and 3"):
        paired_difference(kl(1.0, 2.0), kl(1.0, 2.0, 3.0))


projections = st.builds(RungSpec, projection=st.floats(0.0, 2.0), factor=st.integers(2, 16))
blocks = st.lists(st.floats(0.1, 5.0), min_size=4, max_size=4)


@properties
@given(projections, st.floats(0.05, 3.0), st.floats(0.0, 1.0), st.integers(2, 4))
def test_a_student_that_learns_along_a_straight_line_is_projected_onto_it(spec, level, slope, rung):
    at = [kl(*(level * spec.factor ** (-slope * number) * np.array([0.5, 1.5]))) for number in (rung - 1, rung)]

    expected = at[1].value * 10 ** (-slope * spec.projection)
    assert project(at[1], below=at[0], rung=rung, spec=spec).value == pytest.approx(expected)


@properties
@given(projections, blocks, blocks, st.integers(1, 3))
def test_a_projection_is_the_mean_of_its_documents(spec, here, below, rung):
    found = project(kl(*here), below=kl(*below), rung=rung, spec=spec)

    assert np.mean(found.documents) == pytest.approx(found.value, rel=1e-6)


@properties
@given(projections, blocks, blocks, st.floats(0.5, 0.99), st.integers(1, 3))
def test_a_better_result_at_a_rung_is_a_better_projection(spec, here, below, factor, rung):
    better = project(kl(*(factor * value for value in here)), below=kl(*below), rung=rung, spec=spec)

    assert better.value < project(kl(*here), below=kl(*below), rung=rung, spec=spec).value


def test_the_error_of_a_projection_is_that_of_resampled_blocks():
    generator, spec = np.random.default_rng(0), RungSpec(projection=0.5, factor=4)
    below = generator.uniform(0.5, 1.5, size=400)
    here = below * generator.uniform(0.4, 0.6, size=400)
    found = project(kl(*here), below=kl(*below), rung=2, spec=spec)

    drawn = [project(kl(*here[index]), below=kl(*below[index]), rung=2, spec=spec).value for index in (generator.integers(400, size=400) for _ in range(300))]
    assert np.std(drawn) == pytest.approx(found.standard_error, rel=0.15)


def test_without_projection_a_rung_is_compared_by_its_kl():
    spec = RungSpec(projection=0.0)
    assert project(kl(1.0, 2.0), below=kl(3.0, 4.0), rung=2, spec=spec) == kl(1.0, 2.0)
    assert projected_spread(0.01, rung=2, spec=spec) == 0.01


def test_a_projection_spreads_over_seeds_by_both_of_its_rungs():
    spec = RungSpec(projection=0.5, factor=4)
    steep = steepness(2, spec=spec)
    generator = np.random.default_rng(0)
    noise = np.exp(0.01 * generator.standard_normal((2, 2000)))
    drawn = [project(kl(here, here), below=kl(2 * below, 2 * below), rung=2, spec=spec).value for here, below in noise.T]
    assert np.std(drawn) / np.mean(drawn) == pytest.approx(projected_spread(0.01, rung=2, spec=spec), rel=0.1)
    assert steep > steepness(1, spec=spec), "an untrained student's KL says less of its slope"


kls = st.floats(0.01, 5.0)
pairs = st.lists(st.tuples(kls, kls), min_size=MIN_FINISHED, max_size=8)


@properties
@given(st.dictionaries(st.integers(0, 20), kls, max_size=8), pairs, st.data())
def test_nobody_who_could_end_lowest_is_a_certain_loser(candidates, finished, data):
    """Under the stated assumption: a fall of at most the largest seen, and MARGIN."""
    losers = certain_losers(candidates, finished=finished)

    for number, value in candidates.items():
        fall = data.draw(st.floats(min(above / below for below, above in finished) * (1 - MARGIN), 1e4))
        if value * fall < min(above for _, above in finished) * (1 - 1e-9):
            assert number not in losers


@properties
@given(st.dictionaries(st.integers(0, 20), kls, min_size=1, max_size=8), pairs, st.floats(0.0, 1.0))
def test_a_lower_kl_makes_nobody_a_certain_loser(candidates, finished, share):
    better = {number: value * share for number, value in candidates.items()}

    assert certain_losers(better, finished=finished) <= certain_losers(candidates, finished=finished)


def test_before_some_have_finished_nobody_is_certain_to_lose():
    finished = [(1.0, 0.6), (1.1, 0.65), (1.2, 0.8)]

    assert certain_losers({7: 1.05, 8: 9.0}, finished=finished) == {8}
    assert certain_losers({8: 9.0}, finished=finished[: MIN_FINISHED - 1]) == set()
