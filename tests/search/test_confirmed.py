"""Who wins among the finalists, and how sure that is: from held-out documents alone, the same ones for all of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nas.search.confirmed import Confirmation, decide_finals, probabilities_best
from nas.search.results import Metric, RungResult

SLOPES = {"pairs": 2.0, "bits": -0.5}


def metric(values: np.ndarray, *, higher_is_better: bool = True) -> Metric:
    return Metric.from_documents(tuple(float(value) for value in values), higher_is_better=higher_is_better)


def finalist(seed: int, *, shift: float = 0.0, documents: int = 200, shared: float = 0.8) -> dict[str, Metric]:
    """Two tasks; the documents' difficulty is common to all finalists, as it is in truth."""
    common, own = np.random.default_rng(99), np.random.default_rng(seed)
    return {
        name: metric(shift * np.sign(slope) + shared * common.normal(size=documents) + (1 - shared) * own.normal(size=documents))
        for name, slope in SLOPES.items()
    }


def confirmation(tasks: dict[str, Metric], *, verified: bool = True) -> Confirmation:
    zero = metric(np.zeros(2), higher_is_better=False)
    held_out = RungResult(rung=1, tokens=1, kl=zero, loss=zero, tasks=tasks, parameters=1, seconds={}, details={})
    return Confirmation(verified=verified, reloaded=True, held_out=held_out)


def bootstrap(finalists: dict[int, dict[str, Metric]], *, draws: int = 4000) -> dict[int, float]:
    """The reference: documents drawn anew, the same ones for every finalist."""
    generator, scores = np.random.default_rng(1), np.zeros((draws, len(finalists)))
    for task, slope in SLOPES.items():
        table = np.array([metrics[task].documents for metrics in finalists.values()])
        counts = generator.multinomial(table.shape[1], np.full(table.shape[1], 1 / table.shape[1]), size=draws)
        scores += slope * (counts @ table.T) / table.shape[1]
    best = scores.argmax(axis=1)
    return {number: float((best == index).mean()) for index, number in enumerate(finalists)}


@pytest.mark.parametrize("shifts", [(0.0, 0.0, 0.0), (0.01, 0.0, -0.01), (0.0, 0.03, 0.03, -0.1)])
def test_the_probabilities_are_those_of_a_bootstrap_over_documents(shifts: tuple[float, ...]) -> None:
    finalists = {number: finalist(number, shift=shift) for number, shift in enumerate(shifts)}

    assert probabilities_best(finalists, slopes=SLOPES) == pytest.approx(bootstrap(finalists), abs=0.04)


@given(shifts=st.lists(st.floats(-1, 1), min_size=1, max_size=5), seed_error=st.floats(0, 1))
def test_they_sum_to_one_and_do_not_depend_on_the_order(shifts: list[float], seed_error: float) -> None:
    finalists = {number: finalist(number, shift=shift, documents=20) for number, shift in enumerate(shifts)}
    found = probabilities_best(finalists, slopes=SLOPES, seed_error=seed_error)

    assert sum(found.values()) == pytest.approx(1.0)
    backwards = probabilities_best(dict(reversed(finalists.items())), slopes=SLOPES, seed_error=seed_error)
    assert backwards == pytest.approx(found, abs=0.02)


def test_equal_finalists_share_their_place() -> None:
    same = finalist(0)

    assert probabilities_best({1: same, 2: same, 3: finalist(3, shift=-5.0)}, slopes=SLOPES) == pytest.approx({1: 0.5, 2: 0.5, 3: 0.0})


def test_an_only_finalist_is_the_best_of_them() -> None:
    assert probabilities_best({7: finalist(0)}, slopes=SLOPES) == {7: 1.0}


def test_the_spread_between_seeds_makes_a_lead_less_sure() -> None:
    finalists = {1: finalist(1, shift=0.05), 2: finalist(2)}
    sure, unsure = (probabilities_best(finalists, slopes=SLOPES, seed_error=error)[1] for error in (0.0, 0.5))

    assert 0.5 < unsure < sure


def test_scores_on_other_documents_are_refused() -> None:
    with pytest.raises(ValueError, match="documents of pairs: expected the same ones for every finalist"):
        probabilities_best({1: finalist(1), 2: finalist(2, documents=100)}, slopes=SLOPES)


def decide(groups: list[list[int]], confirmations: dict[int, Confirmation], *, num_finalists: int = 2):
    return decide_finals(groups, num_finalists=num_finalists, confirmations=confirmations, slopes=SLOPES)


def test_the_first_of_the_first_tie_group_are_the_finalists_and_nobody_wins_before_all_are_confirmed() -> None:
    finals = decide([[4, 2, 9], [1]], {4: confirmation(finalist(4))})

    assert (finals.finalists, finals.winner, finals.probabilities) == ((4, 2), None, {})


def test_held_out_documents_decide_whatever_the_order_on_the_board() -> None:
    finals = decide([[4, 2, 9], [1]], {4: confirmation(finalist(4)), 2: confirmation(finalist(2, shift=1.0))})

    assert finals.winner == 2
    assert finals.probabilities[2] > 0.99


def test_of_equal_finalists_the_first_on_the_board_wins() -> None:
    same = confirmation(finalist(0))

    assert decide([[4, 2]], {4: same, 2: same}).winner == 4


def test_who_is_not_what_was_scored_gives_its_place_to_the_next() -> None:
    refused = confirmation(finalist(0, shift=9.0), verified=False)

    assert decide([[4, 2, 9], [1]], {4: refused}).finalists == (2, 9)
    assert decide([[4, 2], [1, 8]], {4: refused, 2: refused}).finalists == (1, 8)
    nobody = decide([[4]], {4: refused})
    assert (nobody.finalists, nobody.winner) == ((), None)


def test_a_confirmation_without_documents_still_counts_as_one() -> None:
    """As searches of an earlier version stored them."""
    short = {"value": 0.5, "standard_error": 0.1, "higher_is_better": True}
    held_out = {"rung": 1, "tokens": 1, "kl": short, "loss": short, "tasks": {}, "parameters": 1, "seconds": {}}
    found = Confirmation.from_dict({"verified": True, "reason": None, "reloaded": True, "parameters": 1, "held_out": held_out})

    assert found == Confirmation(verified=True, reloaded=True, held_out=None)
    assert decide([[4]], {4: found}).winner == 4
