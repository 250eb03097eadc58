"""Who goes on to the next rung. Pure: it knows no store, no trial state and no clock.

Successive halving with these departures:

- Rung 0 (no training) says little about the order (Kendall 0.00 in arXiv 2407.14679, table 1), so it keeps a share of every depth class, and
  each depth class keeps a share of the first trained rung as well: shallow and narrow students swap places as they train.
- A trained rung promotes its best share *and those tied with the last of it*. The test is paired over the held-out blocks and includes the spread
  between training seeds. Depth classes and ties together enlarge the share at most by `max_tie_growth`.
- A rung promotes asynchronously while trials are still on their way to it (ASHA, arXiv 1810.05934).
- Students are compared by where their KL is going, not by where it is (`project`): a student that kept every layer begins far ahead of one that lost
  some, learns more slowly, and is overtaken only after most rungs (LOG.md, the ground truth).
- Who waits for the last rung and is certain to lose there is not trained on (`certain_losers`).
- With several objectives the order is by fronts of (KL, costs), the loneliest of a front first.

Forced trials (anchors, the user's shapes, controls) always go on and never take a place.

What holds (tests/search/test_rungs.py): the order of arrival changes nothing; a complete rung promotes at least its best share, whatever was promoted
before; with one objective a trial whose KL falls by the same on every block is never passed over for it, and no trial goes on for a tie while a better
one stays behind. An asynchronous promotion is never revoked: a trial that went up stays up when better ones arrive later. The caller therefore
subtracts those already up from `promotable`, and does not expect them to be in it.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from nas.search.pareto import best_first, fronts
from nas.search.results import Metric
from nas.spec import RungSpec

TIE_Z = 1.96
"""Two results are tied when their paired difference is within this many of its standard errors: the 95 % interval holds zero."""

UNTRAINED_SHARE = 1 / 64
"""Of the first rung's tokens that an untrained student counts as having seen, since a line in the logarithm of the tokens cannot begin at none."""
MIN_FINISHED = 3
"""Trials of the last rung without which nobody is a certain loser: they show by how much KL can fall there."""
MARGIN = 0.05
"""A certain loser would have to end this much below what the largest fall seen there makes of its KL. The assumption held in all 720 replays on the
ground truth (LOG.md): nobody was stopped who would have ended lowest."""

_ROUNDING = 1e-9
"""0.34 * 50 must count as 17 whichever way the product was rounded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """One trial that has finished a rung."""

    trial: int
    depth: int
    kl: Metric
    """Held-out KL to the teacher at this rung, per block, as `project` draws it on; finite. Lower is better."""
    forced: bool
    """Goes on whatever its KL, outside the count: an anchor, a shape of the user's, a control."""
    costs: tuple[float, ...] = ()
    """The spec's further objectives, minimised, in one order for all standings; empty with one objective."""


def last_rung(spec: RungSpec) -> int:
    """Number of the rung that ends the search; rung 0 is the untrained one."""
    return spec.num_trained


def promotable(rung: int, standings: Sequence[Standing], *, spec: RungSpec, complete: bool, seed_spread: float | None = None) -> tuple[int, ...]:
    """Numbers of the trials that may go on from `rung`, lowest KL first, those that already went on among them.

    Args:
        standings: every trial that finished this rung, in any order; failed ones are absent.
        complete: no further trial will finish this rung. It rounds the shares up, so that the best one always goes on.
        seed_spread: standard deviation of KL between training seeds over KL, as this search measured it; None: the spec's.
    """
    if rung >= last_rung(spec):
        return ()
    return Standings(rung, standings).promotable(spec=spec, complete=complete, seed_spread=seed_spread)


class Standings:
    """The results that count at one rung, kept in order as they come and go: ten thousand are not sorted again for every one that comes."""

    def __init__(self, rung: int, standings: Iterable[Standing] = ()) -> None:
        self.rung = rung
        self._of: dict[int, Standing] = {}
        self._forced: list[Standing] = []
        self._sampled: list[Standing] = []
        self._of_depth: defaultdict[int, list[Standing]] = defaultdict(list)
        """The sampled ones again. Every list is sorted by KL and number."""
        for standing in standings:
            self.add(standing)

    def __contains__(self, trial: int) -> bool:
        return trial in self._of

    def __getitem__(self, trial: int) -> Standing:
        return self._of[trial]

    def add(self, standing: Standing) -> None:
        """In place of what the trial had there, if anything."""
        self.remove(standing.trial)
        self._of[standing.trial] = standing
        for members in self._lists_of(standing):
            insort(members, standing, key=_by_kl)

    def remove(self, trial: int) -> bool:
        """Whether it had a result there."""
        standing = self._of.pop(trial, None)
        if standing is None:
            return False
        for members in self._lists_of(standing):
            del members[bisect_left(members, _by_kl(standing), key=_by_kl)]
        return True

    def _lists_of(self, standing: Standing) -> tuple[list[Standing], ...]:
        return (self._forced,) if standing.forced else (self._sampled, self._of_depth[standing.depth])

    def promotable(self, *, spec: RungSpec, complete: bool, seed_spread: float | None = None) -> tuple[int, ...]:
        """As the function `promotable`, of what is there now."""
        if self.rung >= last_rung(spec):
            return ()
        sampled, classes = self._best_first()
        if self.rung == 0:
            kept = _best_of_each(classes, share=spec.keep_untrained, complete=True)  # at once: the sampler learns from what is trained
        else:
            of_depths = _best_of_each(classes, share=spec.keep * spec.keep_depth, complete=complete) if self.rung == 1 else []
            spread = spec.seed_spread if seed_spread is None else seed_spread
            kept = _best_and_tied(sampled, of_depths=of_depths, spec=spec, complete=complete, seed_spread=spread)
        return tuple(standing.trial for standing in sorted([*self._forced, *kept], key=_by_kl))

    def _best_first(self) -> tuple[Sequence[Standing], Iterable[Sequence[Standing]]]:
        """The sampled ones and those of each depth: by KL, or by front and loneliness (of all of them) where there are costs."""
        if not self._sampled or not self._sampled[0].costs:  # all have them, or none
            return self._sampled, self._of_depth.values()
        ordered = [self._sampled[index] for index in best_first([_point(standing) for standing in self._sampled])]
        classes: defaultdict[int, list[Standing]] = defaultdict(list)
        for standing in ordered:
            classes[standing.depth].append(standing)
        return ordered, classes.values()


def project(kl: Metric, *, below: Metric, rung: int, spec: RungSpec) -> Metric:
    """The KL that a student is on its way to: drawn on by `spec.projection` decades of tokens, straight in log KL over log tokens.

    Args:
        kl: of a trained rung, over blocks.
        below: of the rung below, on the same blocks.
    Returns:
        (kl / below) ** steepness * kl, linearised: its documents are influence values, so that two students are still compared block by block.
    """
    steep = steepness(rung, spec=spec)
    if steep == 0 or kl.value <= 0 or below.value <= 0:
        return kl
    value = kl.value * (kl.value / below.value) ** steep
    documents = (
        value * (1 + (1 + steep) * (here / kl.value - 1) - steep * (there / below.value - 1)) for here, there in zip(kl.documents, below.documents, strict=True)
    )
    error = Metric.from_documents(tuple(documents), higher_is_better=kl.higher_is_better)
    return replace(error, value=value)


def steepness(rung: int, *, spec: RungSpec) -> float:
    """Steps of a rung by which its KL is drawn on."""
    step = -math.log10(UNTRAINED_SHARE) if rung == 1 else math.log10(spec.factor)
    return spec.projection / step


def projected_spread(seed_spread: float, *, rung: int, spec: RungSpec) -> float:
    """Relative spread between seeds of a projected KL, given that of a KL; every rung's own, and none before training."""
    if rung == 0:
        return seed_spread
    steep = steepness(rung, spec=spec)
    return seed_spread * math.hypot(1 + steep, steep if rung > 1 else 0.0)


def certain_losers(candidates: Mapping[int, float], *, finished: Sequence[tuple[float, float]]) -> set[int]:
    """Trials that wait for the last rung and cannot end lowest there, unless their KL falls more than that of any trial so far, by MARGIN.

    Args:
        candidates: KL at the rung below the last, by trial, as it is compared there (`project`).
        finished: KL at the rung below and at the last one, > 0, of the trials that have finished both.
    """
    if len(finished) < MIN_FINISHED:
        return set()
    lowest = min(above for _, above in finished)
    fall = min(above / below for below, above in finished) * (1 - MARGIN)
    return {number for number, kl in candidates.items() if kl * fall > lowest}


def paired_difference(metric: Metric, other: Metric) -> Metric:
    """metric - other, document by document: its mean and the standard error of that mean."""
    if len(metric.documents) != len(other.documents):
        raise ValueError(f"documents: expected the same ones on both sides, got {len(metric.documents)} and {len(other.documents)}")
    documents = tuple(ours - theirs for ours, theirs in zip(metric.documents, other.documents, strict=True))
    return Metric.from_documents(documents, higher_is_better=metric.higher_is_better)


def is_tied(worse: Metric, better: Metric, *, seed_spread: float) -> bool:
    """Whether two KLs cannot be told apart: their difference is within TIE_Z of its standard error, over blocks and over training seeds.

    Args:
        worse: the larger KL.
        seed_spread: standard deviation of KL between seeds, relative to KL, of either side and independent.
    """
    between_seeds = seed_spread * math.hypot(worse.value, better.value)
    # The error of a difference is at most the sum of the errors: most pairs are told apart without their blocks.
    if worse.value - better.value > TIE_Z * math.hypot(worse.standard_error + better.standard_error, between_seeds):
        return False
    difference = paired_difference(worse, better)
    return difference.value <= TIE_Z * math.hypot(difference.standard_error, between_seeds)


def _by_kl(standing: Standing) -> tuple[float, int]:
    return standing.kl.value, standing.trial


def _point(standing: Standing) -> tuple[float, ...]:
    return standing.kl.value, *standing.costs


def _best_of_each(classes: Iterable[Sequence[Standing]], *, share: float, complete: bool) -> list[Standing]:
    round_ = _ceil if complete else _floor
    return [standing for members in classes for standing in members[: round_(share * len(members))]]


def _best_and_tied(ordered: Sequence[Standing], *, of_depths: Sequence[Standing], spec: RungSpec, complete: bool, seed_spread: float) -> list[Standing]:
    """The best share; then, within the growth, those of the depths' shares, and those tied with the last of the share."""
    share = spec.keep * len(ordered)
    num_best = max(1, _ceil(share)) if complete else _floor(share)
    best, rest = list(ordered[:num_best]), ordered[num_best:]
    if not best:
        return []
    num_more = _floor(spec.max_tie_growth * num_best) - num_best
    # By number: a standing is compared by value, blocks and all.
    seats = {standing.trial for standing in of_depths}
    seated = list(islice((standing for standing in rest if standing.trial in seats), num_more)) if seats else []
    taken = {standing.trial for standing in seated}
    others = list(islice((standing for standing in rest if standing.trial not in taken), num_more - len(seated)))
    return best + seated + others[: _num_tied(others, best=best, seed_spread=seed_spread)]


def _num_tied(others: Sequence[Standing], *, best: Sequence[Standing], seed_spread: float) -> int:
    """How many of the others, from the first, go up for a tie: all to the last one that is tied, so that no better one stays behind it."""
    limit = _last_front(best)
    for index in reversed(range(len(others))):
        if not any(_is_beaten(others[index], by, seed_spread=seed_spread) for by in limit):
            return index + 1
    return 0


def _last_front(best: Sequence[Standing]) -> list[Standing]:
    """Those among whom the share ended: the last one, or with several objectives those that share its front."""
    if not best[-1].costs:
        return [best[-1]]
    front = fronts([_point(standing) for standing in best])
    return [standing for standing, number in zip(best, front, strict=True) if number == front[-1]]


def _is_beaten(standing: Standing, by: Standing, *, seed_spread: float) -> bool:
    """For certain: no cheaper in anything, and its KL higher beyond a tie."""
    if any(mine < other for mine, other in zip(standing.costs, by.costs, strict=True)):
        return False
    return standing.kl.value > by.kl.value and not is_tied(standing.kl, by.kl, seed_spread=seed_spread)


def _ceil(value: float) -> int:
    return math.ceil(value - _ROUNDING)


def _floor(value: float) -> int:
    return math.floor(value + _ROUNDING)
