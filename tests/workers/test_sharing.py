"""Fair shares, whatever comes and goes, and in whatever order the controllers look."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.sharing import Holdings, num_to_claim, num_to_hand_back


class World:
    """Searches, controllers and leases; every controller acts on what it read, which may be old."""

    def __init__(self, *, num_searches: int, num_controllers: int, seed: int) -> None:
        self.random = random.Random(seed)
        self.active = [f"s{number:03d}" for number in range(num_searches)]
        self.controllers = [f"c{number}" for number in range(num_controllers)]
        self.holders: dict[str, str] = {}
        self.moves = 0

    def read(self) -> Holdings:
        return Holdings(active=tuple(self.active), holders=dict(self.holders), controllers=tuple(self.controllers))

    def act(self, owner: str, read: Holdings, *, may_hand_back: bool = True) -> None:
        wanted = num_to_claim(read, owner=owner)
        for search in read.free:
            if wanted and search not in self.holders and search in self.active:
                self.holders[search], wanted = owner, wanted - 1
                self.moves += 1
        held = [search for search, holder in self.holders.items() if holder == owner]
        for search in self.random.sample(held, min(len(held), num_to_hand_back(read, owner=owner))) if may_hand_back else ():
            del self.holders[search]
            self.moves += 1

    def round(self, *, all_at_once: bool, may_hand_back: bool = True) -> None:
        """Everybody looks and acts, in some order; at once: all look before anybody acts."""
        order = self.random.sample(self.controllers, len(self.controllers))
        common = self.read()
        for owner in order:
            self.act(owner, common if all_at_once else self.read(), may_hand_back=may_hand_back)

    def settle(self, **how: bool) -> None:
        for _ in range(len(self.active) + 3):
            self.round(**how)

    def lose(self, owner: str) -> None:
        self.controllers.remove(owner)
        self.holders = {search: holder for search, holder in self.holders.items() if holder != owner}

    def check_fair(self) -> None:
        counts = Counter(dict.fromkeys(self.controllers, 0)) + Counter(self.holders.values())
        counts = {controller: counts[controller] for controller in self.controllers}
        assert set(self.holders) == set(self.active), "a search that nobody leads"
        assert max(counts.values()) - min(counts.values()) <= 1, counts


worlds = {"num_searches": st.integers(0, 40), "num_controllers": st.integers(1, 7), "seed": st.integers(0, 10**6)}


@given(**worlds, all_at_once=st.booleans())
@settings(max_examples=150, deadline=None)
def test_every_search_is_led_and_nobody_has_two_more_than_another(num_searches: int, num_controllers: int, seed: int, all_at_once: bool) -> None:
    world = World(num_searches=num_searches, num_controllers=num_controllers, seed=seed)
    world.settle(all_at_once=all_at_once)
    world.check_fair()

    moves = world.moves
    world.settle(all_at_once=all_at_once)
    assert world.moves == moves, "searches move although nothing came or went"


@given(**worlds, all_at_once=st.booleans(), changes=st.lists(st.sampled_from(["join", "die", "submit", "end"]), max_size=12))
@settings(max_examples=150, deadline=None)
def test_shares_are_fair_again_after_any_coming_and_going(num_searches: int, num_controllers: int, seed: int, all_at_once: bool, changes: list[str]) -> None:
    world = World(num_searches=num_searches, num_controllers=num_controllers, seed=seed)
    for number, change in enumerate(changes):
        world.round(all_at_once=all_at_once)
        match change:
            case "join":
                world.controllers.append(f"late{number}")
            case "die" if len(world.controllers) > 1:
                world.lose(world.random.choice(world.controllers))
            case "submit":
                world.active.append(f"t{number:03d}")
            case "end" if world.active:
                ended = world.random.choice(world.active)
                world.active.remove(ended)
                world.holders.pop(ended, None)
    world.settle(all_at_once=all_at_once)
    world.check_fair()

    moves = world.moves
    world.settle(all_at_once=all_at_once)
    assert world.moves == moves


def test_one_controller_takes_everything_at_once() -> None:
    world = World(num_searches=100, num_controllers=1, seed=0)

    world.round(all_at_once=True)

    world.check_fair()


def test_what_a_dead_controller_led_is_spread_over_the_others() -> None:
    world = World(num_searches=9, num_controllers=3, seed=0)
    world.settle(all_at_once=True)

    world.lose("c0")
    world.round(all_at_once=False, may_hand_back=False)
    world.round(all_at_once=False, may_hand_back=False)

    world.check_fair()


@pytest.mark.parametrize("num_searches", [4, 6])
def test_a_late_comer_takes_what_is_handed_back_and_few_searches_move(num_searches: int) -> None:
    world = World(num_searches=num_searches, num_controllers=2, seed=0)
    world.settle(all_at_once=True)
    moves = world.moves
    world.controllers.append("late")

    world.settle(all_at_once=True)

    world.check_fair()
    share = num_searches // 3
    assert world.moves - moves <= 4 * share, "each that moves is let go and taken; one more of them may"


def test_while_nothing_may_be_handed_back_a_late_comer_takes_what_is_new() -> None:
    world = World(num_searches=4, num_controllers=1, seed=0)
    world.settle(all_at_once=True)
    world.controllers.append("late")
    world.settle(all_at_once=True, may_hand_back=False)
    world.active += ["t1", "t2"]

    world.settle(all_at_once=True, may_hand_back=False)

    assert {world.holders["t1"], world.holders["t2"]} == {"late"}
