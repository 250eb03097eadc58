"""The one step of a full distillation: `nas distill` on the student of a search, in a folder from which every attempt goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nas.bundle import write_bundle, write_tar
from nas.compress.corpus import Corpus, check_corpus
from nas.compress.distillation import Progress
from nas.errors import CorpusUnavailable
from nas.full_run import distil_fully
from nas.recipe import Recipe, RecipeInputs
from nas.search.layout import BUNDLE
from nas.spec import parse_spec
from workers.folders import MODEL, MODEL_TAR, OWN_BUNDLE


def distil_student(request: Mapping[str, Any], *, device: str, report: Callable[[Progress], None], should_stop: Callable[[], bool]) -> dict[str, Any]:
    """Distil the student, and pack what came out as one tar file.

    Args:
        request: `folder`, the distillation's own; `student`, the folder of its bundle, or `bundle`, from which that is written first; `recipe`; `inputs`.
    Returns:
        tokens, seconds, held_out_before, held_out_after; file, sha256 and bytes of the tar.
    Raises:
        CorpusUnavailable: a corpus is not what it was when the search was submitted. All that `distil_fully` raises.
    """
    folder = Path(request["folder"])
    student = _bundled(request["bundle"], folder=folder / OWN_BUNDLE) if request["bundle"] else Path(request["student"])
    written = RecipeInputs.read(student / "recipe.json")
    corpora = [_open_corpus(corpus) for corpus in request["inputs"]["corpora"]]
    summary = distil_fully(
        Recipe(**request["recipe"]),
        student=student,
        teacher=written.teacher_folder or Path(request["inputs"]["teacher"]["path"]),
        corpora=[(corpus, part.weight) for corpus, part in zip(corpora, written.corpora, strict=True)],
        out=folder / MODEL,
        device=device,
        expected_teacher=written.teacher,
        report=report,
        should_stop=should_stop,
    )
    tar = folder / MODEL_TAR
    sha256 = write_tar(folder / MODEL, tar=tar, name=MODEL)
    told = {name: summary[name] for name in ("tokens", "seconds", "held_out_before", "held_out_after")}
    return {**told, "file": str(tar), "sha256": sha256, "bytes": tar.stat().st_size}


def _bundled(request: Mapping[str, Any], *, folder: Path) -> Path:
    """The bundle of a student that is no winner; written once, by whichever attempt comes first."""
    if not (folder / BUNDLE).is_dir():
        write_bundle({**request, "bundle_folder": str(folder)}, spec=parse_spec(json.dumps(request["spec"])))
    return folder / BUNDLE


def _open_corpus(registered: Mapping[str, Any]) -> Corpus:
    corpus = check_corpus([Path(file) for file in registered["files"]])
    if corpus.digest != registered["digest"]:
        raise CorpusUnavailable(f"corpus {registered['name']}: expected the digest {registered['digest']}, as registered, got {corpus.digest}")
    return corpus
