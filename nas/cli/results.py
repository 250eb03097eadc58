"""Reading what came out of a search, and what happened in it, over REST."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nas.cli.following import print_events
from nas.cli.options import Json, SearchId, Url
from nas.cli.searches import make_client
from nas.errors import InvalidSpec, Problem
from nas.search.results import is_repeat
from nas.shape import Shape
from nas.terminal import board_facts, comparison_tables, leaderboard_table, out, plus_minus, print_facts, print_json, print_rows, say, write

if TYPE_CHECKING:
    from nas.search.study import ExportedTrial

commands = typer.Typer()

TrialNumber = Annotated[int, typer.Argument(help="The trial's number.")]
BudgetIndex = Annotated[int, typer.Option("--budget", help="Which budget of a search that has several; 0 is the first.")]


@commands.command()
def leaderboard(
    search_id: SearchId,
    csv: Annotated[bool, typer.Option("--csv", help="As CSV, all rows.")] = False,
    budget: BudgetIndex = 0,
    sort: Annotated[str, typer.Option(help="rank, score, kl or parameters; -NAME for the other way round.")] = "rank",
    state: Annotated[str | None, typer.Option(help="Only trials in this state.")] = None,
    rung: Annotated[int | None, typer.Option(help="Only trials whose deepest finished rung this is.")] = None,
    pareto: Annotated[bool | None, typer.Option("--pareto", help="Only trials of the front.")] = None,
    min_parameters: Annotated[int | None, typer.Option(help="Only shapes with at least so many parameters.")] = None,
    max_parameters: Annotated[int | None, typer.Option(help="Only shapes with at most so many parameters.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of the table at most; --csv and --json have all.")] = 100,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """The leaderboard of a search. Rows that share a rank (=) cannot be told apart; * is the winner, ✓ a file that was verified."""
    if csv and as_json:
        raise InvalidSpec(Problem(field="--csv", expected="one of --csv and --json", got="both"))
    query = {"budget": budget, "sort": sort, "state": state, "rung": rung, "pareto": pareto or None}
    query |= {"min_parameters": min_parameters, "max_parameters": max_parameters}
    with make_client(url) as client:
        if csv:
            write(client.leaderboard_csv(search_id, **query))
            return
        board = client.leaderboard(search_id, most=None if as_json else rows, **query)
        spec = client.search(search_id)["spec"]
    num_budgets = 1 + len(spec["more_budgets"])
    if num_budgets > 1 and not as_json:
        say(f"budget {budget} of this search's 0 to {num_budgets - 1}; --budget N shows another")
    if as_json:
        print_json(board)
    elif not board["rows"]:
        say("no row is like that" if board["num_rows"] else "no trial has been measured yet")
    else:
        table = leaderboard_table(board, width=out.width, objectives=spec["objectives"])
        out.print(table)
        if hidden := len(leaderboard_table(board, objectives=spec["objectives"]).columns) - len(table.columns):
            say(f"{hidden} columns are left out, as the terminal is narrow; --csv and --json have all")
        if board["has_more"]:
            say(f"the first {len(board['rows'])} rows of a board of {board['num_rows']:,}; --rows N shows more, --csv and --json all")
        print_facts(board_facts(board), as_json=False)


@commands.command()
def compare(
    first: Annotated[str, typer.Argument(help="Id of a search (A).")],
    second: Annotated[str, typer.Argument(help="Id of another search (B).")],
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Two searches side by side: what was asked differently, the shapes on both boards, best against best, and what each took."""
    with make_client(url) as client:
        comparison = client.compare(first, second)
    if as_json:
        print_json(comparison)
        return
    for title, rows in comparison_tables(comparison).items():
        out.print(title, style="bold", highlight=False)
        if rows:
            print_rows(rows, as_json=False)
        else:
            out.print("nothing", highlight=False)
        out.print()


@commands.command()
def winner(
    search_id: SearchId,
    bundle: Annotated[Path | None, typer.Option(help="Save the bundle (a tar file) here, or as bundle.tar in this folder.")] = None,
    budget: BudgetIndex = 0,
    format: Annotated[str | None, typer.Option(help="hf-config: its config.json for transformers; yaml: all that is known of it.")] = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """The winning shape, and its bundle."""
    with make_client(url) as client:
        if format is not None:
            write(client.winner_as(search_id, format=format, budget=budget).rstrip("\n") + "\n")
            return
        document = client.winner(search_id, budget=budget)
        if bundle is not None:
            saved = client.download_bundle(search_id, target=_tar_in(bundle), budget=budget)
            say(f"saved {saved}")
    if as_json:
        print_json(document)
    else:
        shown = {"trial": document["trial"], **document["shape"], "parameters": document["parameters"], "share_of_teacher": document["share_of_teacher"]}
        # A service of an earlier version says none of these.
        figures = {"score": plus_minus(document.get("score"), document.get("standard_error")), "P(best)": document.get("probability_best")}
        print_facts({**shown, **figures, "bundle_sha256": document["bundle_sha256"]}, as_json=False)


@commands.command()
def trials(
    search_id: SearchId,
    state: Annotated[str | None, typer.Option(help="Only trials in this state.")] = None,
    origin: Annotated[str | None, typer.Option(help="Only those of this origin: sampler, anchor, user, control, repeat.")] = None,
    sort: Annotated[str, typer.Option(help="number, parameters; with a minus before it the largest first.")] = "number",
    url: Url = None,
    as_json: Json = False,
) -> None:
    """The trials of a search."""
    with make_client(url) as client:
        found = client.trials(search_id, state=state, origin=origin, sort=sort)
    if as_json:
        print_json(found)
        return
    rows = [
        {
            "number": trial["number"],
            "state": trial["state"],
            "origin": trial["origin"],
            "shape": Shape.from_dict(trial["shape"]).key,
            "parameters": trial["parameters"],
            "rung": trial["rung"],
            "failure": (trial["failure"] or {}).get("reason"),
        }
        for trial in found
    ]
    print_rows(rows, as_json=False)


@commands.command()
def trial(
    search_id: SearchId,
    number: TrialNumber,
    bundle: Annotated[
        Path | None, typer.Option(help="Save the bundle of a verified trial (a tar file) here, or as bundle.tar in this folder; packed first, once.")
    ] = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """One trial: its shape, what each rung measured, its attempts; and its bundle, of a member of the Pareto front for instance."""
    with make_client(url) as client:
        if bundle is not None:
            say(f"saved {client.download_trial_bundle(search_id, number, target=_tar_in(bundle))}")
        found = client.trial(search_id, number)
    if as_json:
        print_json(found)
        return
    failure = {"failure": f"{found['failure']['reason']}: {found['failure'].get('message')}"} if found["failure"] else {}
    sha256 = (found.get("bundle") or {}).get("sha256")  # a service of an earlier version says nothing of bundles
    packed = {"bundle_sha256": sha256} if sha256 else {}
    print_facts({**{name: found[name] for name in ("number", "state", "origin", "parameters")}, **found["shape"], **failure, **packed}, as_json=False)
    for name, rows in (("rungs", [_rung_row(rung) for rung in found["rungs"]]), ("attempts", [_attempt_row(attempt) for attempt in found["attempts"]])):
        if rows:
            out.print()
            out.print(name, style="bold", highlight=False)
            print_rows(rows, as_json=False)


def _tar_in(place: Path) -> Path:
    return place / "bundle.tar" if place.is_dir() else place


def _rung_row(rung: Mapping[str, Any]) -> dict[str, Any]:
    tasks = {name: metric["value"] for name, metric in rung["tasks"].items()}
    return {"rung": rung["rung"], "tokens": rung["tokens"], "kl": rung["kl"]["value"], "loss": rung["loss"]["value"], **tasks}


def _attempt_row(attempt: Mapping[str, Any]) -> dict[str, Any]:
    return {"id": attempt["id"], "stage": attempt["stage"], "rung": attempt["rung"], "state": attempt["state"], "reason": attempt["reason"] or ""}


@commands.command()
def curve(
    search_id: SearchId,
    number: TrialNumber,
    rung: Annotated[int | None, typer.Option(help="Only this rung.")] = None,
    max_points: Annotated[int, typer.Option(min=2, max=10_000, help="Points at most, evenly chosen.")] = 30,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """The learning curve of a trial."""
    with make_client(url) as client:
        found = client.trial_metrics(search_id, number, rung=rung, max_points=max_points)
    if as_json:
        print_json(found)
        return
    print_rows(found["points"], as_json=False)
    if (hidden := found["num_points"] - len(found["points"])) > 0:
        say(f"{hidden:,} of {found['num_points']:,} points are left out; --max-points shows more")


@commands.command()
def importances(search_id: SearchId, budget: BudgetIndex = 0, url: Url = None, as_json: Json = False) -> None:
    """Which choices mattered: the share of the spread of log KL that each one explains."""
    with make_client(url) as client:
        found = client.importances(search_id, budget=budget)
        has_winner = as_json or bool(found) or client.search(search_id)["state"] == "succeeded"
    if not found and not as_json:
        say("too few shapes were trained to tell" if has_winner else "told of a search that has its winner")
    print_facts(found, as_json=as_json)


@commands.command()
def events(
    search_id: SearchId,
    after: Annotated[int, typer.Option(min=0, help="Only events after this number.")] = 0,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """What happened in a search so far; `nas watch` goes on with what happens. With --json: all events, one per line."""
    with make_client(url) as client:
        print_events(client.events(search_id, after=after), as_json=as_json)


@commands.command()
def download(
    sha256: Annotated[str, typer.Argument(help="Digest of a file of a search, such as the bundle_sha256 of `nas winner`.")],
    target: Annotated[Path, typer.Argument(help="Where it is saved.")],
    url: Url = None,
) -> None:
    """Save a file by its digest, which is checked. Started again, it goes on where it broke."""
    with make_client(url) as client:
        say(f"saved {client.download(sha256, target=target)}")


@commands.command("export-optuna")
def export_optuna(
    search_id: SearchId,
    file: Annotated[Path, typer.Argument(help="New file: SQLite, or an Optuna journal where the name ends in .log or .journal.")],
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Write a search as an Optuna study, which optuna-dashboard opens."""
    from nas.search.study import export_study

    with make_client(url) as client:
        search = client.search(search_id)
        boards = [client.leaderboard(search_id, budget=budget) for budget in range(1 + len(search["spec"]["more_budgets"]))]
        rows = {row["number"]: row for board in boards for row in board["rows"]}
        objectives = ("score", *search["spec"]["objectives"])
        # A repeat is no proposal: it has its anchor's choices, and no rank.
        numbers = [trial["number"] for trial in client.trials(search_id) if not is_repeat(trial["origin"])]
        trials = [_exported(client.trial(search_id, number), row=rows.get(number), objectives=objectives) for number in numbers]
    export_study(trials, path=file, name=search_id, objectives=objectives)
    print_facts({"file": str(file), "study": search_id, "trials": len(trials)}, as_json=as_json)


def _exported(trial: Mapping[str, Any], *, row: Mapping[str, Any] | None, objectives: Sequence[str]) -> ExportedTrial:
    """A trial of the API with its row of the board. One that reached the last rung, but is not on the board yet, is still running there."""
    from nas.search.study import ExportedTrial

    ranked = row if row is not None and row["rank"] is not None else None
    names = ("rank", "tie_group", "standard_error", "verified", "probability_best")
    return ExportedTrial(
        number=trial["number"],
        origin=trial["origin"],
        shape=Shape.from_dict({name: value for name, value in trial["shape"].items() if value is not None}),
        state="running" if trial["state"] == "completed" and ranked is None else trial["state"],
        values=[] if ranked is None else [ranked["score"], *(ranked["costs"][name] for name in objectives[1:])],
        kl_by_tokens={rung["tokens"]: rung["kl"]["value"] for rung in trial["rungs"]},
        attributes={"parameters": trial["parameters"], "budget": trial["budget"], **{name: row[name] for name in names if row is not None}},
    )
