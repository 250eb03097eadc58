"""The winner's bundle: one folder, and a tar of it, with all that is needed to load, to check and to go on.

config.json, model.safetensors, tokenizer   the briefly distilled student; `from_pretrained` loads the folder
pruned/                                     the same shape cut out of the teacher, untrained
shape.json, kept_indices.json               what it is, and which rows and columns of the teacher it kept
spec.json, scores.json, provenance.json     the search, what was measured, digests, seeds and versions
recipe.json                                 `nas distill` takes it as it is
README.md                                   a model card
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nas.compress.manifest import write_json
from nas.compress.slicing import build_student, kept_indices
from nas.compress.sorting import load_sorting
from nas.compress.teacher import write_checkpoint
from nas.cost import count_parameters
from nas.full_run import Recipe
from nas.search.trial import SORTED, STUDENT
from nas.shape import Shape
from nas.spec import SearchSpec

BUNDLE, TAR = "bundle", "bundle.tar"
PACKAGES = ("torch", "transformers", "lm-eval", "optuna", "ray", "safetensors", "nas")
FULL_RUN_FACTOR = 10
"""The recipe's tokens in units of the last rung's: a start, not a law; Minitron's final runs take 50 times its short ones (94B, 1.8B)."""


def write_bundle(request: Mapping[str, Any], *, spec: SearchSpec) -> dict[str, Any]:
    """Write the bundle of a confirmed trial; the previous one of the same search is replaced when it is whole.

    Returns:
        the search's winner: trial, shape, parameters, scores, provenance, places and digest of the tar.
    """
    parent = Path(request["bundle_folder"])
    parent.mkdir(parents=True, exist_ok=True)
    folder = parent / f".{BUNDLE}"
    shutil.rmtree(folder, ignore_errors=True)
    shape = Shape.from_dict(request["shape"])
    sorting = load_sorting(Path(request["prepared"]) / SORTED)
    shutil.copytree(Path(request["trial_folder"]) / STUDENT, folder)
    pruned = build_student(sorting, shape, dtype="float32", device="cpu")
    write_checkpoint(pruned.state_dict(), config=pruned.config.to_dict(), tokenizer_from=sorting.folder, folder=folder / "pruned")
    provenance = _provenance(request, spec=spec)
    scores = {"search": _without_documents(request["result"]), "confirmation": _without_documents(request["confirmation"])}
    write_json(shape.as_dict(), target=folder / "shape.json")
    write_json(kept_indices(sorting, shape), target=folder / "kept_indices.json")
    write_json(request["spec"], target=folder / "spec.json")
    write_json(scores, target=folder / "scores.json")
    write_json(provenance, target=folder / "provenance.json")
    write_json(_recipe(spec, provenance=provenance), target=folder / "recipe.json")
    parameters = count_parameters(sorting.architecture, shape).total
    teacher = count_parameters(sorting.architecture, sorting.architecture.shape).total
    (folder / "README.md").write_text(
        _card(shape=shape, parameters=parameters, teacher=teacher, scores=scores, provenance=provenance, board=request["board"]), encoding="utf-8"
    )
    final, tar = parent / BUNDLE, parent / TAR
    shutil.rmtree(final, ignore_errors=True)
    folder.replace(final)
    digest = _write_tar(final, tar=tar)
    return {
        "trial": request["trial"],
        "shape": shape.as_dict(),
        "parameters": parameters,
        "share_of_teacher": parameters / teacher,
        "config": json.loads((final / "config.json").read_text(encoding="utf-8")),
        "scores": scores,
        "provenance": provenance,
        "bundle": str(tar),
        "bundle_sha256": digest,
        "bundle_bytes": tar.stat().st_size,
    }


def _provenance(request: Mapping[str, Any], *, spec: SearchSpec) -> dict[str, Any]:
    inputs = request["inputs"]
    return {
        "search_id": request["search_id"],
        "trial": request["trial"],
        "seed": spec.seed,
        "teacher": {name: inputs["teacher"][name] for name in ("name", "digest")},
        "corpora": [{name: corpus[name] for name in ("name", "digest")} for corpus in inputs["corpora"]],
        "tasks": [{name: task[name] for name in ("name", "digest")} for task in inputs["tasks"]],
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _recipe(spec: SearchSpec, *, provenance: Mapping[str, Any]) -> dict[str, Any]:
    short = spec.distillation
    recipe = Recipe(
        tokens=FULL_RUN_FACTOR * spec.rungs.tokens(spec.rungs.num_trained),
        learning_rate=short.learning_rate,
        batch_size=short.batch_size,
        sequence_length=spec.corpus.sequence_length,
        warmup_tokens=short.warmup_tokens,
        decay_share=short.decay_share,
        weight_decay=short.weight_decay,
        validation_tokens=spec.corpus.validation_tokens,
        micro_batch_size=short.micro_batch_size,
        dtype=short.dtype,
        seed=spec.seed + 1,  # another data order than the rungs'
    )
    return {
        "student": ".",
        "teacher": provenance["teacher"],
        "corpora": provenance["corpora"],
        "distillation": {name: getattr(recipe, name) for name in Recipe.__slots__},
    }


def _card(*, shape: Shape, parameters: int, teacher: int, scores: Mapping[str, Any], provenance: Mapping[str, Any], board: Any) -> str:
    """The model card: what it is, how good it was measured to be, and what it is not."""
    held_out = scores["confirmation"]["held_out"]
    rows = "\n".join(
        f"| {name} | {metric['value']:.4f} | {metric['standard_error']:.4f} |"
        for name, metric in [("loss (nats/token)", held_out["loss"]), *held_out["tasks"].items()]
    )
    numbers = "\n".join(f"| {name} | {value} |" for name, value in shape.as_dict().items())
    taught = (board or {}).get("cost", {}).get("tokens")
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [pruned, distilled, nas]
---

# {provenance["teacher"]["name"]}, compressed to {parameters:,} parameters ({parameters / teacher:.1%} of the teacher)

Cut out of `{provenance["teacher"]["name"]}` (digest `{provenance["teacher"]["digest"][:16]}`) by importance and distilled for
{scores["search"]["tokens"]:,} tokens (forward KL on the logits). It was chosen by a search that distilled {taught or 0:,} tokens in all
(search `{provenance["search_id"]}`, trial {provenance["trial"]}, seed {provenance["seed"]}). This is the start of a full distillation, not its end:
`nas distill recipe.json --teacher TEACHER --corpus CORPUS --out FOLDER` runs it.

| shape | |
|---|---|
{numbers}

Measured on documents that the search did not use (lm-eval {provenance["versions"].get("lm-eval")}):

| | value | standard error |
|---|---|---|
{rows}

The folder loads with `AutoModelForCausalLM.from_pretrained`; a fresh process reproduced the trained model's logits. `pruned/` holds
the same shape before any distillation. Licence and limits of use are the teacher's.
"""


def _write_tar(folder: Path, *, tar: Path) -> str:
    """A tar with no times and owners in it, so that equal bundles have equal digests."""

    def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.mtime = entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        return entry

    temporary = tar.with_suffix(".partial")
    with tarfile.open(temporary, "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.add(path, arcname=str(Path(BUNDLE) / path.relative_to(folder)), recursive=False, filter=plain)
    temporary.replace(tar)
    with tar.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _without_documents(value: Any) -> Any:
    """Plain JSON without the per-document lists."""
    if isinstance(value, Mapping):
        return {name: _without_documents(item) for name, item in value.items() if name not in ("documents", "details")}
    return value
