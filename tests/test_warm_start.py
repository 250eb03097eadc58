"""Which earlier searches may serve a new one, and what of theirs is an answer here. No compute."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nas.errors import InvalidSpec
from nas.settings import Settings
from nas.shape import Shape
from nas.spec import dump_spec, parse_spec
from nas.store.records import SearchRecord, SearchState, TrialState
from nas.store.store import Store
from nas.submission import check_submission
from nas.warm_start import Memory, recall
from tests.store.store_values import result

SHAPE = {"num_hidden_layers": 2, "hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
WORDS = {"parts": [{"name": "words"}], "sequence_length": 32, "calibration_tokens": 512, "validation_tokens": 512}


@pytest.fixture
def store(tmp_path: Any, register_tiny: Callable[..., None]) -> Iterator[Store]:
    settings = Settings.from_environment({"NAS_DATA": str(tmp_path)})
    store = Store.open(settings.database_url, migrate=True)
    register_tiny(store=store, settings=settings)
    yield store
    store.close()


@pytest.fixture
def submit(store: Store, tiny_spec: Callable[..., dict[str, Any]]) -> Callable[..., SearchRecord]:
    def run(**changes: Any) -> SearchRecord:
        spec = parse_spec(json.dumps(tiny_spec(**changes)))
        submission = check_submission(spec, store=store)
        return store.create_search(spec=dump_spec(spec), inputs=submission.inputs, plan=submission.plan, label="")

    return run


def end(store: Store, search: SearchRecord, *, tokens: tuple[int, ...] = (), origin: str = "sampler") -> str:
    """A search with one trial that has results at so many tokens, cancelled after them."""
    store.add_trial(search.id, number=0, origin=origin, shape=SHAPE, choices=None, parameters=1000, fence=None)
    for rung, count in enumerate(tokens):
        attempt = store.start_attempt(search.id, stage="rung", trial=0, rung=rung, fence=None)
        store.record_rung(
            attempt.id,
            search_id=search.id,
            trial=0,
            rung=rung,
            result=result(tokens=count) | {"rung": rung},
            trial_state=TrialState.WAITING,
            fence=None,
        )
    store.request_cancel(search.id)
    assert store.get_search(search.id).state is SearchState.CANCELLED
    return search.id


@pytest.mark.parametrize(
    ("changes", "expected", "got"),
    [
        ({"corpus": {**WORDS, "sequence_length": 16}}, "corpus.sequence_length 16, as in this search", "32 in"),
        ({"distillation": {"learning_rate": 1e-3, "batch_size": 4}}, "distillation.learning_rate 0.001, as in this search", "0.003 in"),
        ({"compression": {"depth": "contiguous"}}, "compression.depth contiguous, as in this search", "block_influence in"),
        ({"rungs": {"first_tokens": 3000, "factor": 3, "num_trained": 2}}, "rungs: a trained rung of one of these tokens: [3000, 9000]", "[2048, 4096] in"),
    ],
)
def test_a_search_under_other_conditions_is_refused_with_the_field_and_both_values(
    store: Store, submit: Callable[..., SearchRecord], changes: dict[str, Any], expected: str, got: str
) -> None:
    earlier = end(store, submit())

    with pytest.raises(InvalidSpec) as refused:
        submit(warm_start_from=[earlier], **changes)

    (problem,) = refused.value.problems
    assert problem.field == "warm_start_from.0"
    assert problem.expected.startswith(expected)
    assert problem.got.startswith(got)
    assert problem.got.endswith(earlier)


def test_a_search_that_is_unknown_or_has_not_ended_is_refused(store: Store, submit: Callable[..., SearchRecord]) -> None:
    running = submit().id

    with pytest.raises(InvalidSpec) as refused:
        submit(warm_start_from=["srch_unknown", running])

    unknown, unended = refused.value.problems
    assert (unknown.field, unknown.expected, unknown.got) == ("warm_start_from.0", "the id of a search", "srch_unknown")
    assert (unended.field, unended.got) == ("warm_start_from.1", "queued")


def test_the_tasks_and_what_only_changes_how_it_is_trained_may_differ(store: Store, submit: Callable[..., SearchRecord]) -> None:
    earlier = end(store, submit())

    submit(
        warm_start_from=[earlier],
        evaluation={"documents_per_task": 8, "latency_prompt_tokens": 8, "latency_new_tokens": 2},
        distillation={"learning_rate": 3e-3, "batch_size": 4, "micro_batch_size": 2},
        budget={"max_fraction": 0.5},
    )


def test_results_at_the_same_tokens_are_known_and_under_the_same_conditions_an_answer(store: Store, submit: Callable[..., SearchRecord]) -> None:
    earlier = end(store, submit(), tokens=(0, 2048))
    shape = Shape.from_dict(SHAPE)

    memory = recall(submit(warm_start_from=[earlier]), store=store)

    known = memory.answer(shape, tokens=2048)
    assert known is not None
    assert (known.search, known.trial, known.result.tokens, known.shape) == (earlier, 0, 2048, shape)
    assert len(known.result.kl.documents) == 2
    assert memory.answer(shape, tokens=4096) is None
    assert memory.answer(Shape.from_dict({**SHAPE, "intermediate_size": 16}), tokens=2048) is None


def test_a_repeat_is_of_no_seed_that_a_search_has_and_teaches_nothing(store: Store, submit: Callable[..., SearchRecord]) -> None:
    earlier = end(store, submit(), tokens=(0, 2048), origin="repeat:1")

    assert recall(submit(warm_start_from=[earlier]), store=store) == Memory()


@pytest.mark.parametrize(
    "changes", [{"seed": 1}, {"evaluation": {"documents_per_task": 8, "latency_prompt_tokens": 8, "latency_new_tokens": 2}}, {"resources": {"gpus": 1}}]
)
def test_under_another_seed_documents_or_device_a_result_teaches_but_answers_nothing(
    store: Store, submit: Callable[..., SearchRecord], changes: dict[str, Any]
) -> None:
    earlier = end(store, submit(), tokens=(0, 2048))

    memory = recall(submit(warm_start_from=[earlier], **changes), store=store)

    assert [known.trial for known in memory.at(2048)] == [0]
    assert memory.answer(Shape.from_dict(SHAPE), tokens=2048) is None


def test_without_earlier_searches_nothing_is_known(store: Store, submit: Callable[..., SearchRecord]) -> None:
    end(store, submit(), tokens=(0, 2048))

    assert recall(submit(), store=store) == Memory()
