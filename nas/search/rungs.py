"""Who goes on to the next rung. Pure: it knows no store, no trial state and no clock.

Successive halving with three departures. Rung 0 (no training) says little about the order (Kendall 0.00 in arXiv
2407.14679, table 1), so it keeps a share of every depth class. A trained rung promotes asynchronously while trials are
still on their way to it (ASHA, arXiv 1810.05934), and takes along whoever cannot be told apart from the last one in.
Forced trials (anchors, the user's shapes, controls) always go on and never take a place.

An asynchronous promotion is never revoked: a trial that went up stays up when better ones arrive later. The caller
therefore subtracts those already up from `promotable`, and does not expect them to be in it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from nas.search.results import Metric
from nas.spec import RungSpec

TIE_Z = 1.96
"""Two results are tied when their paired difference is within this many of its standard errors: the 95 % interval holds zero."""

_ROUNDING = 1e-9
"""0.34 * 50 must count as 17 whichever way the product was rounded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """One trial that has finished a rung."""

    trial: int
    depth: int
    kl: Metric
    """Held-out KL to the teacher at this rung, per block, finite. Lower is better."""
    forced: bool
    """Goes on whatever its KL, outside the count: an anchor, a shape of the user's, a control."""


def last_rung(spec: RungSpec) -> int:
    """Number of the rung that ends the search; rung 0 is the untrained one."""
    return spec.num_trained


def promotable(rung: int, standings: Sequence[Standing], *, spec: RungSpec, complete: bool) -> tuple[int, ...]:
    """Numbers of the trials that may go on from `rung`, best first, those that already went on among them.

    Args:
        standings: every trial that finished this rung, in any order; failed ones are absent.
        complete: no further trial will finish this rung. It rounds the share up, so that the best one always goes on.
    """
    if rung >= last_rung(spec):
        return ()
    sampled = sorted((standing for standing in standings if not standing.forced), key=_order)
    kept = _best_of_each_depth(sampled, spec=spec) if rung == 0 else _best_and_tied(sampled, spec=spec, complete=complete)
    forced = [standing for standing in standings if standing.forced]
    return tuple(standing.trial for standing in sorted([*forced, *kept], key=_order))


def paired_difference(metric: Metric, other: Metric) -> Metric:
    """metric - other, document by document: its mean and the standard error of that mean."""
    if len(metric.documents) != len(other.documents):
        raise ValueError(f"documents: expected the same ones on both sides, got {len(metric.documents)} and {len(other.documents)}")
    documents = tuple(ours - theirs for ours, theirs in zip(metric.documents, other.documents, strict=True))
    return Metric.from_documents(documents, higher_is_better=metric.higher_is_better)


def _order(standing: Standing) -> tuple[float, int]:
    return standing.kl.value, standing.trial


def _best_of_each_depth(ordered: Sequence[Standing], *, spec: RungSpec) -> list[Standing]:
    classes: defaultdict[int, list[Standing]] = defaultdict(list)
    for standing in ordered:
        classes[standing.depth].append(standing)
    return [standing for members in classes.values() for standing in members[: _ceil(spec.keep_untrained * len(members))]]


def _best_and_tied(ordered: Sequence[Standing], *, spec: RungSpec, complete: bool) -> list[Standing]:
    share = spec.keep * len(ordered)
    num_best = max(1, _ceil(share)) if complete else _floor(share)
    best, rest = list(ordered[:num_best]), ordered[num_best:]
    if not best:
        return []
    tied = [standing for standing in rest if _is_tied(standing.kl, best[-1].kl)]
    return best + tied[: _floor(spec.max_tie_growth * num_best) - num_best]


def _is_tied(worse: Metric, better: Metric) -> bool:
    difference = paired_difference(worse, better)
    return difference.value <= TIE_Z * difference.standard_error


def _ceil(value: float) -> int:
    return math.ceil(value - _ROUNDING)


def _floor(value: float) -> int:
    return math.floor(value + _ROUNDING)
