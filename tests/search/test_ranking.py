from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.errors import InvalidSpec
from nas.search.confirmed import Confirmation
from nas.search.leaderboard import Board, board_as_dict
from nas.search.objective import difference, make_scales, objective
from nas.search.ranking import CompletedTrial, rank
from nas.search.results import Metric, RungResult
from nas.search.seeds import pooled_spread
from nas.shape import Shape
from nas.spec import RungSpec, TaskSpec

SPEC = RungSpec(num_trained=2)
TASKS = (TaskSpec(name="ending", weight=3.0, insist=True), TaskSpec(name="bits", metric="bits_per_byte", weight=1.0))


def shape(depth: int) -> Shape:
    return Shape(num_hidden_layers=depth, hidden_size=48, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=8)


def result(*, ending: tuple[float, ...] = (), bits: tuple[float, ...] = (), kl: float = 1.0, rung: int = 2) -> RungResult:
    tasks = {}
    if rung:
        tasks = {
            "ending": Metric.from_documents(ending, higher_is_better=True),
            "bits": Metric.from_documents(bits, higher_is_better=False),
        }
    return RungResult(
        rung=rung,
        tokens=SPEC.tokens(rung),
        kl=Metric.from_documents((kl, kl + 0.1), higher_is_better=False),
        loss=Metric.from_documents((kl + 1, kl + 1.1), higher_is_better=False),
        tasks=tasks,
        parameters=1000,
        seconds={},
        details={},
    )


TEACHER = result(ending=(1.0, 1.0, 0.0, 1.0), bits=(1.0, 1.0, 1.2, 0.8), kl=0.0)
RANDOM = result(ending=(0.0, 1.0, 0.0, 0.0), bits=(3.0, 3.2, 2.8, 3.0), kl=5.0)
SCALES = make_scales(TASKS, teacher=TEACHER, random=RANDOM)


def trial(
    number: int, *, last: RungResult | None = None, kls: tuple[float, ...] = (3.0, 2.0), origin: str = "sampler", parameters: int = 1000
) -> CompletedTrial:
    """A trial with untrained and first-rung KLs `kls`; `last` takes it to the last rung."""
    flat = {"ending": (0.5, 0.5, 0.5, 0.5), "bits": (2.0, 2.0, 2.0, 2.0)}
    results = {rung: result(rung=rung, kl=kl, **flat) for rung, kl in enumerate(kls)}
    if last is not None:
        results[2] = last
    return CompletedTrial(number=number, origin=origin, shape=shape(3 + number % 3), parameters=parameters, state="completed", results=results)


def at_score(share: float, *, kl: float = 1.0, noise: float = 0.0) -> RungResult:
    """A last-rung result at `share` of the way from random weights to the teacher, on every document but for noise."""
    wobble = (noise, -noise, noise, -noise)
    return result(
        ending=tuple(0.25 + 0.5 * share + step for step in wobble),
        bits=(3.0 - 2.0 * share,) * 4,
        kl=kl,
    )


def board(*trials: CompletedTrial, **options: Any) -> Board:
    return rank(trials, scales=SCALES, teacher_parameters=2000, spec=SPEC, **options)


def numbers(found: Board) -> list[int]:
    return [row.number for row in found.rows]


shares = st.floats(0.0, 1.2).map(lambda number: round(number, 2))


@st.composite
def fields(draw: st.DrawFn) -> list[CompletedTrial]:
    trials = []
    for number in range(draw(st.integers(0, 10))):
        last = at_score(draw(shares), kl=draw(shares) + 0.1, noise=draw(st.sampled_from([0.0, 0.05, 0.3]))) if draw(st.booleans()) else None
        kls = tuple(draw(shares) + 0.1 for _ in range(2 if last else draw(st.integers(1, 2))))
        origin = draw(st.sampled_from(["sampler", "control", "user", "anchor:uniform"]))
        trials.append(trial(number, last=last, kls=kls, origin=origin, parameters=draw(st.integers(900, 910))))
    return trials


properties = settings(max_examples=60, deadline=None)


@properties
@given(fields(), st.randoms())
def test_rank_ignores_the_order_of_the_trials(field, random):
    shuffled = list(field)
    random.shuffle(shuffled)

    assert board(*shuffled) == board(*field)


@properties
@given(fields())
def test_every_trial_has_one_row_and_only_the_last_rung_has_ranks(field):
    found = board(*field)

    assert sorted(numbers(found)) == sorted(item.number for item in field)
    assert all((row.rank is not None) == (row.rung == 2) for row in found.rows)
    assert [row.rung for row in found.rows] == sorted((row.rung for row in found.rows), reverse=True)


@properties
@given(fields())
def test_a_rank_is_the_place_of_the_first_row_of_its_tie_group(field):
    ranked = [row for row in board(*field).rows if row.rank is not None]

    for place, row in enumerate(ranked, start=1):
        first = next(other for other in ranked if other.tie_group == row.tie_group)
        assert row.rank == ranked.index(first) + 1 <= place


@properties
@given(fields())
def test_a_row_is_told_apart_from_the_best_of_every_group_before_its_own_and_from_nobody_s_of_its_own(field):
    found = board(*field)
    results = {item.number: item.deepest for item in field}
    groups = defaultdict(list)
    for row in found.rows:
        if row.rank is not None:
            groups[row.tie_group].append(row)

    for place, members in groups.items():
        best = max(members, key=lambda row: (row.score, -row.number))
        for other_place, others in groups.items():
            for row in others if other_place >= place else []:
                gap = difference(results[best.number], results[row.number], scales=SCALES)
                assert gap.value >= -1e-12  # the best of those left, up to rounding
                assert (gap.value <= 1.96 * gap.standard_error) == (other_place == place)


def test_one_that_is_told_apart_from_the_best_hides_nobody_who_is_not():
    """Second by score, but below the best on every document; the third is worse and noisy, and may be the best."""
    found = board(trial(1, last=at_score(0.60)), trial(2, last=at_score(0.59)), trial(3, last=at_score(0.50, noise=0.3)))

    assert [(row.number, row.rank) for row in found.rows] == [(1, 1), (3, 1), (2, 3)]


@properties
@given(fields())
def test_a_control_never_leads_and_the_leader_is_the_best_other(field):
    found = board(*field)
    candidates = [row for row in found.rows if row.rank is not None and not row.is_control]

    assert found.leader == (candidates[0].number if candidates else None)
    assert found.winner is None
    assert {row.tie_group for row in candidates if row.number in found.finalists} == {row.tie_group for row in candidates[:1]}


@properties
@given(fields())
def test_the_interval_of_the_difference_to_the_best_score_holds_zero_in_the_first_tie_group_and_nowhere_else(field):
    for row in board(*field).rows:
        if row.rank is None:
            assert row.difference is None
        else:
            assert (row.difference.high >= 0.0) == (row.tie_group == 1)
            assert row.difference.low <= row.difference.value <= row.difference.high


def test_the_winner_is_named_by_the_held_out_documents_once_every_finalist_is_confirmed():
    field = [trial(1, last=at_score(0.6, kl=0.5)), trial(2, last=at_score(0.6, kl=0.6)), trial(3, last=at_score(0.6, kl=0.7)), trial(4, last=at_score(0.1))]
    held_out = {1: at_score(0.5, noise=0.01), 2: at_score(0.9, noise=0.01)}
    confirmations = {number: Confirmation(verified=True, reloaded=True, held_out=found) for number, found in held_out.items()}

    early = board(*field, num_finalists=2, confirmations={2: confirmations[2]})
    late = board(*field, num_finalists=2, confirmations=confirmations)

    assert (early.finalists, early.leader, early.winner) == ((1, 2), 1, None)
    assert (late.finalists, late.leader, late.winner) == ((1, 2), 2, 2)
    by_number = {row.number: row for row in late.rows}
    assert [by_number[number].verified for number in (1, 2, 3, 4)] == [True, True, None, None]
    assert by_number[2].probability_best > 0.99
    assert by_number[3].probability_best is None
    assert numbers(early) == numbers(late)


def test_a_control_that_was_only_counted_is_not_called_verified():
    counted = {1: Confirmation(verified=True, reloaded=False, held_out=None), 2: Confirmation(verified=False, reloaded=False, held_out=None)}
    found = board(trial(1, last=at_score(0.6), origin="control"), trial(2, last=at_score(0.5), origin="control"), confirmations=counted)

    assert [row.verified for row in found.rows] == [None, False]


@properties
@given(fields())
def test_the_pareto_front_dominates_every_other_ranked_trial(field):
    found = board(*field)
    ranked = {row.number: row for row in found.rows if row.rank is not None}
    front = [ranked[number] for number in found.pareto]

    assert [row.parameters for row in front] == sorted(row.parameters for row in front)
    for row in ranked.values():
        assert row in front or any(other.score >= row.score and other.parameters <= row.parameters for other in front)
    assert not any(a.score >= b.score and a.parameters < b.parameters for a in front for b in front)


def costing(found: CompletedTrial, **costs: float) -> CompletedTrial:
    """The same trial, with costs measured at rung 0."""
    return replace(found, results={**found.results, 0: replace(found.results[0], costs=costs)})


def test_the_front_is_over_the_score_and_the_costs_that_the_search_names():
    trials = [
        costing(trial(1, last=at_score(0.9), parameters=900), memory_bytes=9.0, **{"decode_ms:chat": 5.0}),
        costing(trial(2, last=at_score(0.5), parameters=500), memory_bytes=9.0, **{"decode_ms:chat": 2.0}),
        costing(trial(3, last=at_score(0.4), parameters=400), memory_bytes=5.0, **{"decode_ms:chat": 6.0}),
        costing(trial(4, last=at_score(0.3), parameters=300), memory_bytes=9.0, **{"decode_ms:chat": 3.0}),
    ]

    assert board(*trials).pareto == (4, 3, 2, 1)
    assert board(*trials, objectives=["memory_bytes"]).pareto == (3, 1)
    assert board(*trials, objectives=["decode_ms:chat"]).pareto == (2, 1)
    assert board(*trials, objectives=["memory_bytes", "decode_ms:chat"]).pareto == (3, 2, 1)
    assert board(*trials, objectives=["flops_per_token"]).pareto == (1,)


def test_a_shape_of_equal_cost_stays_on_the_front_until_it_is_told_apart():
    tied = board(trial(1, last=at_score(0.5, noise=0.3)), trial(2, last=at_score(0.45)))
    apart = board(trial(1, last=at_score(0.5)), trial(2, last=at_score(0.45)))
    dearer = board(trial(1, last=at_score(0.5, noise=0.3)), trial(2, last=at_score(0.45), parameters=1001))

    assert (tied.pareto, apart.pareto, dearer.pareto) == ((1, 2), (1,), (1,))


def test_a_row_shows_what_any_rung_measured_of_its_costs():
    (row,) = board(costing(trial(1, last=at_score(0.9), parameters=900), **{"prefill_ms:chat": 5.0})).rows

    assert row.costs == {"parameters": 900.0, "prefill_ms:chat": 5.0}


@properties
@given(fields())
def test_the_board_is_plain_json_without_documents(field):
    text = json.dumps(board_as_dict(board(*field)), allow_nan=False)

    assert "documents" not in text
    assert [row["number"] for row in json.loads(text)["rows"]] == numbers(board(*field))


def test_the_objective_is_zero_for_random_weights_and_one_for_the_teacher():
    assert objective(RANDOM, scales=SCALES).value == pytest.approx(0.0)
    assert objective(TEACHER, scales=SCALES).value == pytest.approx(1.0)


def test_the_objective_weighs_tasks_and_turns_those_where_lower_is_better():
    # Teacher's accuracy at weight 3, random bits at weight 1.
    mixed = result(ending=TEACHER.tasks["ending"].documents, bits=RANDOM.tasks["bits"].documents)

    assert objective(mixed, scales=SCALES).value == pytest.approx(0.75)


def test_the_error_of_the_objective_propagates_the_errors_of_the_tasks():
    ending, bits = TEACHER.tasks["ending"].standard_error, TEACHER.tasks["bits"].standard_error
    expected = math.hypot(0.75 * ending / 0.5, 0.25 * bits / 2.0)

    assert objective(TEACHER, scales=SCALES).standard_error == pytest.approx(expected)


def test_a_score_that_another_seed_could_swap_is_tied() -> None:
    """The score rises by .1 where the KL halves. Exact over documents, so that only the seeds, 5 % of KL, make ties."""
    field = [trial(number, last=at_score(0.9 - 0.1 * number, kl=2.0**number)) for number in range(4)]
    exact, unsure = board(*field), board(*field, seed_spreads=[pooled_spread(1.0, runs=[])])

    assert [row.rank for row in exact.rows] == [1, 2, 3, 4]
    assert exact.seed_error == 0.0
    assert unsure.seed_error == pytest.approx(0.1 / math.log(2), rel=0.05)
    assert [row.rank for row in unsure.rows] == [1, 1, 1, 1]
    assert [row.standard_error for row in unsure.rows] == pytest.approx([unsure.seed_error] * 4)
    assert unsure.rows[3].difference.standard_error == pytest.approx(math.sqrt(2) * unsure.seed_error)
    assert unsure.rows[0].difference.standard_error == 0.0, "to itself, whose seed is its own"


def test_repeats_stand_apart_from_the_rows_and_change_none_of_them() -> None:
    field = [trial(number, last=at_score(0.9 - 0.1 * number, kl=2.0**number)) for number in range(5)]
    repeats = [trial(5 + index, last=at_score(2.0, kl=1e-3), origin=f"repeat:{index}") for index in (1, 2)]

    found = board(*field, *repeats)

    assert replace(found, repeats=()) == board(*field)
    assert [(repeat.number, repeat.rung, len(repeat.kl_by_rung)) for repeat in found.repeats] == [(6, 2, 3), (7, 2, 3)]
    assert [repeat.score for repeat in found.repeats] == pytest.approx([2.0, 2.0])


def test_a_paired_difference_cancels_the_spread_between_documents():
    worse = result(ending=tuple(value - 0.01 for value in TEACHER.tasks["ending"].documents), bits=TEACHER.tasks["bits"].documents)

    paired = difference(TEACHER, worse, scales=SCALES)

    assert paired.value == pytest.approx(0.75 * 0.01 / 0.5)
    assert paired.standard_error < 1e-9 < objective(worse, scales=SCALES).standard_error


@properties
@given(shares, shares, st.floats(0, 0.3))
def test_the_difference_is_that_of_the_objectives_and_turns_its_sign(first, second, noise):
    ours, theirs = at_score(first, noise=noise), at_score(second)
    paired = difference(ours, theirs, scales=SCALES)
    reverse = difference(theirs, ours, scales=SCALES)

    assert paired.value == pytest.approx(objective(ours, scales=SCALES).value - objective(theirs, scales=SCALES).value, abs=1e-9)
    assert reverse.value == pytest.approx(-paired.value, abs=1e-12)
    assert reverse.standard_error == pytest.approx(paired.standard_error, abs=1e-12)


def test_inside_a_tie_group_the_held_out_kl_orders():
    noisy_first = trial(0, last=at_score(0.60, kl=1.0, noise=0.3))
    quieter = trial(1, last=at_score(0.55, kl=0.5))
    clear_loser = trial(2, last=at_score(0.0, kl=0.1))

    found = board(noisy_first, quieter, clear_loser)

    assert numbers(found) == [1, 0, 2]
    assert [row.rank for row in found.rows] == [1, 1, 3]
    assert [row.tie_group for row in found.rows] == [1, 1, 2]


def test_a_chain_of_ties_does_not_grow_a_group():
    # Each is within the noise of its neighbour; the third is not within that of the first.
    first, second, third = trial(0, last=at_score(0.8)), trial(1, last=at_score(0.5, noise=0.3)), trial(2, last=at_score(0.3))

    assert [(row.number, row.rank) for row in board(first, second, third).rows] == [(0, 1), (1, 1), (2, 3)]


def test_trials_that_stopped_follow_by_rung_and_then_kl_without_a_rank():
    found = board(trial(0, kls=(1.0,)), trial(1, kls=(2.0, 1.5)), trial(2, kls=(2.0, 1.2)), trial(3, last=at_score(0.1)))

    assert [(row.number, row.rank, row.rung) for row in found.rows] == [(3, 1, 2), (2, None, 1), (1, None, 1), (0, None, 0)]
    assert found.rows[-1].score is None
    assert found.rows[-1].tasks == {}


def test_a_control_at_the_top_is_ranked_but_does_not_win():
    found = board(trial(0, last=at_score(0.9), origin="control"), trial(1, last=at_score(0.5), origin="anchor:uniform"))

    assert [(row.number, row.rank, row.is_control) for row in found.rows] == [(0, 1, True), (1, 2, False)]
    assert found.leader == 1


def test_the_medians_of_the_controls_stand_on_the_board():
    controls = [trial(number, last=at_score(share, kl=share), origin="control") for number, share in enumerate((0.1, 0.4, 0.9))]

    summary = board(*controls).controls

    assert summary.num_trials == 3
    assert summary.score == pytest.approx(0.4)
    assert summary.kl == pytest.approx(0.45)
    assert board(trial(0)).controls is None


def test_agreement_is_one_when_every_rung_orders_alike_and_needs_three_trials():
    good, middle, bad = (trial(number, last=at_score(0.9 - number / 5, kl=1.0 + number), kls=(3.0 + number, 2.0 + number)) for number in range(3))

    assert [(item.tau, item.num_trials) for item in board(good, middle, bad).agreement] == [(1.0, 3)] * 3
    assert [(item.tau, item.num_trials) for item in board(good, bad).agreement] == [(None, 2)] * 3


def test_agreement_is_negative_when_rungs_disagree():
    found = board(*(trial(number, kls=(3.0 + number, 9.0 - number)) for number in range(4)))

    assert found.agreement[0].tau == pytest.approx(-1.0)
    assert found.agreement[1].num_trials == 0


def test_an_order_that_is_all_ties_agrees_with_nothing():
    assert board(*(trial(number, kls=(3.0, 2.0 + number)) for number in range(4))).agreement[0].tau is None


def test_a_task_on_which_the_teacher_does_not_beat_random_weights_is_refused_by_name():
    worse = result(ending=RANDOM.tasks["ending"].documents, bits=(3.5, 3.5, 3.5, 3.5))

    with pytest.raises(InvalidSpec) as caught:
        make_scales([replace(task, insist=True) for task in TASKS], teacher=worse, random=RANDOM)

    assert [problem.field for problem in caught.value.problems] == ["tasks.0", "tasks.1"]
    assert "ending: teacher 0.25, random weights 0.25" in str(caught.value)
    assert "bits: teacher 3.5, random weights 3" in str(caught.value)


def test_a_task_that_is_not_clear_of_random_weights_is_left_out_unless_the_spec_insists():
    (scale,) = make_scales((TaskSpec(name="ending", weight=3.0), TASKS[1]), teacher=TEACHER, random=RANDOM)

    assert (scale.name, scale.weight) == ("bits", 1.0)
    assert [scale.name for scale in SCALES] == ["ending", "bits"]


def test_weights_are_shares():
    assert [scale.weight for scale in SCALES] == [0.75, 0.25]


def test_a_number_that_is_not_finite_becomes_null():
    found = board(trial(0, kls=(math.inf,)))

    assert board_as_dict(found)["rows"][0]["kl"] is None
