"""Bundles of trials that are no winners, members of the Pareto front for instance: asked for here, packed by a controller. No compute, no torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from nas.distillations import winner_of
from nas.settings import Settings
from nas.store.records import BundleRecord, BundleState, SearchRecord
from nas.store.store import Store
from nas.trial_files import check_student


def find_bundle(search: SearchRecord, number: int, *, store: Store) -> BundleRecord | None:
    """What is known of a trial's bundle: the winner's own, or the one that was asked for; None where nobody asked.

    Raises:
        NotFound: no such trial.
    """
    store.get_trial(search.id, number)
    winner = winner_of(search, trial=number)
    if winner is None or "bundle" not in winner:
        return store.find_bundle(search.id, number)
    return BundleRecord(
        search_id=search.id,
        trial=number,
        state=BundleState.PACKED,
        requested_at=None,
        finished_at=search.finished_at,
        num_failures=0,
        error=None,
        path=winner["bundle"],
        sha256=winner["bundle_sha256"],
        num_bytes=winner.get("bundle_bytes"),
    )


def plan_bundle(search: SearchRecord, number: int, *, store: Store, settings: Settings) -> Callable[[], BundleRecord]:
    """What has a trial's bundle packed. One that is packed, or waits, is left alone; one that failed is tried again.

    Raises:
        NotFound: no such trial.
        Conflict: the search has not ended, the trial was not verified, or its student was not kept.
    """
    found = find_bundle(search, number, store=store)
    if found is not None and found.state is not BundleState.FAILED:
        return lambda: found
    if search.state.is_terminal:
        check_student(search, store.get_trial(search.id, number), store=store, settings=settings)
    return partial(store.request_bundle, search.id, number)
