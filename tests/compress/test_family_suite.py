"""What every family must pass, on small random models of each of its kinds; that planted redundancy comes back is in test_planted.py.

A family that someone adds is one parameter more: an entry in `family_models.KINDS`.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from nas.architecture import Architecture
from nas.compress.depth import bridged_damage, layer_damage
from nas.compress.experts import fuse_experts
from nas.compress.slicing import build_student, slice_student
from nas.compress.sorting import Sorting
from nas.compress.teacher import check_teacher, load_model, write_checkpoint
from nas.cost import count_parameters
from nas.errors import TeacherUnavailable
from nas.families import FAMILIES
from nas.shape import Shape
from tests.compress.family_models import KINDS, PLAIN, random_model

every_kind = pytest.mark.parametrize("kind", KINDS)
every_family = pytest.mark.parametrize("kind", PLAIN)

FRESH_PROCESS = """
import json, sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
found = {}
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    expected = load_file(folder + "/expected.safetensors")
    with torch.no_grad():
        logits = model(expected["tokens"]).logits
    prompt = expected["tokens"][:2, :9]
    cached, plain = (model.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=use, pad_token_id=0) for use in (True, False))
    found[folder] = {
        "difference": float((logits.float() - expected["logits"].float()).abs().max()),
        "dtype": str(model.dtype),
        "cache": bool(torch.equal(cached, plain)),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
print(json.dumps(found))
"""


def smaller(sorting: Sorting) -> Shape:
    """One step down on every axis that has one, to a width that the family takes."""
    architecture, teacher = sorting.architecture, sorting.architecture.shape
    groups, queries = max(1, teacher.num_key_value_heads - 1), max(1, teacher.query_heads_per_kv - 1)
    widths = range(teacher.hidden_size - 1, 0, -1)
    return Shape(
        num_hidden_layers=teacher.num_hidden_layers - 1,
        hidden_size=next(width for width in widths if architecture.allows(hidden_size=width, num_attention_heads=groups * queries)),
        intermediate_size=next(size for size in reversed(legal_mlp(architecture)) if size <= teacher.intermediate_size - 3),
        num_attention_heads=groups * queries,
        num_key_value_heads=groups,
        head_dim=teacher.head_dim,
        num_experts=teacher.num_experts and teacher.num_experts - 1,
    )


def legal_mlp(architecture: Architecture) -> list[int]:
    """Every intermediate size up to the teacher's that the family takes."""
    return list(range(architecture.family.width_multiple, architecture.shape.intermediate_size + 1, architecture.family.width_multiple))


def any_shape(sorting: Sorting, generator: random.Random) -> Shape:
    """A legal shape, every axis drawn from all that the teacher has."""
    architecture, teacher = sorting.architecture, sorting.architecture.shape
    groups = generator.randint(1, teacher.num_key_value_heads)
    heads = groups * generator.randint(1, teacher.query_heads_per_kv)
    widths = [width for width in range(1, teacher.hidden_size + 1) if architecture.allows(hidden_size=width, num_attention_heads=heads)]
    return Shape(
        num_hidden_layers=generator.choice(sorted(sorting.layers)),
        hidden_size=generator.choice(widths),
        intermediate_size=generator.choice(legal_mlp(architecture)),
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=teacher.head_dim,
        num_experts=teacher.num_experts and generator.randint(architecture.num_experts_per_tok or 1, teacher.num_experts),
    )


@pytest.fixture(scope="module")
def teachers() -> dict[str, PreTrainedModel]:
    return {kind: random_model(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def sortings(teachers: dict[str, PreTrainedModel], sort_on_disk: Callable[..., Sorting], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Sorting]:
    return {kind: sort_on_disk(model, folder=tmp_path_factory.mktemp("teacher")) for kind, model in teachers.items()}


@pytest.fixture(scope="module")
def reloaded(
    sortings: dict[str, Sorting], random_tokens: Callable[..., Tensor], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], dict[str, Any]]:
    """(kind, dtype) -> what one fresh process with plain transformers finds in the folder of a student that is smaller on every axis."""
    folders = {}
    for kind, dtype in [(kind, "float32") for kind in KINDS] + [(kind, "bfloat16") for kind in PLAIN]:
        folder = tmp_path_factory.mktemp("student")
        student = build_student(sortings[kind], smaller(sortings[kind]), dtype=dtype, device="cpu").eval()
        write_checkpoint(student.state_dict(), config=student.config.to_dict(), tokenizer_from=sortings[kind].folder, folder=folder)
        tokens_BT = random_tokens(rows=4, seed=2)
        with torch.no_grad():
            save_file({"tokens": tokens_BT, "logits": student(tokens_BT).logits}, folder / "expected.safetensors")
        folders[str(folder)] = kind, dtype
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", FRESH_PROCESS, *folders], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {folders[folder]: found for folder, found in json.loads(done.stdout).items()}


def test_every_family_has_a_kind() -> None:
    assert {values["model_type"] for values in KINDS.values()} == set(FAMILIES)


@every_kind
def test_full_size_is_the_identity(
    kind: str, teachers: dict[str, PreTrainedModel], sortings: dict[str, Sorting], max_difference: Callable[..., float], random_tokens: Callable[..., Tensor]
) -> None:
    teacher, sorting = teachers[kind], sortings[kind]
    tokens_BT = random_tokens(rows=4, seed=2)
    with torch.no_grad():
        scale = float(teacher(tokens_BT).logits.abs().max())

    student = build_student(sorting, sorting.architecture.shape, dtype="float32", device="cpu").eval()

    assert max_difference(teacher, student, tokens_BT=tokens_BT) <= 1e-4 * scale
    assert max_difference(teacher, AutoModelForCausalLM.from_pretrained(sorting.folder), tokens_BT=tokens_BT) <= 1e-4 * scale
    assert sorting.order.hidden_D.tolist() != sorted(sorting.order.hidden_D.tolist())
    key = sorting.architecture.family.eps_key
    assert getattr(student.config, key) == getattr(teacher.config, key)


@every_kind
def test_the_saved_file_has_the_parameters_of_the_closed_form(kind: str, sortings: dict[str, Sorting], tmp_path: Path) -> None:
    sorting, generator = sortings[kind], random.Random(kind)
    for shape in (smaller(sorting), *(any_shape(sorting, generator) for _ in range(3))):
        state, config = slice_student(sorting, shape)
        write_checkpoint(state, config=config, tokenizer_from=sorting.folder, folder=tmp_path)
        with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
            numel = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 (safe_open is no mapping)

        assert numel == count_parameters(sorting.architecture, shape).total
        assert check_teacher(tmp_path).parameters == numel


@every_kind
def test_a_fresh_process_with_plain_transformers_gives_the_same_logits(kind: str, reloaded: dict[tuple[str, str], dict[str, Any]]) -> None:
    assert reloaded[kind, "float32"]["difference"] <= 1e-5


@every_kind
def test_generating_with_the_cache_equals_generating_without(kind: str, reloaded: dict[tuple[str, str], dict[str, Any]]) -> None:
    assert reloaded[kind, "float32"]["cache"]


@every_family
def test_a_bfloat16_student_reloads_as_one(kind: str, reloaded: dict[tuple[str, str], dict[str, Any]]) -> None:
    found = reloaded[kind, "bfloat16"]

    assert found["dtype"] == "torch.bfloat16"
    assert found["difference"] == 0
    assert found["parameters"] == reloaded[kind, "float32"]["parameters"]


@every_family
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_sharded_teacher_in_half_precision_is_read(
    kind: str, dtype: str, save_teacher: Callable[..., Path], max_difference: Callable[..., float], tmp_path: Path
) -> None:
    model = random_model(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(getattr(torch, dtype)))
    folder = save_teacher(copy.deepcopy(model).to(getattr(torch, dtype)), folder=tmp_path, max_shard_size="20KB")

    teacher = check_teacher(folder)

    assert not (folder / "model.safetensors").exists()
    assert teacher.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert max_difference(load_model(folder, dtype="float32", device="cpu"), model) <= 1e-5


@every_kind
def test_the_damage_of_a_cut_is_the_divergence_of_the_model_that_it_leaves(
    kind: str, teachers: dict[str, PreTrainedModel], sortings: dict[str, Sorting], random_tokens: Callable[..., Tensor]
) -> None:
    """Whatever a config says layer by layer must follow the layers that stay, in measuring as in slicing."""
    teacher, tokens_BT = teachers[kind], random_tokens(rows=4, seed=3)
    sorting = dataclasses.replace(sortings[kind], layers={2: (0, 2)})
    student = build_student(sorting, dataclasses.replace(sorting.architecture.shape, num_hidden_layers=2), dtype="float32", device="cpu").eval()
    with torch.no_grad():
        expected, got = (model(tokens_BT).logits.log_softmax(-1) for model in (teacher, student))
    divergence = float((expected.exp() * (expected - got)).sum(-1).mean())
    before = teacher.config.to_dict()

    assert layer_damage(teacher, blocks_BT=tokens_BT, batch_size=4)((0, 2)) == pytest.approx(divergence, rel=1e-3)
    bridged = bridged_damage(teacher, blocks_BT=random_tokens(rows=32, seed=4), batch_size=8)
    assert bridged((0, 1, 2)) == 0
    assert 0 < bridged((0, 2)) < math.inf
    assert teacher.config.to_dict() == before


def test_what_a_config_says_layer_by_layer_follows_the_layers_that_stay(sortings: dict[str, Sorting]) -> None:
    def config(kind: str) -> dict[str, Any]:
        sorting = dataclasses.replace(sortings[kind], layers={2: (0, 2)})
        return slice_student(sorting, dataclasses.replace(sorting.architecture.shape, num_hidden_layers=2))[1]

    assert config("gemma2")["layer_types"] == ["sliding_attention", "sliding_attention"]
    assert config("smollm3")["no_rope_layers"] == [1, 1]
    assert config("smollm3, biases, untied")["no_rope_layers"] == [1, 0]
    sliding = config("qwen2, sliding from a layer on")
    assert (sliding["layer_types"], sliding["max_window_layers"]) == (["full_attention", "sliding_attention"], 1)
    assert not {"sliding_window_pattern", "_sliding_window_pattern"} & set(config("gemma3, untied, one KV head"))


def test_a_list_by_layer_that_the_row_does_not_know_is_refused(save_teacher: Callable[..., Path], tmp_path: Path) -> None:
    folder = save_teacher(random_model("llama"), folder=tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "mlp_layer_types": ["dense", "sparse", "dense"]}))

    with pytest.raises(TeacherUnavailable, match=r"mlp_layer_types: expected no such list \(llama has one entry per layer only in none"):
        check_teacher(folder)


def test_published_phi3_points_at_code_that_is_not_run_and_not_passed_on(
    save_teacher: Callable[..., Path], max_difference: Callable[..., float], tmp_path: Path
) -> None:
    model = random_model("phi3")
    folder = save_teacher(model, folder=tmp_path)
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": code}))
    (folder / "modeling_phi3.py").write_text("raise SystemExit('this code came with a model')")
    (folder / "configuration_phi3.py").write_text("raise SystemExit('this code came with a model')")

    assert "auto_map" not in check_teacher(folder).config
    assert max_difference(load_model(folder, dtype="float32", device="cpu"), model) <= 1e-5


@every_family
def test_the_sorted_checkpoint_holds_every_weight_of_the_teacher(kind: str, teachers: dict[str, PreTrainedModel], sortings: dict[str, Sorting]) -> None:
    stored = load_file(sortings[kind].folder / "model.safetensors")
    fuse_experts(stored, architecture=sortings[kind].architecture)

    for name, parameter in teachers[kind].named_parameters():
        torch.testing.assert_close(stored[name].flatten().sort().values, parameter.detach().flatten().sort().values, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kind", "old"),
    [
        ("llama 3.1, scaled rope", {"rope_theta": 5e5, "rope_scaling": ...}),
        ("gemma3, untied, one KV head", {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 2}),
        ("phi3, long rope", {"rope_theta": 1e4, "rope_scaling": ...}),
        ("nemotron", {"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
    ],
)
def test_a_config_in_the_spelling_of_transformers_4_is_the_same_model(
    kind: str,
    old: dict[str, Any],
    teachers: dict[str, PreTrainedModel],
    save_teacher: Callable[..., Path],
    max_difference: Callable[..., float],
    tmp_path: Path,
) -> None:
    """As most published checkpoints have it; and what is written for a student says the same in both spellings."""
    folder = save_teacher(teachers[kind], folder=tmp_path)
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    old = {key: scaling if value is ... else value for key, value in old.items()}
    spelled = {**{key: value for key, value in config.items() if key not in ("dtype", "layer_types")}, **old, "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(spelled))

    teacher = check_teacher(folder)

    assert max_difference(load_model(folder, dtype="float32", device="cpu"), teachers[kind]) <= 1e-5
    assert teacher.config["rope_parameters"] == teachers[kind].config.to_dict()["rope_parameters"]
    write_checkpoint(teachers[kind].state_dict(), config=teacher.config, tokenizer_from=folder, folder=tmp_path / "copy")
    written = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert all(written[key] == value for key, value in old.items() if key not in ("rope_scaling", "sliding_window_pattern"))
    assert max_difference(AutoModelForCausalLM.from_pretrained(tmp_path / "copy"), teachers[kind]) <= 1e-5
