"""The OpenAPI document beyond what FastAPI derives: the spec's own schema as request body, examples, and problems as error answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import TypeAdapter

from api.auth import is_public, needed_scope
from api.problems import MEDIA_TYPE, PROBLEM_TYPES
from api.schemas.common import ProblemAnswer
from api.schemas.results import WinnerAnswer
from api.schemas.searches import UPDATE_ADAPTER
from nas.distillations import ADAPTER
from nas.spec import SPEC_ADAPTER

_REFERENCE = "#/components/schemas/{model}"

DESCRIPTION = """Choose the compressed shape of a language model: prune a teacher to many shapes under a budget, distil each one briefly,
score them with lm-eval, and rank them with their standard errors.

Every error is an RFC 9457 problem (`application/problem+json`) that names the field, what was expected and what came.
Times are RFC 3339 in UTC, numbers are finite, lists are objects with a cursor."""

_HEADERS = {
    "ETag": "The version of what is answered, for If-None-Match and If-Match.",
    "Idempotency-Replayed": "`true` where the key came before: nothing was done again.",
    "Location": "Where it is.",
    "Retry-After": "Seconds after which to try again, where waiting helps.",
}

TAGS = [
    {"name": "registry", "description": "What the operator has registered: teachers, corpora, lm-eval tasks."},
    {"name": "searches", "description": "Submit, follow and cancel searches."},
    {"name": "trials", "description": "The shapes that a search evaluates."},
    {"name": "results", "description": "The leaderboard and the winner."},
    {"name": "distillations", "description": "Full distillations of the students that searches found."},
    {"name": "events", "description": "What happened, as a list or as a stream."},
    {"name": "service", "description": "Is the service well, and who asks?"},
]

SUBMIT_EXAMPLES: dict[str, dict[str, Any]] = {
    "small": {
        "summary": "The least that a search needs",
        "value": {
            "teacher": "stories260k",
            "corpus": {"parts": [{"name": "tinystories"}], "sequence_length": 256},
            "tasks": [{"name": "tinystories_minpairs"}],
            "budget": {"max_fraction": 0.6},
        },
    },
    "full": {
        "summary": "A mixture, weighted tasks, ranges, a shape of one's own, and controls",
        "value": {
            "label": "8B to 4B, first try",
            "teacher": "llama-3.1-8b",
            "corpus": {
                "parts": [{"name": "web", "weight": 3.0}, {"name": "code", "weight": 1.0}],
                "sequence_length": 4096,
                "calibration_tokens": 4194304,
                "validation_tokens": 1048576,
            },
            "tasks": [{"name": "hellaswag", "metric": "acc_norm", "weight": 2.0}, {"name": "arc_easy", "num_fewshot": 5}],
            "budget": {"max_parameters": 4500000000, "min_use": 0.95},
            "space": {"num_hidden_layers": {"min": 16, "max": 32}, "hidden_size": {"min": 2048, "multiple": 256}},
            "shapes": [
                {
                    "num_hidden_layers": 32,
                    "hidden_size": 3072,
                    "intermediate_size": 9216,
                    "num_attention_heads": 32,
                    "num_key_value_heads": 8,
                    "head_dim": 128,
                }
            ],
            "sampler": {"name": "auto", "max_trials": 48},
            "controls": {"anchors": True, "num_random": 4},
            "rungs": {"first_tokens": 50000000, "factor": 4, "num_trained": 3},
            "distillation": {"batch_size": 64, "micro_batch_size": 4, "dtype": "bfloat16"},
            "resources": {"cpus": 8, "gpus": 1, "max_parallel_trials": 8},
            "seed": 1,
        },
    },
    "minitron": {
        "summary": "As published (arXiv 2407.14679): every shape within 5 % of the budget, to the same tokens",
        "value": {
            "preset": "minitron",
            "teacher": "llama-3.1-8b",
            "corpus": {"parts": [{"name": "web"}], "sequence_length": 4096},
            "tasks": [{"name": "hellaswag"}],
            "budget": {"max_parameters": 4500000000},
            "space": {"hidden_size": {"multiple": 1024}, "intermediate_size": {"multiple": 1024}},
        },
    },
}

UPDATE_EXAMPLES: dict[str, dict[str, Any]] = {
    "extend": {"summary": "More shapes, more of them at once", "value": {"max_trials": 96, "max_parallel_trials": 16}},
    "label": {"summary": "Other labels, in place of those that were there", "value": {"labels": {"team": "edge", "release": "2027-01"}}},
}

SUBMIT_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": _REFERENCE.format(model="SearchSpec")}, "examples": SUBMIT_EXAMPLES}},
    }
}


UPDATE_BODY: dict[str, Any] = {
    "parameters": [
        {
            "name": "If-Match",
            "in": "header",
            "required": True,
            "description": "The ETag of the version that was decided on; `*` is whichever is there.",
            "schema": {"type": "string", "pattern": r'^(\*|"[0-9]{1,18}")$'},
            "examples": {"version": {"value": '"42"'}, "any": {"value": "*"}},
        }
    ],
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": _REFERENCE.format(model="SearchUpdate")}, "examples": UPDATE_EXAMPLES}},
    },
}


DISTIL_EXAMPLES: dict[str, dict[str, Any]] = {
    "winner": {"summary": "The winner, as its bundle says", "value": {"search_id": "srch_18a3f0"}},
    "trial": {
        "summary": "Another verified trial, on a GPU, for more tokens",
        "value": {"search_id": "srch_18a3f0", "trial": 7, "recipe": {"tokens": 2000000000, "learning_rate": 0.0001}, "resources": {"cpus": 8, "gpus": 1}},
    },
}

DISTIL_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": _REFERENCE.format(model="DistillationRequest")}, "examples": DISTIL_EXAMPLES}},
    }
}


def not_modified_answer() -> dict[int | str, dict[str, Any]]:
    """The answer to who has the present version."""
    return {304: {"description": "Unchanged: If-None-Match names the present version."}}


def winner_answers() -> dict[int | str, dict[str, Any]]:
    """The other forms in which the winner comes."""
    winner = {"$ref": _REFERENCE.format(model="WinnerAnswer")}
    config = {"type": "object", "title": "config.json", "description": "With format=hf-config: what transformers loads."}
    content = {"application/json": {"schema": {"anyOf": [winner, config]}}, "application/yaml": {"schema": winner}}
    return {200: {"description": "The winner, or its config alone.", "content": content}}


def file_answers() -> dict[int | str, dict[str, Any]]:
    """A file, whole or in part. Its ETag is its SHA-256."""
    content = {"application/x-tar": {"schema": {"type": "string", "format": "binary"}}}
    return {
        200: {"description": "A tar file; the ETag is its SHA-256.", "content": content},
        206: {"description": "The range that was asked for.", "content": content},
        304: {"description": "Unchanged: If-None-Match names this file."},
        **problems(416),
    }


def answer_headers(*names: str) -> dict[str, Any]:
    """Headers that an answer has, for its `responses`."""
    return {name: {"description": _HEADERS[name], "schema": {"type": "string"}} for name in names}


def made_answer() -> dict[int | str, dict[str, Any]]:
    """What was made, and where it is."""
    return {201: {"description": "It is queued.", "headers": answer_headers("Location", "ETag", "Idempotency-Replayed")}}


def accepted_answer() -> dict[int | str, dict[str, Any]]:
    """A wish that was written down."""
    return {202: {"description": "It is written down; the search's controller sees to it.", "headers": answer_headers("Idempotency-Replayed")}}


def versioned_answer() -> dict[int | str, dict[str, Any]]:
    """An answer with a version, and the one to who has it."""
    return {200: {"description": "As it is now.", "headers": answer_headers("ETag")}, **not_modified_answer()}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The error answers of a route, for its `responses`."""
    answers: dict[int | str, dict[str, Any]] = {}
    for status in statuses:
        kinds = [kind for kind in PROBLEM_TYPES.values() if kind.status == status]
        answers[status] = {
            "description": " ".join(f"`{kind.code}`: {kind.meaning}" for kind in kinds),
            **({"headers": answer_headers("Retry-After")} if status in (429, 503) else {}),
            "content": {MEDIA_TYPE: {"schema": {"$ref": _REFERENCE.format(model="ProblemAnswer")}}},
        }
    return answers


def event_stream_answer() -> dict[int | str, dict[str, Any]]:
    """Server-sent events: the fields of each frame."""
    text = {"type": "string"}
    frame = {"type": "object", "properties": {"data": text, "event": text, "id": text, "retry": {"type": "integer", "minimum": 0}}}
    return {200: {"content": {"text/event-stream": {"itemSchema": frame}}}}


def leaderboard_answers() -> dict[int | str, dict[str, Any]]:
    """The other forms in which the leaderboard comes."""
    text = {"schema": {"type": "string"}}
    return {
        200: {"description": "A page of the board, or all of its rows.", "content": {"text/csv": text, "application/x-ndjson": text}},
        304: {"description": "Unchanged: If-None-Match names this version of the board."},
    }


def openapi_of(app: FastAPI) -> Callable[[], dict[str, Any]]:
    """The function that FastAPI calls for the document: its own, with the schemas of the spec and of problems added. Built once."""

    def build() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(
                title=app.title, version=app.version, summary=app.summary, description=app.description, routes=app.routes, tags=app.openapi_tags
            )
            schemas = document["components"]["schemas"]
            bodies: dict[str, TypeAdapter[Any]] = {"SearchSpec": SPEC_ADAPTER, "SearchUpdate": UPDATE_ADAPTER, "DistillationRequest": ADAPTER}
            bodies |= {model.__name__: TypeAdapter(model) for model in (ProblemAnswer, WinnerAnswer)}
            for name, schema in ((name, adapter.json_schema(ref_template=_REFERENCE)) for name, adapter in bodies.items()):
                nested = schema.pop("$defs", {})
                for key, value in {**nested, name: schema}.items():
                    schemas.setdefault(key, value)
            _drop_foreign_errors(document)
            _add_security(document)
            app.openapi_schema = document
        return app.openapi_schema

    return build


def _add_security(document: dict[str, Any]) -> None:
    """The API key, the scope that each operation needs, and what every one of them may answer (another host, a key, the store): routes know nothing of it."""
    document["components"]["securitySchemes"] = {
        "ApiKey": {"type": "http", "scheme": "bearer", "description": "A key of `nas keys create`. In single-user mode, on loopback, none is needed."}
    }
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            refusals = problems(400, 503) if is_public(path) else problems(400, 401, 403, 429, 503)
            if not is_public(path):
                scope = needed_scope(method.upper(), path)
                operation["security"] = [{"ApiKey": [scope] if scope else []}, {}]
            operation["responses"] = dict(sorted({**{str(status): answer for status, answer in refusals.items()}, **operation["responses"]}.items()))


def _drop_foreign_errors(document: dict[str, Any]) -> None:
    """FastAPI adds its own 422 to every route with a parameter; ours that can fail so have declared a problem in its place."""
    for methods in document["paths"].values():
        for operation in methods.values():
            if "application/json" in operation["responses"].get("422", {}).get("content", {}):
                del operation["responses"]["422"]
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)
