"""Finds a task's YAML, in lm-eval's stock catalogue or in a folder, merges what it includes, and writes it out to stand alone.

It reads YAML without running anything: a `!function` stays a reference. What the YAML means is for `tasks.py` and lm-eval.
"""

from __future__ import annotations

import difflib
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import lm_eval.tasks
import yaml
from lm_eval.config.group import GroupConfig
from lm_eval.tasks import TaskManager

from nas.errors import TaskUnavailable

_GROUP_KEYS = frozenset(field.name for field in fields(GroupConfig)) | {"include", "tag", "task_list"}


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionReference:
    """A `!function utils.process_docs`, and the folder of the YAML that says so."""

    folder: Path
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSource:
    """A leaf task before it is copied: its merged YAML and the folder that its relative paths start from."""

    name: str
    folder: Path
    config: Mapping[str, Any]


def read_yaml(path: Path, *, including: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A task YAML with its includes merged as lm-eval merges them (local keys win); `!function`s stay references."""

    class Loader(yaml.SafeLoader):
        pass

    def read_reference(loader: yaml.SafeLoader, node: yaml.Node) -> FunctionReference:
        assert isinstance(node, yaml.ScalarNode)
        return FunctionReference(folder=path.parent, name=str(loader.construct_scalar(node)))

    Loader.add_constructor("!function", read_reference)
    if path in including:
        raise TaskUnavailable(f"{path}: expected no cycle of includes, got one")
    try:
        config = yaml.load(path.read_bytes(), Loader=Loader)
    except (OSError, yaml.YAMLError) as fault:
        raise TaskUnavailable(f"{path}: expected a readable YAML file, got {fault}") from fault
    if not isinstance(config, dict):
        raise TaskUnavailable(f"{path}: expected a YAML mapping, got {type(config).__name__}")
    included = config.pop("include", None) or []
    merged: dict[str, Any] = {}
    for name in [included] if isinstance(included, str) else included:
        merged |= read_yaml((path.parent / name).resolve(), including=(*including, path))
    return merged | config


def read_task_folder(folder: Path) -> list[TaskSource]:
    """Every leaf task below the folder; a file without a `task:` name is taken for a template.

    Raises:
        TaskUnavailable: a file cannot be read, two tasks share a name, or there is none.
    """
    sources: dict[str, TaskSource] = {}
    for path in sorted(folder.resolve().rglob("*.yaml")):
        config = read_yaml(path)
        name = config.get("task")
        if not isinstance(name, str) or "group" in config:
            continue  # a group, or a template that other files include
        if name in sources:
            raise TaskUnavailable(f"{path}: expected a task name used once in the folder, got {name!r} again")
        sources[name] = TaskSource(name=name, folder=path.parent, config=config)
    if not sources:
        raise TaskUnavailable(f"{folder}: expected a *.yaml file with a `task:` name, got none")
    return list(sources.values())


def find_stock_tasks(name: str) -> list[TaskSource]:
    """The leaf tasks behind a task, group or tag of lm-eval's catalogue.

    Raises:
        TaskUnavailable: there is no such name; the message offers close ones.
    """
    (root,) = (Path(path) for path in lm_eval.tasks.__path__)
    # Reading 14,000 files for one line takes 0.5 s; lm-eval's own index, which resolves every include, 6 to 16 s.
    line = re.compile(rb"^task:\s*[\"']?" + re.escape(name.encode()) + rb"[\"']?\s*$", re.MULTILINE)
    for path in sorted(path for path in root.rglob("*.yaml") if line.search(path.read_bytes())):
        config = read_yaml(path)
        if "group" not in config:
            return [TaskSource(name=name, folder=path.parent, config=config)]
    index = TaskManager().task_index
    if name not in index:
        close = difflib.get_close_matches(name, index, n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "a folder with task YAML files works too"
        raise TaskUnavailable(f"task: expected a name of lm-eval's catalogue or a folder, got {name!r}; {hint}")
    return list(_expand(name, overrides={}, index=index))


def _expand(name: str, *, overrides: Mapping[str, Any], index: Mapping[str, Any]) -> Iterator[TaskSource]:
    """Leaves of a task, tag or group; a group's extra keys, and those of its members, override the members' YAML as in lm-eval."""
    entry = index[name]
    if entry.yaml_path is None:
        for member in sorted(entry.tags):
            yield from _expand(member, overrides=overrides, index=index)
        return
    config = read_yaml(entry.yaml_path)
    if "group" in config:
        yield from _expand_members(config, folder=entry.yaml_path.parent, overrides=overrides, index=index)
    else:
        yield TaskSource(name=name, folder=entry.yaml_path.parent, config=config | dict(overrides) | {"task": name})


def _expand_members(group: Mapping[str, Any], *, folder: Path, overrides: Mapping[str, Any], index: Mapping[str, Any]) -> Iterator[TaskSource]:
    shared = {key: value for key, value in group.items() if key not in _GROUP_KEYS} | dict(overrides)
    for member in group.get("task") or []:
        own = {} if isinstance(member, str) else {key: value for key, value in member.items() if key not in ("task", "group")}
        name = member if isinstance(member, str) else member.get("group") or member["task"]
        if name in index:
            yield from _expand(name, overrides=shared | own, index=index)
        elif "group" in member:
            yield from _expand_members(member, folder=folder, overrides=shared, index=index)
        else:
            yield TaskSource(name=f"{group['group']}::{name}", folder=folder, config=shared | own)


def write_yaml(config: Mapping[str, Any], *, path: Path) -> None:
    """Writes a task's YAML, and beside it, in `code*/`, the Python files that its `!function`s name."""
    copied: dict[Path, str] = {}

    class Dumper(yaml.SafeDumper):
        pass

    def represent_reference(dumper: yaml.SafeDumper, reference: FunctionReference) -> yaml.ScalarNode:
        return dumper.represent_scalar("!function", _copy_function(reference, folder=path.parent, copied=copied))

    Dumper.add_representer(FunctionReference, represent_reference)
    path.write_text(yaml.dump(dict(config), Dumper=Dumper, allow_unicode=True, sort_keys=False), encoding="utf-8")


def _copy_function(reference: FunctionReference, *, folder: Path, copied: dict[Path, str]) -> str:
    """Copies the function's file with the Python files beside it, and says how the copied YAML names it; an installed module keeps its name."""
    module, _, function = reference.name.rpartition(".")
    source = reference.folder / f"{module.replace('.', '/')}.py"
    if not source.is_file():
        return reference.name
    package = copied.setdefault(reference.folder, f"code{len(copied) or ''}")
    for path in {source, *reference.folder.glob("*.py")}:
        target = folder / package / path.relative_to(reference.folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    return f"{package}.{module}.{function}"
