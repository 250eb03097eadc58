"""A full distillation under the real controller: it comes to what `nas distill` comes to, whatever happens on the way."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import tarfile
from pathlib import Path
from typing import Any

import pytest

from nas.compress.corpus import check_corpus
from nas.distillations import check_distillation, parse_distillation
from nas.errors import Conflict, InvalidSpec, NotFound
from nas.full_run import distil_fully
from nas.recipe import Recipe
from nas.search.layout import BUNDLE
from nas.store.records import AttemptState, SearchRecord, SearchState
from nas.store.store import Store
from tests.workers.inline_service import Service, is_state, verified_loser
from workers.controller import Controller
from workers.executor import LocalExecutor
from workers.folders import MODEL, MODEL_TAR
from workers.outcome import Outcome
from workers.step import PROGRESS, Step

TOKENS = 4096
SHAPE = {"num_hidden_layers": 2, "hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


def submit(service: Service, search: SearchRecord, **asked: Any) -> str:
    body = {"search_id": search.id, "recipe": {"tokens": TOKENS, "validation_tokens": 256}, **asked}
    plan = check_distillation(parse_distillation(json.dumps(body)), store=service.store, settings=service.settings)
    return service.store.create_distillation(
        search_id=search.id, trial=plan.trial, spec=plan.spec, inputs=plan.inputs, tokens=plan.tokens, label="", project="default"
    ).id


def undisturbed(service: Service, search: SearchRecord, distillation: SearchRecord, *, out: Path) -> bytes:
    """The weights that `nas distill` makes of the same."""
    assert search.winner is not None
    inputs = search.inputs
    distil_fully(
        Recipe(**distillation.spec["recipe"]),
        student=(service.settings.data_folder / search.winner["bundle"]).with_name(BUNDLE),
        teacher=Path(inputs["teacher"]["path"]),
        corpora=[(check_corpus([Path(file) for file in corpus["files"]]), 1.0) for corpus in inputs["corpora"]],
        out=out,
        device="cpu",
    )
    return (out / "model.safetensors").read_bytes()


def weights(service: Service, distillation: SearchRecord) -> bytes:
    assert distillation.winner is not None
    path = service.settings.data_folder / distillation.winner["file"]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == distillation.winner["sha256"]
    with tarfile.open(path) as archive:
        file = archive.extractfile(f"{MODEL}/model.safetensors")
        assert file is not None
        return file.read()


def stop_early(step: Step) -> Outcome | None:
    """As a worker that trains for a while, leaves a checkpoint, and is killed."""
    from nas.compress.distillation import Stopped
    from workers.distil import distil_student

    if step.stage == "distil":
        asked = iter(range(10**6))
        with pytest.raises(Stopped):
            distil_student(step.request, device="cpu", report=lambda progress: None, should_stop=lambda: next(asked) >= 5)
        return Outcome(succeeded=False, reason="preempted", message="its node went away")
    return None


def test_a_winner_is_distilled_to_what_the_command_makes_of_it(found: tuple[Service, SearchRecord], tmp_path: Path) -> None:
    service, search = found

    done = service.run(submit(service, search))

    assert done.state is SearchState.SUCCEEDED, done.error
    assert done.winner is not None
    assert TOKENS <= done.winner["tokens"] < TOKENS + 128
    assert done.winner["held_out_after"]["kl"] < done.winner["held_out_before"]["kl"]
    assert weights(service, done) == undisturbed(service, search, done, out=tmp_path / "command")
    [attempt] = service.store.list_attempts(done.id)
    assert (attempt.stage, attempt.state, attempt.trial) == ("distil", AttemptState.SUCCEEDED, search.winner and search.winner["trial"])
    points = service.store.list_points(done.id, trial=done.spec["trial"])
    assert points[-1].tokens == done.winner["tokens"]
    types = [event.type for event in service.store.list_events(done.id)]
    assert types == [
        "distillation.created",
        "distillation.running",
        "attempt.started",
        "distillation.distilled",
        "attempt.succeeded",
        "distillation.succeeded",
    ]
    assert [path.name for path in service.folder(done.id).iterdir() if path.is_file() or any(path.iterdir())] == [MODEL_TAR]
    assert service.store.get_search(search.id).version == search.version


def test_a_worker_lost_in_the_middle_costs_nothing_but_time(found: tuple[Service, SearchRecord], tmp_path: Path) -> None:
    service, search = found
    distillation_id, lost = submit(service, search), iter((True, True))
    service.executor.before = lambda step: stop_early(step) if next(lost, False) else None

    done = service.run(distillation_id)

    states = [attempt.state for attempt in service.store.list_attempts(done.id)]
    assert (done.state, states) == (SearchState.SUCCEEDED, [AttemptState.LOST, AttemptState.LOST, AttemptState.SUCCEEDED])
    assert weights(service, done) == undisturbed(service, search, done, out=tmp_path / "command")


@pytest.mark.slow
def test_a_process_that_is_killed_is_replaced(found: tuple[Service, SearchRecord], tmp_path: Path) -> None:
    service, search = found
    distillation_id, executor = submit(service, search, recipe={"tokens": 16 * TOKENS, "validation_tokens": 256}), LocalExecutor()
    controller = Controller(store=service.store, executor=executor, settings=service.settings)
    killed: list[int] = []
    try:
        while not (done := service.store.get_search(distillation_id)).state.is_terminal:
            controller.tick(timeout_seconds=0.05)
            if not killed and service.store.list_points(distillation_id, trial=done.spec["trial"]):
                [attempt] = service.store.list_attempts(distillation_id)
                mailbox = service.folder(distillation_id) / "attempts" / attempt.id
                killed.append(json.loads((mailbox / PROGRESS).read_text(encoding="utf-8").splitlines()[0])["pid"])
                os.kill(killed[0], signal.SIGKILL)
    finally:
        executor.close()

    assert done.state is SearchState.SUCCEEDED, done.error
    assert [attempt.state for attempt in service.store.list_attempts(done.id)][-1] is AttemptState.SUCCEEDED
    assert len(service.store.list_attempts(done.id)) == 2
    assert weights(service, done) == undisturbed(service, search, done, out=tmp_path / "command")


def test_a_killed_controller_s_successor_goes_on(found: tuple[Service, SearchRecord]) -> None:
    service, search = found
    distillation_id = submit(service, search)
    service.run(distillation_id, until=lambda record: bool(service.store.list_attempts(record.id)))
    service.expire_lease()

    done = service.run(distillation_id)

    assert done.state is SearchState.SUCCEEDED
    assert [attempt.state for attempt in service.store.list_attempts(done.id)] == [AttemptState.LOST, AttemptState.SUCCEEDED]


def test_a_trial_that_is_no_winner_is_bundled_first(found: tuple[Service, SearchRecord]) -> None:
    service, search = found
    other = verified_loser(service.store, search)

    done = service.run(submit(service, search, trial=other))

    assert done.state is SearchState.SUCCEEDED, done.error
    assert weights(service, done)


def test_a_cancelled_distillation_ends_and_leaves_no_files(found: tuple[Service, SearchRecord]) -> None:
    service, search = found
    distillation_id = submit(service, search)
    service.run(distillation_id, until=is_state(SearchState.RUNNING))
    service.store.request_cancel(distillation_id)
    service.expire_lease()

    done = service.run(distillation_id)

    assert (done.state, done.winner) == (SearchState.CANCELLED, None)
    assert not (service.folder(distillation_id) / MODEL).exists()


@pytest.mark.parametrize("reason", ["error", "disk_full"])
def test_a_distillation_fails_after_as_many_tries_as_it_may(found: tuple[Service, SearchRecord], reason: str) -> None:
    service, search = found
    service.executor.before = lambda step: Outcome(succeeded=False, reason=reason, message="so it is") if step.stage == "distil" else None

    done = service.run(submit(service, search, limits={"max_attempts": 2}))

    assert (done.state, done.error) == (SearchState.FAILED, {"reason": reason, "message": "so it is"})
    assert len(service.store.list_attempts(done.id)) == 2


def test_a_result_that_cannot_be_is_not_kept(found: tuple[Service, SearchRecord]) -> None:
    service, search = found
    lie = {"tokens": 1, "held_out_before": {"kl": 1.0}, "held_out_after": {"kl": 0.5}, "file": "/etc/passwd", "sha256": "a" * 64}
    service.executor.before = lambda step: Outcome(succeeded=True, result=lie) if step.stage == "distil" else None

    done = service.run(submit(service, search, limits={"max_attempts": 1}))

    assert (done.state, done.winner) == (SearchState.FAILED, None)
    assert done.error is not None
    assert (done.error["reason"], done.error["message"]) == ("invalid_result", "tokens: expected 4096, got 1")


def test_text_that_was_changed_since_the_search_is_refused(found: tuple[Service, SearchRecord]) -> None:
    service, search = found
    distillation_id = submit(service, search)

    def tamper(step: Step) -> None:
        step.request["inputs"]["corpora"][0]["digest"] = "0" * 64

    service.executor.before = tamper

    done = service.run(distillation_id)

    assert done.error is not None
    assert done.error["reason"] == "unavailable"
    assert "expected the digest 000" in done.error["message"]


def test_a_search_stays_as_long_as_its_student_is_distilled(finished: tuple[Service, SearchRecord]) -> None:
    service, search = finished
    distillation_id = submit(service, search)

    with pytest.raises(Conflict, match=f"search {search.id}: expected one of which nothing is distilled, got one whose student {distillation_id} distils"):
        service.store.delete_search(search.id)
    service.store.request_cancel(distillation_id)
    service.store.delete_search(search.id)

    assert service.store.get_distillation(distillation_id).state is SearchState.CANCELLED
    service.store.delete_search(distillation_id)
    with pytest.raises(NotFound, match="distillation: expected the id of one"):
        service.store.get_distillation(distillation_id)


def test_searches_and_distillations_are_listed_apart(finished: tuple[Service, SearchRecord]) -> None:
    service, search = finished
    distillation_id = submit(service, search)
    store = service.store

    assert [one.id for one in store.list_searches()] == [search.id] == [one.id for one in store.latest_searches(project="default", limit=9)]
    assert [one.id for one in store.list_distillations(project="default", search_id=search.id)] == [distillation_id]
    assert store.list_distillations(project="default", search_id="srch_0") == store.list_distillations(project="other") == []
    assert store.list_distillations(project="default", state=SearchState.FAILED) == []
    with pytest.raises(NotFound):
        store.get_distillation(search.id)
    with pytest.raises(NotFound):
        store.get_distillation(distillation_id, project="other")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"trial": 99}, "trial: expected the number of a trial of search srch_.*, got 99"),
        ({"budget": 3}, r"budget: expected one that has a winner \(0\), got 3"),
        ({"recipe": {"sequence_length": 128}}, "recipe.sequence_length: expected at most the teacher's context of 64, got 128"),
        ({"recipe": {"validation_tokens": 32}}, "recipe.validation_tokens: expected at least two blocks"),
        ({"recipe": {"tokens": 0}}, "recipe.tokens: expected greater than or equal to 1, got 0"),
        ({"resources": {"gpus": 2}}, "resources.gpus: expected less than or equal to 1, got 2"),
        ({"trial": 1, "budget": 1}, "either a trial, or the budget"),
        ({"search_id": "srch_0"}, "search_id: expected the id of a search of this project, got srch_0"),
    ],
)
def test_what_cannot_be_run_is_told_field_by_field(finished: tuple[Service, SearchRecord], asked: dict[str, Any], message: str) -> None:
    service, search = finished

    with pytest.raises(InvalidSpec, match=message):
        submit(service, search, **asked)


@pytest.fixture
def finished(service: Service) -> tuple[Service, SearchRecord]:
    """A search that says it has succeeded, without its work."""
    search_id = service.submit()
    service.store.add_trial(search_id, number=0, origin="sampler", shape=SHAPE, choices=None, parameters=1, fence=None)
    service.store.save_winner(search_id, {"trial": 0}, fence=None)
    open_states = [state for state in SearchState if not state.is_terminal]
    return service, service.store.change_search(search_id, to=SearchState.SUCCEEDED, expected=open_states, fence=None)


def test_only_what_has_succeeded_is_distilled(service: Service) -> None:
    search = service.store.get_search(service.submit())

    with pytest.raises(Conflict, match="expected the state succeeded, got queued"):
        submit(service, search)


def test_a_day_s_tokens_are_charged(finished: tuple[Service, SearchRecord]) -> None:
    service, search = finished
    before = usage(service.store)

    submit(service, search)

    assert usage(service.store) == before + TOKENS


def usage(store: Store) -> int:
    return store.get_project("default")[1].tokens_today
