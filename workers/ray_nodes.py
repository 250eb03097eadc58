"""The nodes of a Ray cluster: each is checked when it joins, told of, and gets no steps while it is not fit for them.

Nodes come and go. A check is a small task pinned to its node; a step that begins on a node before the node's check has
ended checks it itself (`on_node.run_step`). What is not fit is kept out by Ray's own label of every node, so that nodes
that nobody knows of yet, an autoscaler's, may still be chosen; and it is checked again now and then.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import ray
from ray.exceptions import NodeDiedError, RayError, TaskUnschedulableError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from nas.store.machines import NodeRecord
from nas.store.records import utc_now
from workers import on_node

logger = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
"""Between two looks at which nodes there are."""
CHECK_SECONDS = 120.0
"""A check that takes longer is given up: its node answers nothing."""
RECHECK_SECONDS = 60.0
"""A node that was not fit is checked again after this long: a shared folder may have been away for a moment."""
SEEN_SECONDS = 30.0
"""Between two writings of a node that has not changed, so that one that nobody watches any more shows."""
MAX_CLOCK_OFFSET_SECONDS = 5.0
"""More is worth a warning. Nothing depends on it but the times of log lines: leases live on the database's clock."""
NODE_LABEL = "ray.io/node-id"


@dataclass(slots=True, kw_only=True)
class _Node:
    """One node as this driver sees it."""

    record: NodeRecord
    check: Any = None
    """The reference of the running check."""
    sent: float = 0.0
    """time.time() when the running check was sent."""
    checked: float | None = None
    """The monotonic clock when the last check ended."""
    saved: float | None = None
    """The monotonic clock when the record was written last."""
    changed: bool = True


@dataclass(slots=True, kw_only=True)
class RayNodes:
    """Watches the nodes of the cluster that this process is a driver of."""

    expected: dict[str, Any]
    """What `on_node.check_node` compares with."""
    save: Callable[[NodeRecord], None]
    """Told of every node when it changes, and now and then."""
    nodes: dict[str, _Node] = field(default_factory=dict)
    _looked: float | None = None

    def look(self) -> None:
        """Note who came and went, start and collect checks, and tell. Cheap when nothing is due."""
        now = time.monotonic()
        if self._looked is None or now - self._looked >= LOOK_SECONDS:
            self._looked = now
            self._note_nodes({node["NodeID"]: node for node in ray.nodes() if node["Alive"] and _gets_steps(node)})
        for node_id, node in self.nodes.items():
            if node.check is not None:
                self._collect(node)
            elif _is_due(node, now):
                self._start_check(node_id, node)
            if node.changed or (node.record.state != "gone" and now - (node.saved or 0.0) >= SEEN_SECONDS):
                self.save(replace(node.record, seen_at=utc_now()))
                node.saved, node.changed = now, False

    def selector(self) -> dict[str, str]:
        """Ray's label selector of the nodes that may get a step: all but the unfit."""
        unfit = sorted(node_id for node_id, node in self.nodes.items() if node.record.state == "unfit")
        return {NODE_LABEL: f"!in({','.join(unfit)})"} if unfit else {}

    def note(self, node_id: str, check: dict[str, Any]) -> None:
        """A step has found its node not fit."""
        node = self.nodes.get(node_id)
        if node is None:
            node = self.nodes[node_id] = _Node(record=_new_record(node_id, {}))
        self._judge(node, check, offset=None)

    def _note_nodes(self, alive: Mapping[str, dict[str, Any]]) -> None:
        for node_id, found in alive.items():
            if node_id not in self.nodes:
                self.nodes[node_id] = _Node(record=_new_record(node_id, found))
                logger.info("node joined", extra={"action": "node_joined", "node": node_id, "host": found["NodeManagerHostname"]})
        for node_id, node in self.nodes.items():
            if node_id not in alive and node.record.state != "gone":
                node.check = None
                self._change(node, state="gone")

    def _start_check(self, node_id: str, node: _Node) -> None:
        pinned = NodeAffinitySchedulingStrategy(node_id, soft=False)
        check = ray.remote(num_cpus=0, max_retries=0)(on_node.check_node)
        node.check = check.options(scheduling_strategy=pinned, name="check node").remote(self.expected)
        node.sent = time.time()

    def _collect(self, node: _Node) -> None:
        received = time.time()
        if not ray.wait([node.check], timeout=0)[0]:
            if received - node.sent > CHECK_SECONDS:
                ray.cancel(node.check, force=True)
                self._judge(node, _failed(f"the node: expected an answer within {CHECK_SECONDS:g} s, got none"), offset=None)
            return
        try:
            check = ray.get(node.check)
        except (TaskUnschedulableError, NodeDiedError):
            node.check = None  # it has gone: the next look sees that
            return
        except RayError as error:
            self._judge(node, _failed(f"the node: expected its check to run, got {type(error).__name__}: {error}"[:500]), offset=None)
            return
        # Its clock less ours, as near to zero as these four moments allow.
        least, most = check["facts"].pop("ended") - received, check["facts"].pop("began") - node.sent
        self._judge(node, check, offset=min(max(0.0, least), most) if least <= most else least)

    def _judge(self, node: _Node, check: dict[str, Any], *, offset: float | None) -> None:
        node.check, node.checked = None, time.monotonic()
        problems, warnings, facts = check["problems"], check["warnings"], {**node.record.facts, **check["facts"]}
        if offset is not None:
            facts["clock_offset_seconds"] = offset
            if abs(offset) > MAX_CLOCK_OFFSET_SECONDS:
                warnings = [*warnings, f"clock: expected the controller's within {MAX_CLOCK_OFFSET_SECONDS:g} s, got {offset:+.1f} s"]
        if not problems:
            # What the controller's machine has not installed is as on the first node that is fit.
            wanted = self.expected["versions"]
            self.expected = {**self.expected, "versions": {name: wanted[name] or facts["versions"][name] for name in wanted}}
        if problems or node.record.state != "fit":
            self._change(node, state="unfit" if problems else "fit", problems=problems, warnings=warnings, facts=facts)

    def _change(self, node: _Node, *, state: Literal["joining", "fit", "unfit", "gone"], **changes: Any) -> None:
        before = node.record
        node.record = replace(before, state=state, checked_at=utc_now() if state in ("fit", "unfit") else before.checked_at, **changes)
        node.changed = True
        details = {"node": before.id, "host": node.record.host, "problems": node.record.problems, "warnings": node.record.warnings}
        if state == "unfit" and before.state != "unfit":
            logger.error("node %s gets no steps: %s", node.record.host, "; ".join(node.record.problems), extra={"action": "node_unfit", **details})
        elif state != before.state:
            logger.info("node %s is %s", node.record.host, state, extra={"action": f"node_{state}", **details})


def _gets_steps(node: Mapping[str, Any]) -> bool:
    """A head that offers no cores gets none, and needs nothing of ours."""
    return bool(node["Resources"].get("CPU") or node["Resources"].get("GPU"))


def _is_due(node: _Node, now: float) -> bool:
    if node.record.state == "gone":
        return False
    return node.checked is None or (node.record.state == "unfit" and now - node.checked >= RECHECK_SECONDS)


def _new_record(node_id: str, found: Mapping[str, Any]) -> NodeRecord:
    resources = found.get("Resources", {})
    devices = sorted(name.removeprefix("accelerator_type:") for name in resources if name.startswith("accelerator_type:"))
    facts = {"cpus": resources.get("CPU", 0.0), "gpus": resources.get("GPU", 0.0), "devices": devices, "memory_bytes": int(resources.get("memory", 0))}
    return NodeRecord(
        id=node_id,
        host=str(found.get("NodeManagerHostname", "")),
        address=str(found.get("NodeManagerAddress", "")),
        state="joining",
        problems=[],
        warnings=[],
        facts=facts,
        checked_at=None,
        seen_at=utc_now(),
    )


def _failed(problem: str) -> dict[str, Any]:
    return {"problems": [problem], "warnings": [], "facts": {}}
