"""One controller among the others: says that it lives, holds leases, takes its share of the searches, and notices what it lost.

What is fair is decided in `sharing.py`; what is done for a search that is held, in `controller.py`.
"""

from __future__ import annotations

import logging
import os
import socket
import uuid
from collections.abc import Callable, Collection, Sequence
from importlib.metadata import version

from nas.store.machines import ControllerRecord, Fence
from nas.store.records import utc_now
from nas.store.store import Store
from workers.sharing import Holdings, num_to_claim, num_to_hand_back

logger = logging.getLogger(__name__)

LOOKS_PER_LEASE = 4
"""How often in the time of a lease it is renewed, and the others are looked at."""


class Membership:
    """What this controller holds. Its clock decides when it asks, the database's who holds what."""

    def __init__(self, *, store: Store, lease_seconds: float, clock: Callable[[], float]) -> None:
        self._store, self._lease_seconds, self._clock = store, lease_seconds, clock
        host, pid = socket.gethostname(), os.getpid()
        self.record = ControllerRecord(owner=f"{host}:{pid}:{uuid.uuid4().hex[:8]}", host=host, pid=pid, version=version("nas"), started_at=utc_now())
        self.fences: dict[str, Fence] = {}
        """What it holds, by name."""
        self.num_to_hand_back = 0
        """Searches to let go, as soon as nothing of them runs."""
        self._renewed: float | None = None
        self._seen: set[str] = set()
        """The searches when it looked last."""
        self._taken: set[str] = set()
        """What others held then."""

    @property
    def owner(self) -> str:
        """The name under which it holds leases."""
        return self.record.owner

    def update(self, active: Sequence[str]) -> list[str]:
        """Renew in time, and take what is this controller's to take; returns the names that it held and lost.

        Args:
            active: the searches that go on, oldest first.
        """
        now, lost = self._clock(), list[str]()
        is_due = self._renewed is None or now - self._renewed >= self._lease_seconds / LOOKS_PER_LEASE
        if is_due:
            # Also one whose claim was written though the answer never came.
            held = {fence.name: fence for fence in self._store.renew(self.record, seconds=self._lease_seconds)}
            lost = [name for name, fence in self.fences.items() if held.get(name) != fence]
            self.fences, self._renewed = held, now
        if is_due or not self._seen.issuperset(active):
            self._share(active)
        return lost

    def hold(self, name: str) -> bool:
        """Whether this controller has a lease of that name now; it asks again as often as it looks at the others."""
        if name in self.fences:
            return True
        return name not in self._taken and self._claim(name)

    def release(self, name: str) -> None:
        """Let another have it at once."""
        fence = self.fences.pop(name, None)
        if fence is not None:
            self._store.release(fence)

    def forget(self, name: str) -> None:
        """It is lost already."""
        self.fences.pop(name, None)

    def hand_back(self, search_id: str) -> None:
        """Let another controller have a search."""
        self.num_to_hand_back -= 1
        self.release(search_id)
        logger.info("search handed back", extra={"action": "search_handed_back", "search_id": search_id, "owner": self.owner})

    def leave(self) -> None:
        """Let go of everything."""
        self.fences.clear()
        self._store.leave(self.owner)

    def _share(self, active: Sequence[str]) -> None:
        holders = {lease.name: lease.owner for lease in self._store.list_leases()}
        owners: Collection[str] = {controller.owner for controller in self._store.list_controllers()}
        holdings = Holdings(active=active, holders=holders, controllers=owners)
        self._seen, self._taken = set(active), {name for name, owner in holders.items() if owner != self.owner}
        wanted = num_to_claim(holdings, owner=self.owner)
        for search_id in holdings.free:
            if wanted and self._claim(search_id):
                wanted -= 1
        self.num_to_hand_back = num_to_hand_back(holdings, owner=self.owner)

    def _claim(self, name: str) -> bool:
        fence = self._store.claim(name, owner=self.owner, seconds=self._lease_seconds)
        if fence is None:
            self._taken.add(name)
            return False
        self.fences[name] = fence
        logger.info("lease claimed", extra={"action": "lease_claimed", "lease": name, "owner": self.owner, "token": fence.token})
        return True
