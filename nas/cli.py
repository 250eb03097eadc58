"""The `nas` command. Heavy imports happen inside the commands, so that `nas --help` is quick.

Results go to standard output, everything else to standard error, so that `--json` can be piped. A mistake of the user's is
one message and an exit code; a traceback is a bug of ours.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from nas.client import TERMINAL_STATES, ApiError, Client
from nas.errors import Conflict, InvalidSpec, NasError, NotFound, Problem
from nas.settings import Settings
from nas.terminal import err, event_line, leaderboard_table, out, print_facts, print_json, print_rows, say, shown, status_line

if TYPE_CHECKING:
    from nas.compress.corpus import Corpus
    from nas.full_run import RecipeCorpus
    from nas.store.store import Store

FAILED, WRONG_INPUT, MISSING, CONFLICT, UNREACHABLE, INTERRUPTED = 1, 2, 3, 4, 5, 130

_HELP = """Which compressed shape of this language model should I pay to distil?

Register a teacher, a corpus and lm-eval tasks; submit a search to `nas serve`; read the leaderboard; distil the winner.
"""
_EXIT_CODES = (
    "Exit codes: 0 done, 1 the search (or the training) failed, 2 wrong input, 3 not found, "
    "4 not possible in this state, 5 the service cannot be reached, 130 interrupted."
)

app = typer.Typer(help=_HELP, epilog=_EXIT_CODES, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
teachers_app = typer.Typer(help="Teachers that searches may name.", no_args_is_help=True)
corpora_app = typer.Typer(help="Corpora that searches may name.", no_args_is_help=True)
tasks_app = typer.Typer(help="lm-eval tasks that searches may name.", no_args_is_help=True)
for name, group in (("teachers", teachers_app), ("corpora", corpora_app), ("tasks", tasks_app)):
    app.add_typer(group, name=name)

Json = Annotated[bool, typer.Option("--json", help="Machine-readable output on standard output.")]
Url = Annotated[str | None, typer.Option(envvar="NAS_URL", help="The service; default: the address of NAS_HOST and NAS_PORT.")]
SearchId = Annotated[str, typer.Argument(help="Id of a search: srch_...")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; default: one per core.")]


def main() -> None:
    """Entry point: errors of ours, and files that cannot be used, become one message and an exit code."""
    try:
        app(prog_name="nas")
    except BrokenPipeError:  # `nas ... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (NasError, OSError, FloatingPointError) as error:
        err.print(f"nas: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(exit_code(error))


def exit_code(error: Exception) -> int:
    """The command's exit code for an error; `nas --help` lists them."""
    if isinstance(error, ApiError):
        if error.status is None:
            return UNREACHABLE
        return {404: MISSING, 409: CONFLICT}.get(error.status, WRONG_INPUT if error.status < 500 else FAILED)
    if isinstance(error, FloatingPointError):
        return FAILED
    return MISSING if isinstance(error, NotFound) else CONFLICT if isinstance(error, Conflict) else WRONG_INPUT


# -- the service -----------------------------------------------------------------------------------------------------------


@app.command()
def serve(
    data: Annotated[Path | None, typer.Option(help="Folder of all files (NAS_DATA).")] = None,
    host: Annotated[str | None, typer.Option(help="Address (NAS_HOST).")] = None,
    port: Annotated[int | None, typer.Option(help="Port (NAS_PORT).")] = None,
    database: Annotated[str | None, typer.Option(help="sqlite:///FILE or postgresql://... (NAS_DATABASE_URL).")] = None,
    ray_address: Annotated[str | None, typer.Option(help="A running Ray cluster; default: a local one (NAS_RAY_ADDRESS).")] = None,
    num_cpus: Annotated[int | None, typer.Option(help="CPU cores of the local cluster (NAS_NUM_CPUS).")] = None,
    num_gpus: Annotated[int | None, typer.Option(help="GPUs of the local cluster (NAS_NUM_GPUS).")] = None,
) -> None:
    """Run the API, the controller and a local Ray cluster until Ctrl-C."""
    from nas.serve import check_port
    from nas.serve import serve as run

    options = {
        "NAS_DATA": data and data.absolute(),
        "NAS_HOST": host,
        "NAS_PORT": port,
        "NAS_DATABASE_URL": database,
        "NAS_RAY_ADDRESS": ray_address,
        "NAS_NUM_CPUS": num_cpus,
        "NAS_NUM_GPUS": num_gpus,
    }
    os.environ.update({name: str(value) for name, value in options.items() if value is not None})
    settings = Settings.from_environment(os.environ)
    check_port(settings)
    say(f"serving http://{settings.host}:{settings.port}, data in {settings.data_folder}")
    sys.exit(run())


# -- the registry: works on the store and the data folder, never over HTTP -------------------------------------------------


@contextmanager
def _store() -> Iterator[tuple[Store, Settings]]:
    from nas.store.store import Store

    settings = Settings.from_environment(os.environ)
    settings.data_folder.mkdir(parents=True, exist_ok=True)
    try:
        store = Store.open(settings.database_url, migrate=True)
    except NasError:
        raise
    except Exception as error:  # a driver's own types, which differ from database to database
        raise InvalidSpec(Problem(field="NAS_DATABASE_URL", expected="a database that can be opened", got=str(error).splitlines()[0])) from error
    try:
        yield store, settings
    finally:
        store.close()


@teachers_app.command("add")
def add_teacher(
    source: Annotated[str, typer.Argument(help="Folder, or Hugging Face id.")],
    name: Annotated[str | None, typer.Option(help="Name for searches; default: the last part of SOURCE.")] = None,
    as_json: Json = False,
) -> None:
    """Register a teacher: a causal language model with safetensors, of a family in nas/families.py."""
    from nas.registration import register_teacher

    with _store() as (store, settings):
        record = register_teacher(source, name=name, store=store, settings=settings)
    print_rows([{"name": record.name, "parameters": record.parameters, "digest": record.digest, "path": record.path}], as_json=as_json)


@teachers_app.command("list")
def list_teachers(as_json: Json = False) -> None:
    """Registered teachers."""
    with _store() as (store, _):
        rows = [{"name": t.name, "model_type": t.config["model_type"], "parameters": t.parameters, "digest": t.digest} for t in store.list_teachers()]
    print_rows(rows, as_json=as_json)


@corpora_app.command("add")
def add_corpus(
    sources: Annotated[list[str], typer.Argument(help="Text, jsonl or parquet files, folders of them, or a Hugging Face dataset id.")],
    name: Annotated[str | None, typer.Option(help="Name for searches; default: the last part of the first source.")] = None,
    as_json: Json = False,
) -> None:
    """Register a corpus."""
    from nas.registration import register_corpus

    with _store() as (store, settings):
        record = register_corpus(sources, name=name, store=store, settings=settings)
    print_rows([{"name": record.name, "documents": record.num_documents, "bytes": record.num_bytes, "digest": record.digest}], as_json=as_json)


@corpora_app.command("list")
def list_corpora(as_json: Json = False) -> None:
    """Registered corpora."""
    with _store() as (store, _):
        rows = [{"name": c.name, "documents": c.num_documents, "bytes": c.num_bytes, "digest": c.digest} for c in store.list_corpora()]
    print_rows(rows, as_json=as_json)


@tasks_app.command("add")
def add_tasks(
    source: Annotated[str, typer.Argument(help="Stock lm-eval task or group, or a folder of task YAML (YAML is code: only from people you trust).")],
    dataset_path: Annotated[Path | None, typer.Option(help="Folder in the layout of the task's Hugging Face dataset, read instead of it.")] = None,
    as_json: Json = False,
) -> None:
    """Register tasks; their rows and YAML are copied, later runs need no network."""
    from nas.registration import register_tasks

    with _store() as (store, settings):
        records = register_tasks(source, dataset_path=dataset_path, store=store, settings=settings)
    print_rows([_task_row(record.name, record.card, record.digest) for record in records], as_json=as_json)


@tasks_app.command("list")
def list_tasks(as_json: Json = False) -> None:
    """Registered tasks and their metrics."""
    with _store() as (store, _):
        rows = [_task_row(record.name, record.card, record.digest) for record in store.list_tasks()]
    print_rows(rows, as_json=as_json)


def _task_row(task: str, card: Mapping[str, Any], digest: str) -> dict[str, Any]:
    return {"name": task, "type": card["output_type"], "metrics": [m["name"] for m in card["metrics"]], "documents": card["num_documents"], "digest": digest}


# -- searches: over REST ---------------------------------------------------------------------------------------------------


def _client(url: str | None) -> Client:
    settings = Settings.from_environment(os.environ)
    return Client(url or f"http://{settings.host}:{settings.port}")


@app.command()
def submit(
    spec: Annotated[Path, typer.Argument(help="Spec file (JSON); - for standard input.")],
    preview: Annotated[bool, typer.Option("--preview", help="Check and price it, store nothing.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Follow it to its end.")] = False,
    idempotency_key: Annotated[str | None, typer.Option(help="The same key and spec again give the same search.")] = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Submit a search; prints its id.

    The least that a spec says, all else has a default (see /docs of the service):

    \b
    {"teacher": "NAME", "corpus": {"parts": [{"name": "NAME"}]},
     "tasks": [{"name": "NAME"}], "budget": {"max_fraction": 0.6}}
    """
    try:
        body = sys.stdin.buffer.read() if str(spec) == "-" else spec.read_bytes()
    except OSError as error:
        raise InvalidSpec(Problem(field="spec", expected="a readable file", got=str(error))) from error
    with _client(url) as client:
        if preview:
            plan = client.preview(body)["plan"]
            print_facts(plan if as_json else _readable_plan(plan), as_json=as_json)
            return
        search = client.submit(body, idempotency_key=idempotency_key)
        if not as_json:
            sys.stdout.write(search["id"] + "\n")
            sys.stdout.flush()
            say(f"{search['plan']['legal_shapes']:,} legal shapes; follow with: nas watch {search['id']}")
        state = _follow(client, search["id"], show=not as_json) if wait else search["state"]
        if as_json:
            print_json(client.search(search["id"]) if wait else search)
    _exit_unless_well(state)


def _readable_plan(plan: Mapping[str, Any]) -> dict[str, Any]:
    """The plan with one line per anchor."""
    anchors = {f"anchor {name}": f"{anchor['parameters']:,} parameters: {shown(anchor['shape'], name='')}" for name, anchor in plan["anchors"].items()}
    return {**{name: value for name, value in plan.items() if name != "anchors"}, **anchors}


@app.command("list")
def list_searches(state: Annotated[str | None, typer.Option(help="Only searches in this state.")] = None, url: Url = None, as_json: Json = False) -> None:
    """Searches, newest first."""
    with _client(url) as client:
        searches = client.searches(state=state)
    if as_json:
        print_json(searches)
        return
    rows = [
        {
            "id": search["id"],
            "state": search["state"],
            "trials": f"{search['progress']['settled']}/{search['progress']['planned']}",
            "created": search["created_at"][:16].replace("T", " "),
            "teacher": search["teacher"],
            "label": search["label"],
        }
        for search in searches
    ]
    print_rows(rows, as_json=False)


@app.command()
def watch(search_id: SearchId, url: Url = None, as_json: Json = False) -> None:
    """Follow a search until it ends; exit code 1 if it did not succeed. With --json: its events, one per line."""
    with _client(url) as client:
        if as_json:
            for event in client.follow(search_id):
                sys.stdout.write(json.dumps(event) + "\n")
                sys.stdout.flush()
        state = client.search(search_id)["state"] if as_json else _follow(client, search_id, show=True)
    _exit_unless_well(state)


@app.command()
def leaderboard(
    search_id: SearchId,
    csv: Annotated[bool, typer.Option("--csv", help="As CSV.")] = False,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """The leaderboard of a search. Rows that share a rank cannot be told apart."""
    if csv and as_json:
        raise InvalidSpec(Problem(field="--csv", expected="one of --csv and --json", got="both"))
    with _client(url) as client:
        if csv:
            sys.stdout.write(client.leaderboard_csv(search_id))
            return
        board = client.leaderboard(search_id)
    if as_json:
        print_json(board)
    elif not board["rows"]:
        say("no trial has been measured yet")
    else:
        table = leaderboard_table(board, width=out.width)
        out.print(table)
        if hidden := len(leaderboard_table(board).columns) - len(table.columns):
            say(f"{hidden} columns are left out, as the terminal is narrow; --csv and --json have all")


@app.command()
def winner(
    search_id: SearchId,
    bundle: Annotated[Path | None, typer.Option(help="Save the bundle (a tar file) here, or as bundle.tar in this folder.")] = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """The winning shape, and its bundle."""
    with _client(url) as client:
        document = client.winner(search_id)
        if bundle is not None:
            saved = client.download_bundle(search_id, target=bundle / "bundle.tar" if bundle.is_dir() else bundle)
            say(f"saved {saved}")
    if as_json:
        print_json(document)
    else:
        shown = {"trial": document["trial"], **document["shape"], "parameters": document["parameters"], "share_of_teacher": document["share_of_teacher"]}
        print_facts({**shown, "bundle_sha256": document["bundle_sha256"]}, as_json=False)


@app.command()
def cancel(search_id: SearchId, url: Url = None, as_json: Json = False) -> None:
    """Cancel a search; what it has measured stays."""
    with _client(url) as client:
        search = client.cancel(search_id)
    print_facts({"id": search["id"], "state": search["state"]}, as_json=as_json)


def _follow(client: Client, search_id: str, *, show: bool) -> str:
    """Wait for the end of a search; returns its state. On a terminal its last line says where the search stands."""
    shown = out if show else Console(quiet=True)
    looked = 0.0
    with shown.status("", spinner="dots") as status:
        for event in client.follow(search_id):
            if line := event_line(event):
                shown.print(line, markup=False, highlight=False, soft_wrap=True)
            if shown.is_terminal and time.monotonic() - looked > 1.0:
                status.update(status_line(client.search(search_id)))
                looked = time.monotonic()
    return str(client.search(search_id)["state"])


def _exit_unless_well(state: str) -> None:
    if state in TERMINAL_STATES and state != "succeeded":
        raise typer.Exit(FAILED)


# -- without a service -----------------------------------------------------------------------------------------------------


@app.command()
def prune(
    teacher: Annotated[str, typer.Option(help="Folder, or Hugging Face id.")],
    shape: Annotated[str, typer.Option(help="Shape as JSON, or a file with it (shape.json of a bundle).")],
    corpus: Annotated[list[str], typer.Option(help="Text on which importance is measured.")],
    out_folder: Annotated[Path, typer.Option("--out", help="Folder of the student; plain transformers loads it.")],
    sequence_length: Annotated[int, typer.Option(min=8, help="Tokens per calibration block.")] = 512,
    calibration_tokens: Annotated[int, typer.Option(min=256, help="Tokens on which importance and depth are measured.")] = 131_072,
    reconstruction: Annotated[bool, typer.Option(help="Fit what stays to what was removed, where that lowers the held-out loss.")] = True,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Cut one shape out of a teacher; needs no service."""
    from nas.full_run import prune_teacher
    from nas.shape import Shape

    _prepare_torch(threads, device=device)
    summary = prune_teacher(
        teacher=_fetched_teacher(teacher),
        shape=Shape.from_dict(_read_shape(shape)),
        corpus=_fetched_corpus(corpus),
        out=out_folder,
        device=device,
        sequence_length=sequence_length,
        calibration_tokens=calibration_tokens,
        reconstruction=reconstruction,
    )
    print_facts({**summary, "folder": str(out_folder)}, as_json=as_json)


@app.command()
def distill(
    corpus: Annotated[list[str], typer.Option(help="Text to distil on; repeat for a mixture, in the order of the recipe's corpora and with their weights.")],
    out_folder: Annotated[Path, typer.Option("--out", help="Folder of the result; plain transformers loads it.")],
    recipe: Annotated[Path | None, typer.Argument(help="recipe.json of a bundle, or the bundle's folder; without one, --student and --tokens.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Folder, or Hugging Face id; default: the one that the bundle brings, if it was corrected.")] = None,
    student: Annotated[Path | None, typer.Option(help="Checkpoint to start from; default: the bundle's.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Instead of the recipe's.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Instead of the recipe's; without either it follows the loss.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Sequences per step, instead of the recipe's; 16 without one.")] = None,
    sequence_length: Annotated[int | None, typer.Option(min=8, help="Tokens per sequence, instead of the recipe's; 512 without one.")] = None,
    validation_tokens: Annotated[int | None, typer.Option(min=16, help="Held-out tokens, instead of the recipe's; 32,768 without one.")] = None,
    sharded: Annotated[
        bool | None,
        typer.Option(
            "--sharded/--replicated", help="Under torchrun: divide the student over the processes (FSDP2), or not (DDP); default: where it does not fit whole."
        ),
    ] = None,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """The full distillation of a student; needs no service.

    Killed and run again with the same arguments, it goes on from its last checkpoint (one a minute, and one at Ctrl-C).

    Over several GPUs or machines, which see the same folders: torchrun --nproc-per-node 8 -m nas.cli distill ... The result is the same up to rounding,
    and a run may go on with another number of processes. The batch is shared out, so it has to be a multiple of them.
    """
    from nas.compress.distillation import Diverged, Stopped
    from nas.compress.distributed import join_world
    from nas.full_run import Recipe, RecipeInputs, distil_fully

    _prepare_torch(threads, device=device)
    if recipe is not None:
        path = recipe / "recipe.json" if recipe.is_dir() else recipe
        if not path.is_file():
            raise InvalidSpec(Problem(field="recipe", expected="a recipe.json or a bundle's folder", got=str(recipe)))
        overrides = {"tokens": tokens, "learning_rate": learning_rate, "batch_size": batch_size}
        plan = Recipe.read(path, **overrides, sequence_length=sequence_length, validation_tokens=validation_tokens)
        inputs, student = RecipeInputs.read(path), student or path.parent
    elif student is None or tokens is None:
        missing = [name for name, value in (("--student", student), ("--tokens", tokens)) if value is None]
        raise InvalidSpec(Problem(field="recipe", expected=f"a recipe, or {', '.join(missing)} as well", got="none"))
    else:
        plan = Recipe(
            tokens=tokens,
            learning_rate=learning_rate,
            batch_size=batch_size or 16,
            sequence_length=sequence_length or 512,
            validation_tokens=validation_tokens or 32_768,
        )
        inputs = RecipeInputs(teacher=None, corpora=())
    if teacher is None and inputs.teacher_folder is None:
        raise InvalidSpec(Problem(field="--teacher", expected="a folder or Hugging Face id: the recipe brings no teacher of its own", got="nothing"))
    started = time.monotonic()
    with join_world(device) as world:
        err.quiet = out.quiet = not world.is_first
        teacher_folder = _fetched_teacher(teacher or str(inputs.teacher_folder))
        corpora = _mixture(corpus, recipe=inputs.corpora)
        try:
            with _interruptible() as should_stop, _progress(tokens=plan.tokens) as report:
                summary = distil_fully(
                    plan,
                    student=student,
                    teacher=teacher_folder,
                    corpora=corpora,
                    out=out_folder,
                    device=world.device,
                    expected_teacher=inputs.teacher,
                    world=world,
                    spreading=None if sharded is None else "sharded" if sharded else "replicated",
                    report=report,
                    should_stop=should_stop,
                )
        except (Stopped, Diverged) as ended:
            say(str(ended))
            raise typer.Exit(INTERRUPTED if isinstance(ended, Stopped) else FAILED) from ended
        if world.is_first:
            print_facts({**summary, "wall_seconds": time.monotonic() - started, "folder": str(out_folder)}, as_json=as_json)


def _mixture(sources: Sequence[str], *, recipe: Sequence[RecipeCorpus]) -> list[tuple[Corpus, float]]:
    """Each source with its weight. Other text than the search's is allowed, and said."""
    from nas.compress.corpus import check_corpus

    corpora = [check_corpus(_fetched_corpus([source])) for source in sources]
    if len(recipe) != len(corpora):
        if recipe:
            mixed = ", ".join(f"{entry.name} (weight {entry.weight:g})" for entry in recipe)
            say(f"--corpus: the recipe mixes {mixed}, got {len(corpora)} corpora; each has weight 1 in this run")
        return [(corpus, 1.0) for corpus in corpora]
    for source, corpus, entry in zip(sources, corpora, recipe, strict=True):
        if entry.digest not in (None, corpus.digest):
            say(f"--corpus {source}: other text than the recipe's {entry.name}; going on with it (digest {corpus.digest[:12]}, not {str(entry.digest)[:12]})")
    return [(corpus, entry.weight) for corpus, entry in zip(corpora, recipe, strict=True)]


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C (or SIGTERM) asks to stop after a checkpoint; the second is a Ctrl-C like any other."""
    asked: list[int] = []
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}

    def ask(signum: int, _: Any) -> None:
        say("stopping after a checkpoint; run the same command again to go on")
        asked.append(signum)
        signal.signal(signum, before[signal.Signals(signum)])

    for signum in before:
        signal.signal(signum, ask)
    try:
        yield lambda: bool(asked)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextmanager
def _progress(*, tokens: int) -> Iterator[Callable[[Any], None]]:
    """Where the training stands: one live line on a terminal, else a line every ten seconds."""
    said = -math.inf
    with err.status("measuring the student as it is", spinner="dots") as status:

        def report(progress: Any) -> None:
            nonlocal said
            left = max(0.0, (tokens - progress.tokens) / progress.tokens_per_second) if progress.tokens_per_second else 0.0
            speed = f"{progress.tokens_per_second:,.0f} tokens/s  {left:,.0f} s left"
            line = f"{progress.tokens:,} / {tokens:,} tokens  loss {progress.loss:.4f}  {speed}"
            status.update(line)
            if not err.is_terminal and (time.monotonic() - said >= 10.0 or progress.tokens >= tokens):
                said = time.monotonic()
                err.print(line, highlight=False, soft_wrap=True)

        yield report


@app.command()
def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="Folder of a model, or Hugging Face id.")],
    task: Annotated[list[str], typer.Option(help="Registered task (repeat for more), or a folder of task YAML.")],
    num_fewshot: Annotated[int, typer.Option(min=0, help="Worked examples in front of each document.")] = 0,
    limit: Annotated[int | None, typer.Option(min=2, help="Documents per task; default: all.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests per forward pass.")] = 64,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Score a checkpoint with lm-eval; needs no service."""
    import tempfile

    from nas.compress.teacher import load_model, load_tokenizer
    from nas.evaluate.scoring import score
    from nas.evaluate.tasks import add_task, load_tasks

    _prepare_torch(threads, device=device)
    folder = _fetched_teacher(checkpoint)
    folders: list[Path] = []
    with tempfile.TemporaryDirectory() as temporary:
        for entry in task:
            if Path(entry).is_dir():
                folders += [card.folder for card in add_task(entry, destination=Path(temporary))]
            else:
                with _store() as (store, _):
                    folders.append(Path(store.get_task(entry).folder))
        tasks = load_tasks(folders, num_fewshot={})
        if num_fewshot:
            tasks = load_tasks(folders, num_fewshot=dict.fromkeys(tasks, num_fewshot))
        documents = {name: range(len(loaded.eval_docs))[:limit] for name, loaded in tasks.items()}
        model = load_model(folder, dtype="float32", device=device)
        scores = score(model, tokenizer=load_tokenizer(folder), tasks=tasks, documents=documents, batch_size=batch_size, max_length=None)
    rows = [
        {"task": name, "metric": metric, "value": value.value, "standard_error": value.standard_error, "documents": result.num_documents}
        for name, result in scores.tasks.items()
        for metric, value in result.metrics.items()
    ]
    print_rows(rows, as_json=as_json)


def _prepare_torch(threads: int | None, *, device: str) -> None:
    if device not in ("cpu", "cuda"):
        raise InvalidSpec(Problem(field="device", expected="cpu or cuda", got=device))
    import torch
    from transformers.utils import logging as transformers_logging

    if device == "cuda" and not torch.cuda.is_available():
        raise InvalidSpec(Problem(field="device", expected="cpu, as torch finds no CUDA device here", got=device))
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    if threads is not None:
        torch.set_num_threads(threads)


def _fetched_teacher(source: str) -> Path:
    from nas.compress.teacher import fetch_teacher

    return fetch_teacher(source, cache=Settings.from_environment(os.environ).registry_folder / "teachers")


def _fetched_corpus(sources: Sequence[str]) -> list[Path]:
    from nas.compress.corpus import fetch_corpus

    cache = Settings.from_environment(os.environ).registry_folder / "corpora"
    return [path for source in sources for path in fetch_corpus(source, cache=cache)]


def _read_shape(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text if text.lstrip().startswith("{") else Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidSpec(Problem(field="shape", expected="a JSON object or a file with one", got=str(error))) from error
    if not isinstance(values, dict):
        raise InvalidSpec(Problem(field="shape", expected="a JSON object", got=text))
    return values


if __name__ == "__main__":
    main()
