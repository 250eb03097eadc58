"""Teacher correction: the teacher itself trained on the corpus before it is pruned and distilled from.

A teacher that saw another distribution of text teaches it with errors that the student copies; Minitron's second paper found a short fine-tuning on the
distillation corpus, at a low rate, to mend that (arXiv:2408.11796, "Teacher Correction").

Shape suffixes: N blocks, T tokens.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from nas.compress.distillation import Progress, distil
from nas.compress.held_out import evaluate_kl
from nas.compress.objective import NextToken
from nas.compress.teacher import check_teacher, load_model, write_checkpoint
from nas.compress.train_plan import TrainPlan
from nas.compress.train_state import sound_checkpoint
from nas.errors import CorruptFile, NotFound, TeacherUnavailable
from nas.files import write_json

CORRECTION = "correction.json"
"""Beside the corrected teacher's files; last, so with it the folder is whole."""
RATE_SHARE = 0.2
"""Of the students' rate: Minitron corrects at a fifth of the peak rate of the pre-training (arXiv:2408.11796)."""
_WORK = ".training"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """What the correction of a teacher did."""

    digest: str
    """Of the corrected teacher's folder, as `check_teacher` says it."""
    original: str
    """Digest of the teacher that was corrected."""
    tokens: int
    learning_rate: float
    loss_before: float
    """Cross-entropy on the validation blocks, nats per token."""
    loss_after: float
    loss_standard_error: float
    """Of `loss_after`."""


def correct_teacher(
    source: Path,
    *,
    digest: str,
    config: Mapping[str, Any],
    train_NT: Tensor,
    validation_NT: Tensor,
    plan: TrainPlan,
    out: Path,
    device: str,
    report: Callable[[Progress], None],
    should_stop: Callable[[], bool],
) -> Correction:
    """Train the teacher of `source` by next-token loss and write it to `out`, in float32; a run that was killed goes on.

    Args:
        digest, config: of the teacher, as `check_teacher` gives them.
    Raises:
        Stopped: asked to; what was trained stays. Diverged: the loss is not finite.
    """
    work = out / _WORK
    model = load_model(source, dtype="float32", device=device)
    batch_size = plan.micro_batch_size or plan.batch_size
    before = evaluate_kl(model, teacher=None, blocks_NT=validation_NT, batch_size=batch_size)
    distil(model, objective=NextToken(), blocks_NT=train_NT, plan=plan, checkpoint=sound_checkpoint(work), report=report, should_stop=should_stop)
    after = evaluate_kl(model, teacher=None, blocks_NT=validation_NT, batch_size=batch_size)
    write_checkpoint(model.state_dict(), config=config, tokenizer_from=source, folder=out)
    correction = Correction(
        digest=check_teacher(out).digest,
        original=digest,
        tokens=plan.tokens,
        learning_rate=plan.learning_rate,
        loss_before=before.loss,
        loss_after=after.loss,
        loss_standard_error=after.loss_standard_error,
    )
    write_json(asdict(correction), target=out / CORRECTION)
    shutil.rmtree(work)
    logger.info("corrected the teacher: loss %.4f, was %.4f", after.loss, before.loss, extra={"action": "correct_teacher"})
    return correction


def load_correction(folder: Path) -> Correction:
    """What `correct_teacher` left, its files compared with their digest.

    Raises:
        NotFound: it was never finished. CorruptFile: a file is not the one that was written.
    """
    path = folder / CORRECTION
    if not path.exists():
        raise NotFound(f"{path}: no such file")
    try:
        correction = Correction(**json.loads(path.read_text(encoding="utf-8")))
        found = check_teacher(folder).digest
    except (ValueError, TypeError, TeacherUnavailable) as damaged:
        raise CorruptFile(f"{path}: expected the corrected teacher that it describes, got {damaged}") from damaged
    if found != correction.digest:
        raise CorruptFile(f"{folder}: expected the digest {correction.digest}, got {found}")
    return correction
