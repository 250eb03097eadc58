"""Which controller takes which search. Pure: what every controller decides for itself, from what it read of the store.

With n searches and k controllers everybody has a right to floor(n / k), and takes that without regard to others. What is left over, fewer than k, goes
one by one to whoever comes first, once everybody has what is his. So nobody waits for a decision of another, all end within
one of each other whatever the order in which they look, and then nothing moves until a search or a controller comes or goes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Holdings:
    """Who holds what, as one controller read it: it may be old by now, and a claim may fail."""

    active: Sequence[str]
    """The searches that go on, oldest first."""
    holders: Mapping[str, str]
    """Controller by search; a search that is not here is free."""
    controllers: Collection[str]
    """Those that live."""

    @property
    def free(self) -> list[str]:
        """Searches that nobody holds, oldest first."""
        return [search for search in self.active if search not in self.holders]

    def held(self) -> Counter[str]:
        """Searches by controller."""
        return Counter(self.holders[search] for search in self.active if search in self.holders)


def num_to_claim(holdings: Holdings, *, owner: str) -> int:
    """How many of the free searches this controller should take now."""
    share, left_over = divmod(len(holdings.active), len({owner, *holdings.controllers}))
    held = holdings.held()
    if held[owner] < share:
        return min(share - held[owner], len(holdings.free))
    everybody_has = all(held[controller] >= share for controller in holdings.controllers)
    return min(1, len(holdings.free)) if left_over and held[owner] == share and everybody_has else 0


def num_to_hand_back(holdings: Holdings, *, owner: str) -> int:
    """How many searches this controller should let go, as soon as nothing of them runs.

    What others lack, and is not free already, is given in proportion by those who have more than their right; then what is more than anybody should have.
    """
    share, left_over = divmod(len(holdings.active), len({owner, *holdings.controllers}))
    held, num_free = holdings.held(), len(holdings.free)
    lacking = sum(max(0, share - held[controller]) for controller in holdings.controllers) - num_free
    if lacking > 0:
        spare = {controller: max(0, num - share) for controller, num in held.items()}
        return math.ceil(lacking * spare.get(owner, 0) / max(1, sum(spare.values())))
    return max(0, held[owner] - share - min(left_over, 1)) if not num_free else 0
