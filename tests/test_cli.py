"""The `nas` command as a user meets it: exit codes, JSON on standard output alone, no traceback for a mistake, tables that fit."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from rich.console import Console

from nas import cli, terminal
from nas.cli import errors, models
from nas.client import ApiError
from nas.compress.distillation import Progress
from nas.compress.teacher import check_teacher
from nas.errors import Conflict, InvalidSpec, NotFound, Problem, TeacherUnavailable

SHAPE = {"num_hidden_layers": 2, "hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


class Answer:
    """What a command left behind."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


Nas = Callable[..., Answer]


@pytest.fixture
def nas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Nas:
    """Runs the command in this process, on a data folder of its own, with no service behind it."""
    monkeypatch.setenv("NAS_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("NAS_PORT", "1")
    monkeypatch.delenv("NAS_URL", raising=False)

    def run(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["nas", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return Answer(int(ended.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def registered(nas: Nas, tiny_sources: dict[str, Path]) -> Nas:
    for group, name in (("teachers", "tiny"), ("corpora", "words")):
        source = tiny_sources["teacher" if group == "teachers" else "corpus"]
        assert nas(group, "add", source, "--name", name).code == 0
    assert nas("tasks", "add", tiny_sources["tasks"]).code == 0
    return nas


@pytest.mark.parametrize(
    "command", [[], ["serve"], ["submit"], ["estimate"], ["watch"], ["prune"], ["distill"], ["evaluate"], ["teachers", "add"], ["tasks", "add"]]
)
def test_every_command_has_help(nas: Nas, command: list[str]) -> None:
    answer = nas(*command, "--help")
    assert answer.code == 0
    assert "Usage: nas" in answer.out


def test_help_is_quick_because_nothing_heavy_is_imported() -> None:
    code = "import sys; import nas.cli; print([name for name in ('torch', 'transformers', 'ray', 'optuna', 'lm_eval', 'sqlalchemy') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ApiError("", status=None, problem={}), errors.UNREACHABLE),
        (ApiError("", status=404, problem={}), errors.MISSING),
        (ApiError("", status=409, problem={}), errors.CONFLICT),
        (ApiError("", status=422, problem={}), errors.WRONG_INPUT),
        (ApiError("", status=500, problem={}), errors.FAILED),
        (NotFound(""), errors.MISSING),
        (Conflict(""), errors.CONFLICT),
        (InvalidSpec(Problem(field="a", expected="b", got="c")), errors.WRONG_INPUT),
        (TeacherUnavailable(""), errors.WRONG_INPUT),
        (FileNotFoundError(""), errors.WRONG_INPUT),
        (FloatingPointError(""), errors.FAILED),
    ],
)
def test_an_exit_code_means_something(error: Exception, code: int) -> None:
    assert errors.exit_code(error) == code


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["teachers", "add", "/nonexistent"], 2, "teacher: expected an existing folder or a Hugging Face id"),
        (["corpora", "add", "/nonexistent"], 2, "corpus: expected an existing path"),
        (["submit", "/nonexistent"], 2, "spec: expected a readable file"),
        (["submit", "{spec}"], 5, "is `nas serve` running?"),
        (["list"], 5, "the service at http://127.0.0.1:1 cannot be reached"),
        (["list", "--url", "nonsense"], 5, "the service at nonsense cannot be reached"),
        (["watch", "srch_1"], 5, "cannot be reached"),
        (["leaderboard", "srch_1", "--csv", "--json"], 2, "--csv: expected one of --csv and --json, got both"),
        (["prune", "--shape", "{}"], 2, "hidden_size: expected an integer, got nothing"),
        (["prune", "--shape", "[1]"], 2, "shape: expected a JSON object or a file with one"),
        (["prune", "--shape", "{shape}", "--device", "tpu"], 2, "device: expected cpu or cuda, got tpu"),
        (["prune", "--shape", "{shape}", "--out", "/proc/nas"], 2, "No such file or directory: '/proc/nas"),
        (["prune", "--shape", "{shape}", "--calibration-tokens", "99999999"], 2, "expected at least this many tokens"),
        (["distill", "/nonexistent"], 2, "recipe: expected a recipe.json or a bundle's folder, got /nonexistent"),
        (["distill", "{spec}"], 2, "expected a JSON file with the object `distillation`"),
        (["distill", "{spec}", "--tokens", "0"], 2, "--tokens"),
        (["evaluate", "/nonexistent", "--task", "choice"], 2, "expected an existing folder"),
        (["evaluate", "{teacher}", "--task", "nosuch"], 3, "task: expected a registered one (choice), got 'nosuch'"),
        (
            ["evaluate", "{teacher}", "--task", "choice", "--num-fewshot", "999"],
            2,
            "num_fewshot.choice: expected 0: the task has no split of its own for examples",
        ),
        (["evaluate", "{teacher}"], 2, "Missing option '--task'"),
        (["nosuch"], 2, "No such command 'nosuch'"),
    ],
)
def test_a_mistake_is_a_message_and_an_exit_code(
    registered: Nas, tiny_sources: dict[str, Path], tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    (tmp_path / "spec.json").write_text("{}")
    known = {"{spec}": tmp_path / "spec.json", "{shape}": json.dumps(SHAPE), "{teacher}": tiny_sources["teacher"]}
    given = [str(known.get(argument, argument)) for argument in arguments]
    if given[0] in ("prune", "distill"):
        given += ["--teacher", str(tiny_sources["teacher"]), "--corpus", str(tiny_sources["corpus"])]
        given += [] if "--out" in given else ["--out", str(tmp_path / "out")]
        given += ["--sequence-length", "32"] if given[0] == "prune" else []
    answer = registered(*given)
    assert answer.code == code, answer.err
    assert message in " ".join(answer.err.replace("│", " ").split())
    assert (answer.out, "Traceback" in answer.err) == ("", False)


def test_a_wrong_setting_is_named(nas: Nas, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAS_DATABASE_URL", "postgresql://nobody@127.0.0.1:1/none")
    answer = nas("teachers", "list")
    assert (answer.code, answer.out) == (2, "")
    assert "NAS_DATABASE_URL: expected a database that can be opened" in answer.err


@pytest.mark.parametrize("group", ["teachers", "corpora", "tasks"])
def test_the_registry_is_listed_as_json_and_as_a_table(registered: Nas, group: str) -> None:
    name = {"teachers": "tiny", "corpora": "words", "tasks": "choice"}[group]
    assert [row["name"] for row in json.loads(registered(group, "list", "--json").out)] == [name]
    assert name in registered(group, "list").out


def test_an_empty_list_is_json_too(nas: Nas) -> None:
    assert nas("teachers", "list", "--json").out == "[]\n"
    answer = nas("teachers", "list")
    assert (answer.out, answer.err) == ("none\n", "")


def test_a_teacher_is_pruned_distilled_and_evaluated_without_a_service(registered: Nas, tiny_sources: dict[str, Path], tmp_path: Path) -> None:
    inputs = ["--teacher", tiny_sources["teacher"], "--corpus", tiny_sources["corpus"], "--threads", "1", "--json"]
    small, large = tmp_path / "small", tmp_path / "large"
    pruned = registered("prune", "--shape", json.dumps(SHAPE), "--sequence-length", "32", "--calibration-tokens", "512", "--out", small, *inputs)
    assert json.loads(pruned.out)["parameters"] == 10200
    recipe = {"tokens": 2048, "learning_rate": 3e-3, "batch_size": 4, "sequence_length": 32, "validation_tokens": 256}
    (tmp_path / "recipe.json").write_text(json.dumps({"distillation": recipe}))
    plain = ["distill", "--student", small, "--out", tmp_path / "plain", *inputs, "--sequence-length", 64]
    assert "a recipe, or --tokens as well" in registered(*plain).err
    assert registered(*plain, "--tokens", 2048, "--batch-size", 2, "--validation-tokens", 256).code == 0
    command = ["distill", tmp_path / "recipe.json", "--student", small, "--out", large, *inputs]
    summary = json.loads(registered(*command).out)
    assert summary["held_out_after"]["kl"] < summary["held_out_before"]["kl"]
    again = registered(*command, "--learning-rate", "0.001")
    assert again.code == errors.CONFLICT
    assert "holds another run; learning_rate: expected 0.003" in again.err
    scored = json.loads(registered("evaluate", large, "--task", "choice", "--limit", "10", "--threads", "1", "--json").out)
    assert [(row["task"], row["metric"], row["documents"]) for row in scored] == [
        ("choice", metric, 10) for metric in ("acc", "logprob_per_byte", "bits_per_byte", "margin")
    ]


@pytest.fixture
def distilled(nas: Nas, tiny_sources: dict[str, Path], tmp_path: Path) -> Callable[..., Answer]:
    """`nas distill` of the teacher itself, with the inputs that the recipe names and the corpora of the command line."""

    def run(inputs: dict[str, Any], *corpora: Path) -> Answer:
        recipe = {"tokens": 512, "learning_rate": 3e-3, "batch_size": 4, "sequence_length": 32, "validation_tokens": 64}
        (tmp_path / "recipe.json").write_text(json.dumps({"distillation": recipe, **inputs}))
        options = [argument for path in corpora for argument in ("--corpus", path)]
        teacher = tiny_sources["teacher"]
        named = [] if "folder" in inputs.get("teacher", {}) else ["--teacher", teacher]
        return nas("distill", tmp_path / "recipe.json", "--student", teacher, *named, *options, "--out", tmp_path / "out", "--json")

    return run


def test_a_teacher_that_comes_with_the_recipe_need_not_be_named(distilled: Callable[..., Answer], tiny_sources: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(tiny_sources["teacher"], tmp_path / "teacher")
    answer = distilled({"teacher": {"digest": check_teacher(tmp_path / "teacher").digest, "folder": "teacher"}}, tiny_sources["corpus"])
    assert json.loads(answer.out)["digests"]["teacher"] == check_teacher(tmp_path / "teacher").digest


def test_a_teacher_that_no_one_brings_is_asked_for(nas: Nas, tiny_sources: dict[str, Path], tmp_path: Path) -> None:
    options = ["--student", tiny_sources["teacher"], "--tokens", 512, "--learning-rate", 1e-3, "--corpus", tiny_sources["corpus"], "--out", tmp_path / "out"]
    answer = nas("distill", *options)
    assert answer.code == errors.WRONG_INPUT
    assert "--teacher: expected a folder or Hugging Face id: the recipe brings no teacher of its own, got nothing" in answer.err


def test_a_bundle_s_teacher_and_no_other_distils_it(distilled: Callable[..., Answer], tiny_sources: dict[str, Path], tmp_path: Path) -> None:
    answer = distilled({"teacher": {"name": "tiny", "digest": "0" * 64}}, tiny_sources["corpus"])
    assert (answer.code, answer.out) == (errors.WRONG_INPUT, "")
    assert f"teacher: expected the one that the student was cut out of, digest {'0' * 64}, got " in answer.err
    assert not (tmp_path / "out").exists()


def test_other_text_than_the_search_s_is_said_and_used(distilled: Callable[..., Answer], tiny_sources: dict[str, Path]) -> None:
    answer = distilled({"corpora": [{"name": "words", "digest": "0" * 64, "weight": 2.0}]}, tiny_sources["corpus"])
    assert (answer.code, json.loads(answer.out)["weights"]) == (0, [2.0])
    assert f"--corpus {tiny_sources['corpus']}: other text than the recipe's words; going on with it" in answer.err


@pytest.mark.parametrize(("num_given", "weights", "is_said"), [(2, [3.0, 1.0], False), (1, [1.0], True)])
def test_corpora_have_the_recipe_s_weights_where_there_are_as_many(
    distilled: Callable[..., Answer], tiny_sources: dict[str, Path], tmp_path: Path, num_given: int, weights: list[float], is_said: bool
) -> None:
    second = tmp_path / "second.jsonl"
    second.write_text("".join(tiny_sources["corpus"].read_text().splitlines(keepends=True)[:400]))
    answer = distilled({"corpora": [{"name": "a", "weight": 3.0}, {"name": "b", "weight": 1.0}]}, *[tiny_sources["corpus"], second][:num_given])
    assert (answer.code, json.loads(answer.out)["weights"]) == (0, weights)
    assert ("the recipe mixes a (weight 3), b (weight 1), got 1 corpora; each has weight 1 in this run" in answer.err) is is_said


def a_row(number: int, **changes: Any) -> dict[str, Any]:
    tasks = {name: {"value": 0.5, "standard_error": 0.01} for name in ("arc_easy", "hellaswag")}
    row = {"rank": 1, "tie_group": 1, "number": number, "origin": "anchor:width_only", "shape": SHAPE, "parameters": 4_512_342_016, "share_of_teacher": 0.56}
    return {**row, "tokens": 128_000_000, "score": 0.5, "standard_error": 0.01, "kl": 0.25, "tasks": tasks, "state": "completed", **changes}


def rendered(board: dict[str, Any], *, width: int) -> list[str]:
    console = Console(width=width)
    with console.capture() as captured:
        console.print(terminal.leaderboard_table(board, width=width))
    return captured.get().splitlines()


@pytest.mark.parametrize("width", [80, 100, 160])
def test_the_board_fits_the_terminal_and_cuts_no_cell(width: int) -> None:
    lines = rendered({"rows": [a_row(0), a_row(1, rank=None, score=None, standard_error=None, state="stopped", tasks={})]}, width=width)
    assert len(lines) == 3
    assert "…" not in "".join(lines)
    assert "4,512,342,016" in lines[1]
    assert "0.500 ± 0.010" in lines[1]


def test_the_board_has_the_costs_that_are_objectives_and_their_front() -> None:
    rows = [a_row(0, costs={"decode_ms:chat": 4.2324, "memory_bytes": 507264.0}), a_row(1, costs={"memory_bytes": 9.0}, tasks={})]
    console = Console(width=200)
    with console.capture() as captured:
        console.print(terminal.leaderboard_table({"rows": rows, "pareto": [0]}, objectives=("decode_ms:chat", "memory_bytes")))
    head, first, second = captured.get().splitlines()
    assert "decode_ms:chat  memory_bytes  front" in head
    assert first[head.index("decode_ms") : head.index("KL")].split() == ["4.23", "507,264", "yes"]
    assert second[head.index("decode_ms") : head.index("KL")].split() == ["9"]


def test_an_export_has_the_trials_of_every_budget_and_no_repeats(nas: Nas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Service:
        """A search with two budgets, a ranked trial in each, and a repeat of one."""

        def __enter__(self) -> Service:
            return self

        def __exit__(self, *_: object) -> None: ...

        def search(self, _: str) -> dict[str, Any]:
            return {"spec": {"objectives": [], "more_budgets": [{}]}}

        def trials(self, _: str) -> list[dict[str, Any]]:
            return [{"number": 0, "origin": "anchor:uniform"}, {"number": 1, "origin": "sampler"}, {"number": 2, "origin": "repeat:1"}]

        def trial(self, _: str, number: int) -> dict[str, Any]:
            kl = {"tokens": 10, "kl": {"value": 1.0}}
            return {"number": number, "origin": "sampler", "shape": SHAPE, "state": "completed", "rungs": [kl], "parameters": 9, "budget": number}

        def leaderboard(self, _: str, *, budget: int = 0) -> dict[str, Any]:
            return {"rows": [a_row(budget, score=0.5 + budget, verified=None, probability_best=None)]}

    monkeypatch.setattr("nas.cli.results.make_client", lambda _: Service())
    answer = nas("export-optuna", "srch_1", tmp_path / "study.journal")
    assert answer.code == 0
    study = optuna.load_study(study_name="srch_1", storage=JournalStorage(JournalFileBackend(str(tmp_path / "study.journal"))))
    assert [(trial.value, trial.user_attrs["budget"]) for trial in study.trials] == [(0.5, 0), (1.5, 1)]


def test_ties_the_winner_and_what_was_verified_are_marked() -> None:
    tied = {"difference": {"value": -0.01, "low": -0.05, "high": 0.03}, "verified": True, "probability_best": 0.25}
    best = {"difference": {"value": 0.0, "low": 0.0, "high": 0.0}, "verified": False}
    lines = rendered({"rows": [a_row(7, **best), a_row(8, **tied), a_row(9, rank=3, tie_group=2)], "winner": 8}, width=200)
    assert [line.split()[0] for line in lines[1:]] == ["1=", "1=", "3"]
    assert "7 ✗" in lines[1]
    assert "best" in lines[1]
    assert "8 * ✓" in lines[2]
    assert "-0.050 .. +0.030" in lines[2]
    assert "25%" in lines[2]


def test_the_facts_below_the_board_name_the_winner_its_probability_and_what_each_decision_cost() -> None:
    decision = {"decision": "rung 1", "trials": 6, "chosen": 2, "tokens": 12_000, "device_seconds": 34.5}
    board = {
        "rows": [a_row(8, probability_best=0.75)],
        "winner": 8,
        "finalists": [7, 8],
        "agreement": [{"first": "a", "second": "b", "tau": 0.5, "num_trials": 4}],
    }
    facts = terminal.board_facts({**board, "cost": {"distillation_tokens": 12_000, "device_seconds": 40.0, "decisions": [decision]}})
    assert facts["winner"] == "trial 8, the best of 2 finalists with probability 0.75"
    assert facts["rung 1"] == "6 measured, 2 chosen: 12,000 tokens, 34 device seconds"
    assert facts["a -> b"] == "Kendall tau 0.50 over 4 trials"


def test_the_facts_say_where_the_spread_between_seeds_comes_from_and_name_the_repeats() -> None:
    assumed = {"value": 0.01, "prior": 0.01, "measured": None, "of_blocks": None, "num_runs": 0}
    measured = {"value": 0.012, "prior": 0.01, "measured": 0.016, "of_blocks": 0.004, "num_runs": 3}
    repeat = {"number": 4, "seed": 8, "state": "completed", "rung": 1, "kl_by_rung": [3.0, 1.25], "score": 0.5}
    board = {"rows": [], "seed_spreads": [assumed, measured], "repeats": [repeat]}

    facts = terminal.board_facts(board)

    pooled = "the spec's 1% pooled with 3 runs of one shape, which differ by 1.6%, of which 0.4% by their blocks"
    assert facts["spread between seeds"] == f"1.2% of a KL: {pooled}"
    assert facts["repeat with seed 8"] == "trial 4, completed, not ranked: KL 3.0000, 1.2500"
    assert terminal.board_facts({**board, "seed_spreads": [assumed]})["spread between seeds"] == "1% of a KL, as the spec assumes"


def test_a_narrow_board_leaves_out_tasks_before_scores() -> None:
    narrow, wide = (rendered({"rows": [a_row(0)]}, width=width)[0].split() for width in (80, 200))
    assert wide[-4:] == ["KL", "arc_easy", "hellaswag", "state"]
    assert "score" in narrow
    assert not {"arc_easy", "hellaswag", "tokens"} & set(narrow)


@pytest.mark.parametrize(
    ("kind", "data", "expected"),
    [
        ("prepare.step", {"step": "depth", "done": 3, "of": 9}, "prepare: depth 3 of 9"),
        ("prepare.step", {"step": "sort"}, "prepare: sort"),
        ("trial.proposed", {"trial": 1, "origin": "sampler", "parameters": 1234}, "trial 1 proposed (sampler), 1,234 parameters"),
        ("trial.confirmed", {"trial": 1, "verified": False, "reason": "reload: ..."}, "trial 1 NOT verified: reload: ..."),
        ("search.failed", {"error": {"reason": "unavailable", "message": "gone"}}, "search failed: unavailable: gone"),
        (
            "attempt.lost",
            {"stage": "rung", "trial": 7, "rung": 1, "reason": "its controller is gone"},
            "attempt of rung 1 of trial 7 lost: its controller is gone",
        ),
        ("attempt.failed", {"stage": "prepare", "trial": None, "rung": None, "reason": "timeout: long"}, "attempt of prepare failed: timeout: long"),
        ("attempt.lost", {"stage": "rung", "trial": 7, "rung": 1, "reason": "paused"}, None),
        ("search.winner", {}, "winner chosen"),
        ("trial.retried", {"trial": 3, "failure": {"reason": "timeout"}}, "trial 3 is tried again"),
        ("search.updated", {"max_trials": 30, "labels": {"team": "edge"}}, "search changed: max_trials=30  labels=team=edge"),
        ("search.winner", {"trial": 3, "budget": 0}, "winner: trial 3"),
        ("search.winner", {"trial": 4, "budget": 1}, "winner of budget 1: trial 4"),
        (
            "search.confirming",
            {"reason": "space_exhausted", "legal_shapes": 3, "trials": 3},
            "search confirming: the space is exhausted, all 3 legal shapes have been tried",
        ),
        (
            "task.weak",
            {"task": "pairs", "teacher": 0.42, "random": 0.34, "z": 0.8186, "in_objective": False, "clear_forms": ["margin"]},
            "task pairs ranks nothing, left out of the objective: teacher 0.42, random weights 0.34, 0.82 standard errors; clear by margin",
        ),
        ("something.new", {}, None),
    ],
)
def test_an_event_is_one_line(kind: str, data: dict[str, Any], expected: str | None) -> None:
    line = terminal.event_line({"type": kind, "data": data, "created_at": "2026-01-01T12:34:56Z"})
    assert line == (expected and f"12:34:56  {expected}")


def test_the_status_line_says_where_a_search_stands() -> None:
    search = {
        "state": "searching",
        "progress": {"settled": 2, "planned": 5},
        "rungs": [{"rung": 0, "finished": 3, "running": 1}, {"rung": 1, "finished": 2, "running": 0}],
        "best": {"trial": 1, "score": 0.5, "standard_error": 0.1},
    }
    assert terminal.status_line(search) == "searching  2 of 5 trials settled  rung 0: 3+1  rung 1: 2  best: trial 1, score 0.500 ± 0.100"
    assert terminal.status_line(search | {"state": "queued", "waits_for": "srch_1"}).startswith("queued  waits for srch_1  2 of 5 trials settled")


def test_progress_without_a_terminal_is_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    with models._progress(tokens=300) as report:
        for tokens in (100, 200, 300):
            report(Progress(step=1, tokens=tokens, loss=1.5, learning_rate=0.1, tokens_per_second=50.0))
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["100 / 300 tokens  loss 1.5000  50 tokens/s  4 s left", "300 / 300 tokens  loss 1.5000  50 tokens/s  0 s left"]


def test_local_commands_never_change_the_schema_under_a_running_service(nas: Nas, tmp_path: Path) -> None:
    assert nas("teachers", "list").code == 0  # a new database gets its schema
    assert nas("migrate", "--check").code == 0
    with sqlite3.connect(tmp_path / "data" / "nas.db") as connection:
        connection.execute("UPDATE nas_alembic_version SET version_num = '0001'")
    for command in (("teachers", "list"), ("migrate", "--check")):
        answer = nas(*command)
        assert answer.code == errors.CONFLICT
        assert "got 0001; back up the database, stop the service, and run `nas migrate`" in answer.err


def test_migrate_says_from_where_to_where(nas: Nas) -> None:
    assert "schema none -> 0" in nas("migrate").err
    assert "->" not in nas("migrate").err
