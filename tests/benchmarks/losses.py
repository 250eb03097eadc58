"""Peak memory of the loss and its way back at a vocabulary of 128,000: in chunks of tokens, against whole logits and F.kl_div. The same gradients.

    python -m tests.benchmarks losses

Each side runs in a fresh process; its peak is the largest resident set less what the process held before.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from nas.compress.losses import Head, logit_loss

GOAL = 0.25
VOCAB_SIZE, HIDDEN_SIZE = 128_000, 256
BATCHES = (1024, 2048)
"""Tokens of a step; the more, the smaller the ratio."""
MAX_APART = 1e-4
"""Between the two gradients, over the norm of one."""
console = Console(width=140)


def bench() -> bool:
    table = Table("tokens x vocabulary", "in chunks", "whole logits", "ratio", "goal", "gradients apart", box=None)
    holds = True
    for tokens in BATCHES:
        with tempfile.TemporaryDirectory() as folder:
            ours, plain = (_in_fresh_process(side, tokens=tokens, gradients=Path(folder) / f"{side}.safetensors") for side in ("chunks", "whole"))
            apart = _apart(*(load_file(Path(folder) / f"{side}.safetensors") for side in ("chunks", "whole")))
        holds = holds and ours / plain <= GOAL and apart < MAX_APART
        table.add_row(
            f"{tokens:,} x {VOCAB_SIZE:,}", f"{ours / 2**20:,.0f} MiB", f"{plain / 2**20:,.0f} MiB", f"{ours / plain:.2f}", f"<= {GOAL}", f"{apart:.0e}"
        )
    console.print(table)
    return holds


def _in_fresh_process(side: str, *, tokens: int, gradients: Path) -> int:
    command = [sys.executable, "-m", "tests.benchmarks.losses", side, str(tokens), str(gradients)]
    return int(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["peak_bytes"])


def _apart(ours: dict[str, Tensor], plain: dict[str, Tensor]) -> float:
    return max(float((ours[name] - plain[name]).norm() / plain[name].norm()) for name in plain)


def _measure(side: str, *, tokens: int, gradients: Path) -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    hidden_ND, teacher_ND = (torch.randn(tokens, HIDDEN_SIZE, generator=generator) for _ in range(2))
    weight_VD, teacher_VD = (torch.randn(VOCAB_SIZE, HIDDEN_SIZE, generator=generator) * 0.05 for _ in range(2))
    hidden_ND.requires_grad_()
    weight_VD.requires_grad_()
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    before = _status("VmRSS")
    if side == "chunks":
        loss = logit_loss(hidden_ND, Head(weight_VD=weight_VD), teacher_hidden_ND=teacher_ND, teacher_head=Head(weight_VD=teacher_VD))
    else:
        target_NV = torch.log_softmax(teacher_ND @ teacher_VD.t(), dim=-1)
        loss = functional.kl_div(torch.log_softmax(hidden_ND @ weight_VD.t(), dim=-1), target_NV, log_target=True, reduction="sum") / tokens
        del target_NV
    loss.backward()  # type: ignore[no-untyped-call]
    peak = _status("VmHWM") - before
    assert hidden_ND.grad is not None
    assert weight_VD.grad is not None
    save_file({"hidden": hidden_ND.grad, "head": weight_VD.grad}, gradients)
    print(json.dumps({"peak_bytes": peak}))


def _status(field: str) -> int:
    """Bytes of a line of this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) * 1024


if __name__ == "__main__":
    _measure(sys.argv[1], tokens=int(sys.argv[2]), gradients=Path(sys.argv[3]))
