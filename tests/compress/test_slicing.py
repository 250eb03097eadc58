"""Full size is the teacher; every legal shape has the parameters that were promised and survives the disk."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from nas.compress.slicing import build_student, kept_indices, slice_student
from nas.compress.sorting import Sorting
from nas.errors import InvalidSpec
from nas.shape import Shape


def legal_shapes(sorting: Sorting) -> st.SearchStrategy[Shape]:
    teacher = sorting.architecture.shape

    @st.composite
    def shapes(draw: st.DrawFn) -> Shape:
        groups = draw(st.integers(1, teacher.num_key_value_heads))
        heads = groups * draw(st.integers(1, teacher.query_heads_per_kv))
        return Shape(
            num_hidden_layers=draw(st.sampled_from(sorted(sorting.layers))),
            hidden_size=heads * draw(st.integers(1, teacher.hidden_size // heads)),
            intermediate_size=draw(st.integers(1, teacher.intermediate_size)),
            num_attention_heads=heads,
            num_key_value_heads=groups,
            head_dim=teacher.head_dim,
        )

    return shapes()


def smaller(sorting: Sorting) -> Shape:
    """One step down on every axis that has one."""
    teacher = sorting.architecture.shape
    groups, queries = max(1, teacher.num_key_value_heads - 1), max(1, teacher.query_heads_per_kv - 1)
    return Shape(
        num_hidden_layers=teacher.num_hidden_layers - 1,
        hidden_size=groups * queries * ((teacher.hidden_size - 1) // (groups * queries)),
        intermediate_size=teacher.intermediate_size - 3,
        num_attention_heads=groups * queries,
        num_key_value_heads=groups,
        head_dim=teacher.head_dim,
    )


def test_full_size_keeps_every_index(sorting: Sorting) -> None:
    shape = sorting.architecture.shape
    kept = kept_indices(sorting, shape)
    assert kept["layers"] == list(range(shape.num_hidden_layers))
    assert sorted(kept["hidden_channels"]) == list(range(shape.hidden_size))
    for layer in kept["layers"]:
        assert sorted(kept["neurons"][layer]) == list(range(shape.intermediate_size))
        assert sorted(kept["key_value_heads"][layer]) == list(range(shape.num_key_value_heads))
        assert sorted(kept["query_heads"][layer]) == list(range(shape.num_attention_heads))


@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_the_weights_are_the_teachers_at_the_kept_indices(model: LlamaForCausalLM, sorting: Sorting, data: st.DataObject) -> None:
    shape = data.draw(legal_shapes(sorting))
    state, _ = slice_student(sorting, shape)
    kept = kept_indices(sorting, shape)
    hidden, head_dim = kept["hidden_channels"], shape.head_dim
    assert torch.equal(state["model.embed_tokens.weight"], model.model.embed_tokens.weight[:, hidden])
    for new, old in enumerate(kept["layers"]):
        layer, prefix = model.model.layers[old], f"model.layers.{new}"
        assert torch.equal(state[f"{prefix}.mlp.up_proj.weight"], layer.mlp.up_proj.weight[kept["neurons"][new]][:, hidden])
        assert torch.equal(state[f"{prefix}.mlp.down_proj.weight"], layer.mlp.down_proj.weight[hidden][:, kept["neurons"][new]])
        queries = [head * head_dim + row for head in kept["query_heads"][new] for row in range(head_dim)]
        keys = [head * head_dim + row for head in kept["key_value_heads"][new] for row in range(head_dim)]
        assert torch.equal(state[f"{prefix}.self_attn.q_proj.weight"], layer.self_attn.q_proj.weight[queries][:, hidden])
        assert torch.equal(state[f"{prefix}.self_attn.o_proj.weight"], layer.self_attn.o_proj.weight[hidden][:, queries])
        assert torch.equal(state[f"{prefix}.self_attn.v_proj.weight"], layer.self_attn.v_proj.weight[keys][:, hidden])
        if sorting.architecture.attention_bias:
            assert torch.equal(state[f"{prefix}.self_attn.q_proj.bias"], layer.self_attn.q_proj.bias[queries])
        group = [head // sorting.architecture.shape.query_heads_per_kv for head in kept["query_heads"][new]]
        assert group == [key for key in kept["key_value_heads"][new] for _ in range(shape.query_heads_per_kv)]


def test_the_config_says_every_number(sorting: Sorting) -> None:
    shape = smaller(sorting)
    _, config = slice_student(sorting, shape)
    assert {name: config[name] for name in shape.as_dict()} == shape.as_dict()
    for name in ("rope_parameters", "tie_word_embeddings", "attention_bias", "mlp_bias", "architectures", "vocab_size", "model_type"):
        assert config[name] == sorting.config[name]
    assert config["dtype"] == "float32"
    assert json.loads(json.dumps(config)) == config


def test_the_norms_are_exact_where_every_token_loses_the_same_share(
    random_llama: Callable[..., LlamaForCausalLM], sort_on_disk: Callable[..., Sorting], max_difference: Callable[..., float], tmp_path: Path
) -> None:
    model = random_llama(hidden_size=36, num_attention_heads=2, num_key_value_heads=1, rms_norm_eps=0.1)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 18:] = 2 * model.model.embed_tokens.weight[:, :18]
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
            for reader in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj, layer.mlp.gate_proj, layer.mlp.up_proj):
                reader.weight[:, 18:] = 0
        model.lm_head.weight[:, 18:] = 0
    sorting = sort_on_disk(model, folder=tmp_path)
    shape = dataclasses.replace(sorting.architecture.shape, hidden_size=18)
    student = build_student(sorting, shape, dtype="float32", device="cpu").eval()
    assert student.config.rms_norm_eps == pytest.approx(0.1 * (1 / 5) * 2)
    assert max_difference(model, student) <= 1e-4


def test_building_a_student_leaves_the_random_state_alone(sorting: Sorting) -> None:
    before = torch.get_rng_state()
    student = build_student(sorting, smaller(sorting), dtype="float32", device="cpu")
    assert torch.equal(torch.get_rng_state(), before)
    assert student.training
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_a_student_is_built_in_the_dtype_asked_for(sorting: Sorting) -> None:
    student = build_student(sorting, smaller(sorting), dtype="bfloat16", device="cpu")
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}
    assert (student.lm_head.weight is student.model.embed_tokens.weight) is sorting.architecture.tie_word_embeddings


def test_training_a_student_of_full_size_does_not_reach_the_file(sorting: Sorting) -> None:
    """Its weights are its own, not the pages of the mapped file, which other workers read."""
    before = (sorting.folder / "model.safetensors").read_bytes()
    student, twin = (build_student(sorting, sorting.architecture.shape, dtype="float32", device="cpu") for _ in range(2))
    mapped = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("model.safetensors")]
    with torch.no_grad():
        for parameter in student.parameters():
            start = parameter.data_ptr()
            assert not any(int(a, 16) <= start < int(b, 16) for a, b in (address.split("-") for address in mapped))
            parameter.zero_()
    assert (sorting.folder / "model.safetensors").read_bytes() == before
    assert all(bool(parameter.any()) for parameter in twin.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 72}, "hidden_size: expected at most the teacher's 36, got 72"),
        ({"intermediate_size": 21}, "intermediate_size: expected at most the teacher's 20, got 21"),
        ({"num_attention_heads": 6, "num_key_value_heads": 3}, "num_key_value_heads: expected at most the teacher's 2, got 3"),
        ({"num_attention_heads": 6}, "num_attention_heads: expected at most the teacher's 2 query heads per KV head, got 6 for 2 KV heads"),
        ({"head_dim": 9}, "head_dim: expected the teacher's 8, got 9"),
        ({"num_hidden_layers": 1}, r"num_hidden_layers: expected a depth with selected layers \(2, 3\), got 1"),
        ({"hidden_size": 30}, "hidden_size: expected a multiple of num_attention_heads=4, .* got 30"),
        ({"hidden_size": 72, "head_dim": 9}, "hidden_size.*; head_dim"),
    ],
)
def test_a_shape_that_is_no_prefix_of_the_teacher_is_refused(small_sorting: Sorting, changes: dict[str, Any], message: str) -> None:
    shape = dataclasses.replace(small_sorting.architecture.shape, **changes)
    for refuse in (slice_student, kept_indices):
        with pytest.raises(InvalidSpec, match=message):
            refuse(small_sorting, shape)


@pytest.fixture(scope="module")
def small_sorting(random_llama: Callable[..., LlamaForCausalLM], sort_on_disk: Callable[..., Sorting], tmp_path_factory: pytest.TempPathFactory) -> Sorting:
    return sort_on_disk(random_llama(), folder=tmp_path_factory.mktemp("small"), depths=(2, 3))


def test_the_one_eps_follows_the_norms_whose_divisor_it_is_part_of(small_sorting: Sorting) -> None:
    shape = dataclasses.replace(small_sorting.architecture.shape, hidden_size=20)
    eps = small_sorting.config["rms_norm_eps"]
    for name, share_D in small_sorting.norm_energy.items():
        alone = dataclasses.replace(small_sorting, norm_eps={other: float(other == name) for other in small_sorting.norm_eps})
        assert slice_student(alone, shape)[1]["rms_norm_eps"] == pytest.approx(eps * float(share_D[:20].sum()) * 36 / 20)
    nowhere = dataclasses.replace(small_sorting, norm_eps=dict.fromkeys(small_sorting.norm_eps, 0.0))
    mean = sum(float(share_D[:20].sum()) for share_D in small_sorting.norm_energy.values()) / len(small_sorting.norm_energy)
    assert slice_student(nowhere, shape)[1]["rms_norm_eps"] == pytest.approx(eps * mean * 36 / 20)
