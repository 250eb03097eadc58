"""`nas keys`, `nas projects`: they work on the database directly, so whoever may run them is an operator on the machine."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nas.cli.options import Json
from nas.cli.registry import open_store
from nas.errors import InvalidSpec, Problem
from nas.terminal import print_json, print_rows, say

if TYPE_CHECKING:
    from nas.store.access import KeyRecord, ProjectRecord
    from nas.store.quotas import Quotas

keys = typer.Typer(help="API keys: who may use the service. The first one ends single-user mode.", no_args_is_help=True)
projects = typer.Typer(help="Projects: tenants that do not see each other, and their quotas.", no_args_is_help=True)

Project = Annotated[str, typer.Option(help="The project that the key opens.")]
Assignments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[QUOTA=VALUE]...",
        help="max_active_searches, max_active_trials, max_tokens_per_day (planned), max_device_seconds_per_day (spent); none is no limit. Days are UTC.",
    ),
]


@keys.command("create")
def create_key(
    name: Annotated[str, typer.Option(help="What it is for: a person, a script.")],
    project: Project = "default",
    scope: Annotated[str, typer.Option(help="read: look at searches; submit: also start and change them; admin: also the metrics of all projects.")] = "submit",
    expires_days: Annotated[float | None, typer.Option(min=0.0, max=36500.0, help="Days until it expires; default: never.")] = None,
    as_json: Json = False,
) -> None:
    """Make a key and print it: this once, it is stored as its digest only."""
    from nas.store.records import utc_now

    expires_at = None if expires_days is None else utc_now() + timedelta(days=expires_days)
    with open_store() as (store, _):
        is_first = not store.has_keys()
        key, secret = store.create_key(project=project, name=name, scopes=[scope], expires_at=expires_at)
    if as_json:
        print_json({**_key_row(key), "key": secret})
    else:
        sys.stdout.write(secret + "\n")
        say(f"{key.id} of project {key.project} may {', '.join(sorted(key.scopes))}; this is the only time that the key is shown")
    if is_first:
        say("this is the first key: from now on the service wants one from everybody, on this machine too")


@keys.command("list")
def list_keys(project: Annotated[str | None, typer.Option(help="Only this project's.")] = None, as_json: Json = False) -> None:
    """Keys without their secrets, revoked and expired ones among them."""
    with open_store() as (store, _):
        found = store.list_keys(project=project)
    print_rows([_key_row(key) for key in found], as_json=as_json)


@keys.command("revoke")
def revoke_key(key_id: Annotated[str, typer.Argument(help="Id of the key, its first part: nas_1f2e3d4c5b6a.")], as_json: Json = False) -> None:
    """End a key and every browser session that began with it, within a second."""
    with open_store() as (store, _):
        # Whoever gives the whole key means its id; the rest of it should not have been typed.
        key = store.revoke_key("_".join(key_id.split("_")[:2]))
    print_rows([_key_row(key)], as_json=as_json)


@projects.command("create")
def create_project(name: Annotated[str, typer.Argument(help="a-z, 0-9 and -.")], quotas: Assignments = None, as_json: Json = False) -> None:
    """Make a project."""
    from nas.store.quotas import Quotas

    limits = changed_quotas(Quotas(), quotas or [])
    with open_store() as (store, _):
        project = store.create_project(name, quotas=limits)
    print_rows([_project_row(project)], as_json=as_json)


@projects.command("list")
def list_projects(as_json: Json = False) -> None:
    """Projects with their quotas and what they use now."""
    with open_store() as (store, _):
        found = store.list_projects()
    print_rows([_project_row(project) | asdict(used) for project, used in found], as_json=as_json)


@projects.command("set-quota")
def set_quota(name: Annotated[str, typer.Argument(help="The project.")], quotas: Assignments = None, as_json: Json = False) -> None:
    """Change quotas; those that are not named stay, and what runs goes on."""
    with open_store() as (store, _settings):
        there, _ = store.get_project(name)
        project = store.set_quotas(name, changed_quotas(there.quotas, quotas or []))
    print_rows([_project_row(project)], as_json=as_json)


def changed_quotas(quotas: Quotas, assignments: Sequence[str]) -> Quotas:
    """The quotas with `name=value` done to them.

    Raises:
        InvalidSpec: an unknown name, or a value that is no number and not `none`.
    """
    names = [field.name for field in fields(quotas)]
    changes: dict[str, Any] = {}
    for assignment in assignments:
        name, _, text = assignment.partition("=")
        if name not in names:
            raise InvalidSpec(Problem(field="quota", expected=f"NAME=VALUE with one of {', '.join(names)}", got=assignment))
        try:
            changes[name] = None if text == "none" else float(text) if name == "max_device_seconds_per_day" else int(text)
        except ValueError:
            raise InvalidSpec(Problem(field=name, expected="a number, or none", got=repr(text))) from None
    return replace(quotas, **changes)


def _key_row(key: KeyRecord) -> dict[str, Any]:
    times = {name: getattr(key, name) for name in ("created_at", "expires_at", "revoked_at", "last_used_at")}
    shown = {name: moment and moment.strftime("%Y-%m-%dT%H:%M:%SZ") for name, moment in times.items()}
    return {"id": key.id, "project": key.project, "name": key.name, "scopes": sorted(key.scopes), **shown}


def _project_row(project: ProjectRecord) -> dict[str, Any]:
    return {"name": project.name, **asdict(project.quotas)}
