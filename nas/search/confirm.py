"""The confirm step: a finalist on documents that no rung saw, its file reloaded in a fresh process, its latency measured.

Verified or not ranked: parameters are counted from the saved file, and plain transformers in another process must give the
logits that the trained student gave. A public reproduction of Minitron-SSM spent its whole budget on candidates that had
silently not been pruned.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from nas.architecture import read_architecture
from nas.compress.manifest import load_tensors
from nas.compress.teacher import WEIGHTS_FILE, load_model, resolve_dtype
from nas.compress.untrusted import CONFIG_FILE
from nas.cost import count_parameters
from nas.deployability import deployability
from nas.errors import CorruptFile, TeacherUnavailable
from nas.evaluate.latency import measure_latency
from nas.search.layout import PROBE, STUDENT
from nas.search.shared import teacher_dtype
from nas.search.trial import Clock, measure
from nas.shape import Shape
from nas.spec import SearchSpec

MAX_LOGIT_DIFFERENCE = 1e-3
"""Between the trained student and its reloaded file, in float32 and for logits up to 10, in proportion above: they are equal but for the
order of sums, which another device changes."""
RELOAD_SECONDS = 600.0

# Nothing of ours: what this proves must hold for a user who has transformers and the folder.
_RELOAD = """
import json, sys
from safetensors.torch import load_file
import torch
from transformers import AutoModelForCausalLM
folder, probe = sys.argv[1:]
tensors = load_file(probe)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False, local_files_only=True).eval()
with torch.no_grad():
    difference = (model(tensors["tokens_BT"]).logits - tensors["logits_BTV"]).abs().max().item()
    largest = tensors["logits_BTV"].abs().max().item()
    model.generate(tensors["tokens_BT"][:, :8], max_new_tokens=4, do_sample=False)
print(json.dumps({"difference": difference, "largest": largest}))
"""


def confirm(
    spec: SearchSpec, *, inputs: Mapping[str, Any], prepared: Path, shape: Shape, folder: Path, device: str, with_reload: bool = True
) -> dict[str, Any]:
    """Check and measure the model that the last rung left in the trial's folder.

    Args:
        with_reload: False for a control, which never wins: its file is counted, but not loaded in a fresh process.
    Returns:
        verified (bool) and why not (reason), whether a fresh process reloaded it, parameters counted from the file, held-out result, latency, where
        the shape can be served by rule, and wall seconds by step.
    Raises:
        CorruptFile: the student is not what it claims to be, so much so that it cannot be measured.
    """
    student = folder / STUDENT
    seconds: dict[str, float] = {}
    clock = Clock(seconds)
    reason, parameters = verify(student, probe=folder, shape=shape, config=inputs["teacher"]["config"], with_reload=with_reload)
    clock.lap("verify")
    try:
        model = load_model(student, dtype="float32", device=device)  # as the rungs measured it
    except TeacherUnavailable as unloadable:
        raise CorruptFile(reason or str(unloadable)) from unloadable
    tokens = spec.rungs.tokens(spec.rungs.num_trained)
    result = measure(
        spec,
        inputs=inputs,
        prepared=prepared,
        model=model,
        device=device,
        rung=spec.rungs.num_trained,
        tokens=tokens,
        held_out=True,
        with_tasks=True,
    )
    clock.lap("evaluate")
    latency = measure_latency(
        model.to(resolve_dtype(teacher_dtype(spec, device=device))),  # as it would be served
        prompt_tokens=min(spec.evaluation.latency_prompt_tokens, model.config.max_position_embeddings - spec.evaluation.latency_new_tokens),
        new_tokens=spec.evaluation.latency_new_tokens,
        batch_size=1,
        repeats=5,
    )
    clock.lap("latency")
    return {
        "verified": reason is None,
        "reason": reason,
        "reloaded": with_reload,
        "parameters": parameters,
        "held_out": result.as_dict(),
        "latency": latency.as_dict(),
        "deployability": deployability(shape).as_dict(),
        "seconds": seconds,
    }


def verify(student: Path, *, probe: Path, shape: Shape, config: Mapping[str, Any], with_reload: bool) -> tuple[str | None, int]:
    """Why the saved student is not what it claims to be (None if it is), and its parameters counted from the file."""
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (student / name).is_file()]
    if missing:
        raise CorruptFile(f"{student}: expected {' and '.join(missing)}, got no such file")
    parameters = count_file(student)
    expected = count_parameters(read_architecture(config), shape).total
    if parameters != expected:
        return f"parameters: expected {expected} for shape {shape.key}, got {parameters} in the file", parameters
    saved = read_architecture(json.loads((student / CONFIG_FILE).read_text(encoding="utf-8"))).shape
    if saved != shape:
        return f"config.json: expected shape {shape.key}, got {saved.key}", parameters
    if not with_reload:
        return None, parameters
    load_tensors(probe, name=PROBE)  # raises CorruptFile where the probe is damaged
    probe_file = probe / json.loads((probe / f"{PROBE}.json").read_text(encoding="utf-8"))["file"]
    process = subprocess.run(
        [sys.executable, "-c", _RELOAD, str(student), str(probe_file)], capture_output=True, text=True, timeout=RELOAD_SECONDS, check=False
    )
    if process.returncode != 0:
        return f"reload: expected plain transformers to load and generate, got exit code {process.returncode}: {process.stderr.strip()[-500:]}", parameters
    answer = json.loads(process.stdout.strip().splitlines()[-1])
    limit = MAX_LOGIT_DIFFERENCE * max(1.0, answer["largest"] / 10)
    if not answer["difference"] <= limit:
        return f"reload: expected the trained student's logits within {limit:.3g}, got a difference of {answer['difference']}", parameters
    return None, parameters


def count_file(folder: Path) -> int:
    """Parameters in the safetensors files of a checkpoint folder."""
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (safe_open is no mapping)
                count = 1
                for side in tensors.get_slice(name).get_shape():
                    count *= side
                total += count
    return total
