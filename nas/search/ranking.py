"""Results -> leaderboard: scores with their errors, tie groups, Pareto front, agreement between rungs. Pure.

Only trials at the last rung have a rank. They are compared pairwise over the same documents; rows that this cannot tell
apart share a rank, and inside such a tie group the held-out KL orders: what the user's metric cannot separate, the
likelihood does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

from scipy.stats import kendalltau

from nas.search.confirmed import Confirmation, decide_finals
from nas.search.leaderboard import Agreement, Board, ControlSummary, Difference, Repeat, Row, TaskCell
from nas.search.objective import TaskScale, difference, objective, seed_error, with_seed_error
from nas.search.pareto import fronts
from nas.search.results import CONTROL, Metric, RungResult, is_repeat
from nas.search.rungs import TIE_Z, last_rung
from nas.search.seeds import SeedSpread
from nas.shape import Shape
from nas.spec import RungSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletedTrial:
    """A trial with at least one finished rung."""

    number: int
    origin: str
    """`anchor:NAME`, `user`, `sampler`, `control` or `repeat:INDEX`."""
    seed: int = 0
    """Of its data order."""
    shape: Shape
    parameters: int
    state: str
    """The store's word for it, shown as it is."""
    results: Mapping[int, RungResult]
    """By rung; not empty."""

    @property
    def rung(self) -> int:
        """The deepest finished rung."""
        return max(self.results)

    @property
    def deepest(self) -> RungResult:
        return self.results[self.rung]

    @property
    def costs(self) -> dict[str, float]:
        """All that any of its rungs found it to cost; a latency is measured at rung 0 alone."""
        known = {"parameters": float(self.parameters)}
        for rung in sorted(self.results):
            known |= self.results[rung].costs
        return known


def rank(
    trials: Sequence[CompletedTrial],
    *,
    scales: Sequence[TaskScale],
    teacher_parameters: int,
    spec: RungSpec,
    num_finalists: int = 1,
    confirmations: Mapping[int, Confirmation] | None = None,
    objectives: Sequence[str] = (),
    seed_spreads: Sequence[SeedSpread] = (),
) -> Board:
    """The leaderboard; the order of the trials does not matter.

    Rows of the last rung come first, best first; then the others, deeper rungs first, lower KL first. Repeats are no rows.

    Args:
        num_finalists: most trials of the first tie group that are confirmed.
        confirmations: by trial, what the confirm step found so far.
        objectives: names of the costs of the Pareto front; without any the parameters.
        seed_spreads: the spread between training seeds at each trained rung; that of the last one is part of every error of a score. Empty: none.
    """
    confirmations, last = confirmations or {}, last_rung(spec)
    repeats, trials = [trial for trial in trials if is_repeat(trial.origin)], [trial for trial in trials if not is_repeat(trial.origin)]
    seed_spread = seed_spreads[-1].value if seed_spreads else 0.0
    scales = with_seed_error(scales, results=[trial.deepest for trial in trials if trial.rung == last], seed_spread=seed_spread)
    groups = _tie_groups([trial for trial in trials if trial.rung == last], scales=scales)
    finals = decide_finals(
        [[trial.number for trial in members if trial.origin != CONTROL] for members in groups],
        num_finalists=num_finalists,
        confirmations=confirmations,
        slopes={scale.name: scale.slope for scale in scales},
        seed_error=seed_error(scales),
    )
    best = max(groups[0], key=lambda trial: (objective(trial.deepest, scales=scales).value, -trial.number)) if groups else None
    make_row = partial(_row, scales=scales, teacher_parameters=teacher_parameters, confirmations=confirmations, probabilities=finals.probabilities)
    rows: list[Row] = []
    for tie_group, members in enumerate(groups, start=1):
        place = len(rows) + 1
        rows += [make_row(trial, rank=place, tie_group=tie_group, tied=len(members) > 1, best=best) for trial in members]
    ranked = tuple(rows)
    stopped = sorted((trial for trial in trials if trial.rung != last), key=lambda trial: (-trial.rung, trial.deepest.kl.value, trial.number))
    rows += [make_row(trial, rank=None, tie_group=None, tied=False, best=None) for trial in stopped]
    return Board(
        rows=tuple(rows),
        leader=finals.winner if finals.winner is not None else next(iter(finals.finalists), None),
        finalists=finals.finalists,
        winner=finals.winner,
        pareto=pareto_front([trial for trial in trials if trial.rung == last], scales=scales, objectives=objectives or ("parameters",)),
        agreement=_agreement(trials, scales=scales, last=last),
        controls=_summarise_controls(ranked),
        seed_spread=seed_spread,
        seed_error=seed_error(scales),
        seed_spreads=tuple(seed_spreads),
        repeats=tuple(_repeat(trial, scales=scales) for trial in sorted(repeats, key=lambda trial: trial.number)),
    )


def pareto_front(trials: Sequence[CompletedTrial], *, scales: Sequence[TaskScale], objectives: Sequence[str]) -> tuple[int, ...]:
    """Numbers of the trials that no other one beats on score and costs, the cheapest first.

    Scores have errors and costs are taken as they stand. Another trial beats this one when it costs no more in anything and either scores higher
    beyond the tie test (the same paired test as for ranks), or scores no lower and costs less in something. So a dearer shape stays on the front for any
    measured gain, which may be luck: the rows' differences tell. One of equal costs leaves it only when it is told apart from one that nobody beats.
    A cost that was never measured is infinite.
    """
    points = {trial.number: tuple(trial.costs.get(name, math.inf) for name in objectives) for trial in trials}
    scores = {trial.number: objective(trial.deepest, scales=scales).value for trial in trials}

    def beats(other: CompletedTrial, trial: CompletedTrial) -> bool:
        theirs, ours = points[other.number], points[trial.number]
        if any(one > two for one, two in zip(theirs, ours, strict=True)) or scores[other.number] < scores[trial.number]:
            return False
        return theirs != ours or not _is_tied(other, trial, scales=scales)

    undominated = fronts([(*points[trial.number], -scores[trial.number]) for trial in trials])
    best = [trial for trial, front in zip(trials, undominated, strict=True) if front == 0]
    kept = [trial.number for trial, front in zip(trials, undominated, strict=True) if front == 0 or not any(beats(other, trial) for other in best)]
    return tuple(sorted(kept, key=lambda number: (points[number], -scores[number], number)))


def _tie_groups(trials: Sequence[CompletedTrial], *, scales: Sequence[TaskScale]) -> list[list[CompletedTrial]]:
    """Best first. A group holds everybody left who cannot be told apart from the best of those left; chains of ties do not grow it.

    So the first group is whoever may be the best. It may pass over a trial: one that is told apart from the best although its score is higher than that of
    another, whose error is larger.
    """
    left = sorted(trials, key=lambda trial: (-objective(trial.deepest, scales=scales).value, trial.number))
    groups: list[list[CompletedTrial]] = []
    while left:
        tied = {trial.number for trial in left[1:] if _is_tied(left[0], trial, scales=scales)} | {left[0].number}
        groups.append([trial for trial in left if trial.number in tied])
        left = [trial for trial in left if trial.number not in tied]
    return [sorted(members, key=lambda trial: (trial.deepest.kl.value, trial.number)) for members in groups]


def _is_tied(better: CompletedTrial, worse: CompletedTrial, *, scales: Sequence[TaskScale]) -> bool:
    ours, theirs = (objective(trial.deepest, scales=scales) for trial in (better, worse))
    # The error of a difference is at most the sum of the errors: most pairs are told apart without their documents. (More than a rounding apart.)
    if ours.value - theirs.value > 1.001 * TIE_Z * (ours.standard_error + theirs.standard_error) + 1e-9:
        return False
    paired = difference(better.deepest, worse.deepest, scales=scales)
    return paired.value <= TIE_Z * paired.standard_error


def _row(
    trial: CompletedTrial,
    *,
    rank: int | None,
    tie_group: int | None,
    tied: bool,
    best: CompletedTrial | None,
    scales: Sequence[TaskScale],
    teacher_parameters: int,
    confirmations: Mapping[int, Confirmation],
    probabilities: Mapping[int, float],
) -> Row:
    result, confirmation = trial.deepest, confirmations.get(trial.number)
    score = objective(result, scales=scales) if result.tasks else None
    return Row(
        rank=rank,
        tie_group=tie_group,
        tied=tied,
        number=trial.number,
        origin=trial.origin,
        is_control=trial.origin == CONTROL,
        shape=trial.shape.as_dict(),
        parameters=trial.parameters,
        share_of_teacher=trial.parameters / teacher_parameters,
        rung=trial.rung,
        tokens=result.tokens,
        score=score.value if score else None,
        standard_error=score.standard_error if score else None,
        difference=None if best is None else _NO_DIFFERENCE if trial.number == best.number else _difference(result, best.deepest, scales=scales),
        kl=result.kl.value,
        kl_standard_error=result.kl.standard_error,
        kl_by_rung=_kl_by_rung(trial),
        loss=result.loss.value,
        tasks={scale.name: _cell(result.tasks[scale.name], scale=scale) for scale in scales} if result.tasks else {},
        costs=trial.costs,
        state=trial.state,
        # A control's file is counted but not reloaded: too little to call it verified.
        verified=confirmation.verified if confirmation and (confirmation.reloaded or not confirmation.verified) else None,
        probability_best=probabilities.get(trial.number),
    )


_NO_DIFFERENCE = Difference(value=0.0, standard_error=0.0, low=0.0, high=0.0)
"""Of the best to itself: one student, so no seeds between."""


def _repeat(trial: CompletedTrial, *, scales: Sequence[TaskScale]) -> Repeat:
    return Repeat(
        number=trial.number,
        seed=trial.seed,
        state=trial.state,
        rung=trial.rung,
        kl_by_rung=_kl_by_rung(trial),
        score=objective(trial.deepest, scales=scales).value if trial.deepest.tasks else None,
    )


def _kl_by_rung(trial: CompletedTrial) -> tuple[float, ...]:
    return tuple(trial.results[rung].kl.value for rung in sorted(trial.results))


def _difference(result: RungResult, best: RungResult, *, scales: Sequence[TaskScale]) -> Difference:
    paired = difference(result, best, scales=scales)
    reach = TIE_Z * paired.standard_error
    return Difference(value=paired.value, standard_error=paired.standard_error, low=paired.value - reach, high=paired.value + reach)


def _cell(metric: Metric, *, scale: TaskScale) -> TaskCell:
    return TaskCell(
        value=metric.value,
        standard_error=metric.standard_error,
        higher_is_better=scale.higher_is_better,
        share=(metric.value - scale.random) / (scale.teacher - scale.random),
    )


def _agreement(trials: Sequence[CompletedTrial], *, scales: Sequence[TaskScale], last: int) -> tuple[Agreement, ...]:
    # Sorted, so that the float result does not depend on the order in which the trials came.
    trials = sorted(trials, key=lambda trial: trial.number)
    found = []
    for rung in range(last):
        pairs = [(trial.results[rung].kl.value, trial.results[rung + 1].kl.value) for trial in trials if {rung, rung + 1} <= trial.results.keys()]
        found.append(_tau(f"KL at rung {rung}", f"KL at rung {rung + 1}", pairs=pairs))
    # Higher scores are better, lower KLs are: the sign makes 1 mean agreement.
    pairs = [(trial.results[last].kl.value, -objective(trial.results[last], scales=scales).value) for trial in trials if last in trial.results]
    return (*found, _tau(f"KL at rung {last}", f"score at rung {last}", pairs=pairs))


def _tau(first: str, second: str, *, pairs: Sequence[tuple[float, float]]) -> Agreement:
    tau = float(kendalltau([left for left, _ in pairs], [right for _, right in pairs]).statistic) if len(pairs) >= 3 else math.nan
    return Agreement(first=first, second=second, tau=tau if math.isfinite(tau) else None, num_trials=len(pairs))


def _summarise_controls(ranked: Sequence[Row]) -> ControlSummary | None:
    controls = [row for row in ranked if row.is_control]
    if not controls:
        return None
    return ControlSummary(num_trials=len(controls), score=median(_score(row) for row in controls), kl=median(row.kl for row in controls))


def _score(row: Row) -> float:
    assert row.score is not None, "a ranked row has a score"
    return row.score
