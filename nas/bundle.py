"""The winner's bundle: one folder, and a tar of it, with all that is needed to load, to check and to go on.

config.json, model.safetensors, tokenizer   the briefly distilled student; `from_pretrained` loads the folder
pruned/                                     the same shape cut out of the teacher, untrained
teacher/                                    the corrected teacher, where the search corrected it: a full run is taught by no other
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
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nas.compress.correction import Correction, load_correction
from nas.compress.reconstruction import kept_of, load_reconstruction, rebuild_student
from nas.compress.second_moments import load_moments
from nas.compress.sorting import load_sorting
from nas.compress.teacher import check_teacher, write_checkpoint
from nas.cost import count_parameters
from nas.files import check_may_publish, temporary_for, whole_file, write_json
from nas.recipe import Recipe, full_recipe
from nas.search.layout import BUNDLE, CORRECTED, MOMENTS, RECONSTRUCTION, SORTED, STUDENT
from nas.shape import Shape
from nas.spec import SearchSpec

TAR = "bundle.tar"
PACKAGES = ("torch", "transformers", "lm-eval", "optuna", "ray", "safetensors", "nas")


def write_bundle(request: Mapping[str, Any], *, spec: SearchSpec) -> dict[str, Any]:
    """Write the bundle of a confirmed trial; the previous one of the same search is replaced when it is whole.

    Returns:
        the search's winner: trial, shape, parameters, scores, provenance, places and digest of the tar, and what it is as a teacher (`nas/chain.py`).
    """
    parent = Path(request["bundle_folder"])
    parent.mkdir(parents=True, exist_ok=True)
    for unfinished in parent.glob(f".{BUNDLE}.*"):  # of processes that were killed, or replaced
        shutil.rmtree(unfinished, ignore_errors=True) if unfinished.is_dir() else unfinished.unlink(missing_ok=True)
    folder = temporary_for(parent / BUNDLE)
    shape = Shape.from_dict(request["shape"])
    sorting = load_sorting(Path(request["prepared"]) / SORTED)
    shutil.copytree(Path(request["trial_folder"]) / STUDENT, folder)
    reconstruction = load_reconstruction(Path(request["trial_folder"]) / RECONSTRUCTION)
    moments = load_moments(Path(request["prepared"]) / MOMENTS) if spec.compression.reconstruction else None
    pruned = rebuild_student(sorting, shape, moments=moments, result=reconstruction, dtype="float32", device="cpu")
    write_checkpoint(pruned.state_dict(), config=pruned.config.to_dict(), tokenizer_from=sorting.folder, folder=folder / "pruned")
    correction = _copy_corrected(Path(request["prepared"]) / CORRECTED, target=folder / CORRECTED) if spec.compression.teacher_correction_tokens else None
    provenance = _provenance(request, spec=spec, correction=correction)
    scores = {"search": _without_documents(request["result"]), "confirmation": _without_documents(request["confirmation"])}
    write_json(shape.as_dict(), target=folder / "shape.json")
    write_json(kept_of(sorting, shape, result=reconstruction), target=folder / "kept_indices.json")
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
    check_may_publish(final)
    shutil.rmtree(final, ignore_errors=True)
    folder.replace(final)
    digest = write_tar(final, tar=tar, name=BUNDLE)
    as_teacher = check_teacher(final)
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
        "as_teacher": {"digest": as_teacher.digest, "config": as_teacher.config, "files": list(as_teacher.files)},
    }


def _copy_corrected(source: Path, *, target: Path) -> Correction:
    correction = load_correction(source)
    shutil.copytree(source, target)
    return correction


def _provenance(request: Mapping[str, Any], *, spec: SearchSpec, correction: Correction | None) -> dict[str, Any]:
    inputs = request["inputs"]
    return {
        "search_id": request["search_id"],
        "trial": request["trial"],
        "seed": spec.seed,
        "teacher": {name: inputs["teacher"][name] for name in ("name", "digest")},
        "correction": None if correction is None else asdict(correction),
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
    recipe = full_recipe(spec)
    return {
        "student": ".",
        "teacher": _recipe_teacher(provenance),
        "corpora": [{**corpus, "weight": part.weight} for part, corpus in zip(spec.corpus.parts, provenance["corpora"], strict=True)],
        "distillation": {name: getattr(recipe, name) for name in Recipe.__slots__},
    }


def _recipe_teacher(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The teacher of the full run: a corrected one comes with the bundle."""
    correction = provenance["correction"]
    return {**provenance["teacher"], **({} if correction is None else {"digest": correction["digest"], "folder": CORRECTED})}


def _card(*, shape: Shape, parameters: int, teacher: int, scores: Mapping[str, Any], provenance: Mapping[str, Any], board: Any) -> str:
    """The model card: what it is, how good it was measured to be, and what it is not."""
    name = provenance["teacher"]["name"]
    taught = (board or {}).get("cost", {}).get("tokens")
    chosen = f" by a search that distilled {taught:,} tokens in all" if taught else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [pruned, distilled, nas]
---

# {name}, compressed to {parameters:,} parameters ({parameters / teacher:.1%} of the teacher)

Cut out of `{name}` ({teacher:,} parameters, digest `{provenance["teacher"]["digest"][:16]}`{_corrected(provenance)}) by importance, then distilled from it for
{scores["search"]["tokens"]:,} tokens (forward KL on the logits). This shape was chosen{chosen} (search `{provenance["search_id"]}`,
trial {provenance["trial"]}, seed {provenance["seed"]}). It is the start of a full distillation, not its end:

    nas distill FOLDER {"" if provenance["correction"] else "--teacher TEACHER "}--corpus CORPUS --out RESULT

with this folder as FOLDER; `recipe.json` says how. The folder itself loads with `AutoModelForCausalLM.from_pretrained`, and a fresh process
reproduced the trained model's logits. `pruned/` holds the same shape before any distillation.

## Shape

| | |
|---|---|
{chr(10).join(f"| {field} | {value} |" for field, value in shape.as_dict().items())}

## Measured

On text and documents that the search did not use, with lm-eval {provenance["versions"].get("lm-eval")}; ± one standard error.

{_measured(scores["confirmation"]["held_out"], teacher=((board or {}).get("teacher") or {}).get("held_out"))}

## Limits

Licence and limits of use are the teacher's. What was removed from it was chosen on {_names(provenance["corpora"])} and measured on
{_names(provenance["tasks"])}; other uses were not looked at.
"""


def _corrected(provenance: Mapping[str, Any]) -> str:
    correction = provenance["correction"]
    if correction is None:
        return ""
    losses = f"{correction['loss_before']:.3f} to {correction['loss_after']:.3f}"
    return f", first trained on the corpus for {correction['tokens']:,} tokens: loss {losses} nats per token; in `{CORRECTED}/`"


def _measured(student: Mapping[str, Any], *, teacher: Mapping[str, Any] | None) -> str:
    """A table of the held-out metrics, the teacher's beside them where they are known."""
    rows = [("KL to the teacher (nats per token)", "kl"), ("loss (nats per token)", "loss"), *((name, name) for name in student["tasks"])]
    lines = ["| | this model | teacher |", "|---|---|---|"] if teacher else ["| | this model |", "|---|---|"]
    for title, key in rows:
        cells = [_with_error(model["tasks"][key] if key in model["tasks"] else model[key]) for model in (student, teacher) if model]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _with_error(metric: Mapping[str, Any]) -> str:
    return f"{metric['value']:.4f} ± {metric['standard_error']:.4f}"


def _names(entries: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"`{entry['name']}`" for entry in entries)


def write_tar(folder: Path, *, tar: Path, name: str) -> str:
    """A tar of a folder, below `name`, with no times, owners and modes in it, so that equal content has equal digests; returns its SHA-256."""

    def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.mtime = entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        entry.mode = 0o755 if entry.isdir() else 0o644  # the umask of the machine says nothing about the bundle
        return entry

    with whole_file(tar) as temporary, tarfile.open(temporary, "w") as archive:  # closed before it is published
        for path in sorted(folder.rglob("*")):
            archive.add(path, arcname=str(Path(name) / path.relative_to(folder)), recursive=False, filter=plain)
    with tar.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_tar(tar: Path, *, folder: Path) -> None:
    """Unpack what `write_tar` packed into a folder that is made for it; nothing is written outside of it."""
    folder.mkdir()
    with tarfile.open(tar) as archive:
        archive.extractall(folder, filter="data")


def _without_documents(value: Any) -> Any:
    """Plain JSON without the per-document lists."""
    if isinstance(value, Mapping):
        return {name: _without_documents(item) for name, item in value.items() if name not in ("documents", "details")}
    return value
