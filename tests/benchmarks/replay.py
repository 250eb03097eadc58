"""Whole searches replayed on the ground truth: the table answers instead of training.

Our search is the product's own code (`workers.search_run.SearchRun`, over a space that holds the grid's shapes and no others), driven as the controller
drives it. What chance decides in a real search is drawn anew in every replay: the blocks that the rungs see, the seed of every training run, the order in
which rungs finish, the sampler's seed. The shape that a procedure ends with is judged by its final result, which no rung sees. Minutes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from nas.search.results import Metric, RungResult
from nas.shape import Shape
from nas.space import SearchSpace
from nas.spec import dump_spec, parse_spec
from nas.store.records import SearchRecord, SearchState, TrialRecord, TrialState, utc_now
from tests.benchmarks.truth import Truth, read_truths
from workers import search_run
from workers.actions import Advance, NewTrial
from workers.search_run import SearchRun

NUM_REPLAYS = 200
NUM_DOCUMENTS = 32
"""The rungs' blocks, drawn with replacement, are averaged in so many documents: paired differences keep their standard error, deciding is ten times faster."""
MAX_PARALLEL = 8
"""Rungs in flight: from 1 to this, drawn in every replay."""
TOKEN_GOAL = 0.15
"""Of the tokens of Minitron's procedure, which takes every shape to the last rung."""
CHOSEN_ON = ("stories260K", 0.6)
"""The grid on which the defaults were chosen and the goal is claimed; the others are the check, printed whatever they say (LOG.md)."""
MINITRON_SHAPES = 10
"""NVIDIA's search takes the ten legal shapes closest to the budget."""

console = Console(width=160)


class Answers(Protocol):
    """What answers instead of training."""

    @property
    def shapes(self) -> tuple[Shape, ...]: ...
    @property
    def parameters(self) -> NDArray[np.int64]: ...
    @property
    def tokens(self) -> tuple[int, ...]:
        """Of the points, the last one that of the final result."""
        ...


class GridSpace(SearchSpace):
    """A space of which only the given shapes are left, each the widest of its frame."""

    def __init__(self, whole: SearchSpace, shapes: Sequence[Shape]) -> None:
        self.__dict__.update(whole.__dict__)
        keys = {shape.key for shape in shapes}
        self._anchors = {name: shape for name, shape in whole.anchors().items() if shape.key in keys}
        self._low = self._high - 1
        kept = np.array([self._shape(frame, self.intermediate_sizes[low]).key in keys for frame, low in zip(self._frames, self._low, strict=True)])
        assert kept.sum() == len(keys), "a shape of the table is not the widest of its frame"
        for name in ("_frames", "_room", "_low", "_high"):
            setattr(self, name, getattr(self, name)[kept])

    def anchors(self) -> dict[str, Shape]:
        """Those of the whole space that are left."""
        return self._anchors


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chance:
    """What chance decided in one replay."""

    seed: int
    documents: NDArray[np.float64]
    """[S, P, NUM_DOCUMENTS] KL that the rungs see."""
    parallel: int

    @classmethod
    def draw(cls, truth: Truth, *, seed: int) -> Chance:
        """One seed of training for all shapes that have several; noise of the same size for those that have one."""
        generator = np.random.default_rng([seed, 7])
        num_blocks = truth.kl[0][0].shape[1] // 2
        blocks = generator.integers(num_blocks, size=num_blocks - num_blocks % NUM_DOCUMENTS)
        which = int(generator.integers(max(len(seeds) for seeds in truth.kl)))
        seen = np.stack([truth.at(tokens, seed=which)[:, blocks] for tokens in truth.tokens], axis=1)
        spread = np.array([truth.seed_sd(tokens) for tokens in truth.tokens])
        spread[0] = 0.0  # nothing is drawn before training
        single = np.array([len(seeds) == 1 for seeds in truth.kl])
        noise = np.exp(spread * generator.standard_normal(seen.shape[:2]))
        seen = np.where(single[:, None, None], seen * noise[:, :, None], seen)
        return cls(
            seed=seed,
            documents=seen.reshape(*seen.shape[:2], NUM_DOCUMENTS, -1).mean(axis=-1),
            parallel=int(generator.integers(1, MAX_PARALLEL + 1)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """What a procedure came to in one replay."""

    shape: int
    """Index of the shape that it ends with."""
    tokens: int
    """Trained on, thrown-away decays among them."""


def search_spec(truth: Truth, *, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The spec of a search over the grid: the defaults at the size of the table's teachers, and what `changes` says of each section."""
    values: dict[str, Any] = {
        "teacher": "t",
        "corpus": {"parts": [{"name": "c"}]},
        "tasks": [{"name": "q"}],
        "budget": {"max_fraction": truth.grid.max_fraction},
        "sampler": {"max_trials": len(truth.shapes)},
        "rungs": ladder(truth),
    }
    for section, fields in (changes or {}).items():
        values[section] = {**values.get(section, {}), **fields}
    return values


def ladder(truth: Truth, *, num_trained: int | None = None, factor: int | None = None) -> dict[str, int]:
    """Rungs that end at the table's last one, by default as many and as far apart as the spec's defaults, fewer where the table has no point so early."""
    defaults = parse_spec('{"teacher": "t", "corpus": {"parts": [{"name": "c"}]}, "tasks": [{"name": "q"}], "budget": {"max_fraction": 0.5}}').rungs
    num_trained, factor = num_trained or defaults.num_trained, factor or defaults.factor
    while num_trained > 1 and truth.last_rung_tokens // factor ** (num_trained - 1) not in truth.tokens:
        num_trained -= 1
    return {"first_tokens": truth.last_rung_tokens // factor ** (num_trained - 1), "factor": factor, "num_trained": num_trained}


class Replay:
    """One search, driven as the controller drives it, with the table's results."""

    def __init__(self, table: Answers, *, space: SearchSpace, spec: Mapping[str, Any], chance: Chance) -> None:
        self.table, self.chance = table, chance
        self.generator = np.random.default_rng([chance.seed, 8])
        self.index = {shape.key: index for index, shape in enumerate(table.shapes)}
        with patch.object(search_run, "build_space", lambda *_, **__: space):
            self.run = SearchRun(_record({**spec, "seed": chance.seed}), trials=[], rungs=[], attempts=[])
        self.points = [table.tokens.index(self.run.spec.rungs.tokens(rung)) for rung in range(self.run.last_rung + 1)]
        self.running: list[Advance] = []

    def to_end(self) -> Ending:
        while True:
            self._start()
            if self.running:
                self._finish(self.running.pop(int(self.generator.integers(len(self.running)))))
            for number in self.run.left_behind():
                self._change(number, state=TrialState.STOPPED)
            if not self.running and self.run.is_finished():
                return self._ending()

    def _start(self) -> None:
        while len(self.running) < self.chance.parallel and (action := self.run.next_action()) is not None:
            if isinstance(action, NewTrial):
                self._propose(action)
            else:
                self._change(action.trial, state=TrialState.RUNNING)
                self.run.add_start(action.trial, rung=action.rung)
                self.running.append(action)

    def _propose(self, new: NewTrial) -> None:
        number, now = len(self.run.trials), utc_now()
        record = TrialRecord(
            search_id="srch_1",
            number=number,
            origin=new.origin,
            shape=new.shape.as_dict(),
            choices=new.choices.as_dict() if new.choices else None,
            parameters=int(self.table.parameters[self.index[new.shape.key]]),
            state=TrialState.WAITING,
            rung=None,
            failure=None,
            confirmation=None,
            created_at=now,
            updated_at=now,
        )
        self.run.set_trial(record)

    def _finish(self, step: Advance) -> None:
        state = TrialState.COMPLETED if step.rung == self.run.last_rung else TrialState.WAITING
        self._change(step.trial, state=state, rung=step.rung)
        self.run.add_result(step.trial, self._result(step))

    def _result(self, step: Advance) -> RungResult:
        index = self.index[self.run.shape_of(step.trial).key]
        documents = self.chance.documents[index, self.points[step.rung]]
        kl = Metric.from_documents(tuple(documents.tolist()), higher_is_better=False)
        return RungResult(
            rung=step.rung,
            tokens=self.run.spec.rungs.tokens(step.rung),
            kl=kl,
            loss=kl,
            tasks={},
            parameters=int(self.table.parameters[index]),
            seconds={},
            details={},
        )

    def _change(self, number: int, **changes: Any) -> None:
        self.run.set_trial(replace(self.run.trials[number], **changes))

    def _ending(self) -> Ending:
        """With the lowest KL of the last rung."""
        last = {number: results[self.run.last_rung] for number, results in self.run.results.items() if self.run.last_rung in results}
        winner = min(last, key=lambda number: last[number].kl.value)
        tokens = sum(self.run.spec.trained_tokens(rung) for results in self.run.results.values() for rung in results)
        return Ending(shape=self.index[self.run.shape_of(winner).key], tokens=tokens)


def _record(spec: Mapping[str, Any]) -> SearchRecord:
    now = utc_now()
    nothing: dict[str, Any] = dict.fromkeys(("board", "winner", "error", "started_at", "finished_at"))
    return SearchRecord(
        id="srch_1",
        label="",
        state=SearchState.SEARCHING,
        spec=dump_spec(parse_spec(json.dumps(spec))),
        inputs={"teacher": {"name": "t", "digest": "d", "path": "", "config": {}}, "corpora": [], "tasks": []},
        plan={},
        created_at=now,
        updated_at=now,
        version=1,
        **nothing,
    )


def replay_ours(truth: Truth, *, spec: Mapping[str, Any], num_replays: int = NUM_REPLAYS) -> list[Ending]:
    """Our search, once for every seed."""
    space = GridSpace(truth.grid.space(), truth.shapes)
    return [Replay(truth, space=space, spec=spec, chance=Chance.draw(truth, seed=seed)).to_end() for seed in range(num_replays)]


def replay_baselines(truth: Truth, *, tokens: int, num_replays: int = NUM_REPLAYS) -> dict[str, list[Ending]]:
    """What others would do, once for every seed. tokens: what the random search may spend."""
    last, num_shapes = truth.last_rung_tokens, len(truth.shapes)
    point = truth.tokens.index(last)
    found: dict[str, list[Ending]] = {}
    for seed in range(num_replays):
        chance = Chance.draw(truth, seed=seed)
        zero_shot, kl = chance.documents[:, 0].mean(axis=-1), chance.documents[:, point].mean(axis=-1)
        drawn = np.random.default_rng([seed, 9]).permutation(num_shapes)
        closest = np.argsort(-truth.parameters, kind="stable")[:MINITRON_SHAPES]
        procedures = {
            "one shape at random": (drawn[:1], 0),
            "random shapes to the last rung, our tokens": (drawn[: max(1, round(tokens / last))], last),
            "most parameters": (closest[:1], 0),
            "lowest KL without training": (np.array([zero_shot.argmin()]), 0),
            f"the {MINITRON_SHAPES} largest to the last rung": (closest, last),
            "every shape to the last rung (Minitron)": (np.arange(num_shapes), last),
        }
        for name, (shapes, each) in procedures.items():
            found.setdefault(name, []).append(Ending(shape=int(shapes[kl[shapes].argmin()]), tokens=each * len(shapes)))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Of many replays of one procedure."""

    median_regret: float
    """Final KL above the best shape's, in standard errors of the best shape's final result (documents and seeds)."""
    mean_regret: float
    worst_regret: float
    """The 95th percentile."""
    best: float
    """Share of the replays that end with the best shape."""
    top_three: float
    token_share: float
    """Tokens spent over those of Minitron's procedure, the median."""
    most_tokens: float
    """The same, the 95th percentile."""


def summarise(endings: Sequence[Ending], *, truth: Truth) -> Summary:
    """Judge every ending by the final results."""
    final, rank = truth.final, truth.final.argsort().argsort()
    shapes = np.array([ending.shape for ending in endings])
    regrets = (final[shapes] - final.min()) / truth.final_error()[final.argmin()]
    shares = np.array([ending.tokens for ending in endings]) / (truth.last_rung_tokens * len(truth.shapes))
    return Summary(
        median_regret=float(np.median(regrets)),
        mean_regret=float(regrets.mean()),
        worst_regret=float(np.quantile(regrets, 0.95)),
        best=float((rank[shapes] == 0).mean()),
        top_three=float((rank[shapes] < 3).mean()),
        token_share=float(np.median(shares)),
        most_tokens=float(np.quantile(shares, 0.95)),
    )


def bench() -> bool:
    truths = [truth for truth in read_truths() if truth.last_rung_tokens in truth.tokens]
    if not truths:
        console.print("no ground truth yet")
    held = {(truth.grid.teacher, truth.grid.max_fraction): _bench_one(truth) for truth in truths}
    return held.get(CHOSEN_ON, True)


def _bench_one(truth: Truth) -> bool:
    ours = replay_ours(truth, spec=search_spec(truth))
    spent = int(np.median([ending.tokens for ending in ours]))
    console.print(
        f"{truth.name}: {len(truth.shapes)} shapes, {NUM_REPLAYS} replays, rungs up to {truth.last_rung_tokens:,} tokens, "
        f"final result after {truth.tokens[-1]:,}; "
        f"standard error of the best final KL {truth.final_error()[truth.final.argmin()]:.4f} of {truth.final.min():.4f}"
    )
    table = Table("", "tokens", "95 % at most", "regret, median", "mean", "95 % at most", "finds the best", "one of the best three", box=None)
    for name, endings in {"our search": ours, **replay_baselines(truth, tokens=spent)}.items():
        found = summarise(endings, truth=truth)
        table.add_row(
            name,
            f"{found.token_share:.1%}",
            f"{found.most_tokens:.1%}",
            *(f"{regret:.2f}" for regret in (found.median_regret, found.mean_regret, found.worst_regret)),
            f"{found.best:.0%}",
            f"{found.top_three:.0%}",
        )
    console.print(table)
    found = summarise(ours, truth=truth)
    held = found.median_regret <= 1.0 and found.token_share <= TOKEN_GOAL
    console.print(f"goal: median regret at most 1 standard error for at most {TOKEN_GOAL:.0%} of the tokens: {'holds' if held else 'DOES NOT HOLD'}")
    return held
