"""Redundancy that a plain slice loses comes back by reconstruction, in every family; what cannot be improved stays the plain slice.

A family that someone adds is one parameter more: an entry in `family_models.KINDS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from nas.architecture import read_architecture
from nas.compress.reconstruction import NormGains, Reconstruction, kept_of, rebuild_student, reconstruct, reconstruct_student, split_calibration, stream_map
from nas.compress.second_moments import SecondMoments, load_moments, measure_moments
from nas.compress.slicing import build_student, model_of, slice_student
from nas.compress.sorting import Sorting
from nas.compress.teacher import checkpoint_weights, load_model
from nas.families import FAMILIES, Axis, Source
from nas.shape import Shape
from tests.compress.family_models import KINDS, PLAIN, SIZES, file_weights, random_model

ROTATING = ("llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3", "granite", "mixtral", "qwen3_moe")
ADDED = 8
"""Neurons that repeat others."""

Sorted = Callable[..., Sorting]
every_family = pytest.mark.parametrize("kind", PLAIN)
grouped = pytest.mark.parametrize("kind", [kind for kind in PLAIN if {**SIZES, **KINDS[kind]}["num_attention_heads"] == 4])


def measured(sorting: Sorting, *, tokens_BT: Tensor, folder: Path, **settings: int) -> SecondMoments:
    model = load_model(sorting.folder, dtype="float32", device="cpu")
    return measure_moments(model, sorting=sorting, blocks_BT=tokens_BT, folder=folder, **{"batch_size": 8, **settings})


def built(sorting: Sorting, shape: Shape, *, moments: SecondMoments, damping: float = 0.0, gains: NormGains = "energy") -> PreTrainedModel:
    state, config = reconstruct(sorting, shape, moments=moments, damping=damping, gains=gains)
    return model_of(state, config=config, dtype="float32", device="cpu").eval()


def relative_difference(student: PreTrainedModel, teacher: PreTrainedModel, *, tokens_BT: Tensor) -> float:
    with torch.no_grad():
        expected = teacher(tokens_BT).logits
        return float((student(tokens_BT).logits - expected).norm() / expected.norm())


def text_of(teacher: PreTrainedModel, *, rows: int, random_tokens: Callable[..., Tensor]) -> Tensor:
    """Drawn from the teacher, so that nobody's expected loss is lower than the teacher's own."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return teacher.generate(random_tokens(rows=rows, length=1).clamp_min(1), max_new_tokens=40, do_sample=True, top_k=0, pad_token_id=0)


def shrunk(sorting: Sorting, **changes: int) -> Shape:
    return dataclasses.replace(sorting.architecture.shape, **changes)


def rows_over(model: PreTrainedModel, *, axis: Axis) -> list[tuple[str, Tensor, int]]:
    """(name, parameter, first row) of every part of a side over the axis, layer by layer."""
    architecture, found, parameters = read_architecture(model.config.to_dict()), [], file_weights(model)
    sizes = architecture.sizes(architecture.shape)
    for name, weight, _, _ in checkpoint_weights(architecture, num_hidden_layers=architecture.shape.num_hidden_layers):
        start = 0
        for part in weight.sides[0]:
            if part is axis:
                found.append((name, parameters[name], start))
            start += sizes[part]
    return found


def neurons_of(kind: str) -> int:
    return read_architecture(random_model(kind).config.to_dict()).shape.intermediate_size


@torch.no_grad()
def with_repeated_neurons(kind: str) -> PreTrainedModel:
    """The last neurons of each layer do what the first do, at a fifth of the size."""
    kept = neurons_of(kind)
    model = random_model(kind, **{FAMILIES[KINDS[kind]["model_type"]].intermediate_key: kept + ADDED})
    for name, parameter, start in rows_over(model, axis=Axis.INTERMEDIATE):
        copies = parameter[start : start + ADDED].clone()
        is_up = ".up_proj" in name or ".w3" in name or ("gate_up" in name and start > 0)
        parameter[start + kept : start + kept + ADDED] = copies * (0.2 if is_up else 1.0)
    return model


@torch.no_grad()
def with_repeated_queries(kind: str) -> PreTrainedModel:
    """The second query head of each group asks what the first asks; its output is read otherwise."""
    model = random_model(kind)
    size = model.config.head_dim
    for _, parameter, start in rows_over(model, axis=Axis.QUERY):
        for group in range(model.config.num_key_value_heads):
            first = start + 2 * group * size
            parameter[first + size : first + 2 * size] = parameter[first : first + size]
    return model


@torch.no_grad()
def with_repeated_groups(kind: str) -> PreTrainedModel:
    """The second KV group and its queries do what the first does."""
    model = random_model(kind)
    for axis, width in ((Axis.QUERY, 2 * model.config.head_dim), (Axis.KEY_VALUE, model.config.head_dim)):
        for _, parameter, start in rows_over(model, axis=axis):
            parameter[start + width : start + 2 * width] = parameter[start : start + width]
    return model


@torch.no_grad()
def with_narrow_stream(kind: str, *, width: int, **changes: object) -> PreTrainedModel:
    """The residual stream never leaves a random subspace of this many dimensions. A tied head's norm has one gain, as only then the rotation is exact."""
    model = random_model(kind, **changes)
    span_DW = torch.linalg.qr(torch.randn(model.config.hidden_size, width, generator=torch.Generator().manual_seed(3)))[0]
    onto_DD = span_DW @ span_DW.t()
    model.get_input_embeddings().weight.copy_(model.get_input_embeddings().weight @ onto_DD)
    architecture, parameters = read_architecture(model.config.to_dict()), file_weights(model)
    for name, weight, _, _ in checkpoint_weights(architecture, num_hidden_layers=architecture.shape.num_hidden_layers):
        if weight.sides[0] == (Axis.HIDDEN,) and not weight.is_norm:
            parameters[name].copy_(onto_DD @ parameters[name])
    if model.config.tie_word_embeddings:
        model.model.norm.weight.fill_(1.3)
    return model


@every_family
def test_repeated_neurons_are_recovered(kind: str, sort_on_disk: Sorted, random_tokens: Callable[..., Tensor], tmp_path: Path) -> None:
    teacher = with_repeated_neurons(kind)
    sorting = sort_on_disk(teacher, folder=tmp_path, as_it_is=True)
    shape, tokens_BT = shrunk(sorting, intermediate_size=neurons_of(kind)), random_tokens(rows=4, seed=2)
    moments = measured(sorting, tokens_BT=random_tokens(rows=16, seed=1), folder=tmp_path / "moments")

    plain = relative_difference(build_student(sorting, shape, dtype="float32", device="cpu").eval(), teacher, tokens_BT=tokens_BT)
    fitted = relative_difference(built(sorting, shape, moments=moments), teacher, tokens_BT=tokens_BT)

    assert plain > 1e-2
    assert fitted < 1e-3


@pytest.mark.parametrize(("plant", "lost"), [(with_repeated_queries, "query"), (with_repeated_groups, "group")], ids=["queries", "KV groups"])
@grouped
def test_repeated_heads_are_recovered(
    kind: str, plant: Callable[[str], PreTrainedModel], lost: str, sort_on_disk: Sorted, random_tokens: Callable[..., Tensor], tmp_path: Path
) -> None:
    teacher = plant(kind)
    sorting = sort_on_disk(teacher, folder=tmp_path, as_it_is=True)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2 if lost == "query" else 1}
    shape, tokens_BT = shrunk(sorting, **heads), random_tokens(rows=4, seed=2)
    moments = measured(sorting, tokens_BT=random_tokens(rows=16, seed=1), folder=tmp_path / "moments")

    plain = relative_difference(build_student(sorting, shape, dtype="float32", device="cpu").eval(), teacher, tokens_BT=tokens_BT)
    fitted = relative_difference(built(sorting, shape, moments=moments), teacher, tokens_BT=tokens_BT)

    assert plain > 1e-2
    assert fitted < 1e-3


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", [kind for kind in PLAIN if KINDS[kind]["model_type"] in ROTATING])
def test_a_stream_of_dependent_channels_is_recovered(kind: str, tied: bool, sort_on_disk: Sorted, random_tokens: Callable[..., Tensor], tmp_path: Path) -> None:
    teacher = with_narrow_stream(kind, width=16, hidden_size=24, tie_word_embeddings=tied)
    sorting = sort_on_disk(teacher, folder=tmp_path, as_it_is=True)
    shape, tokens_BT = shrunk(sorting, hidden_size=16), random_tokens(rows=4, seed=2)
    moments = measured(sorting, tokens_BT=random_tokens(rows=16, seed=1), folder=tmp_path / "moments")

    plain = relative_difference(build_student(sorting, shape, dtype="float32", device="cpu").eval(), teacher, tokens_BT=tokens_BT)
    fitted = relative_difference(built(sorting, shape, moments=moments), teacher, tokens_BT=tokens_BT)

    assert plain > 0.1
    assert fitted < 2e-3


@pytest.mark.parametrize("kind", [kind for kind in PLAIN if KINDS[kind]["model_type"] in ROTATING])
def test_the_teachers_gains_leave_the_weights_as_large_as_the_teachers_and_the_function_as_it_is(
    kind: str, sort_on_disk: Sorted, random_tokens: Callable[..., Tensor], tmp_path: Path
) -> None:
    model = random_model(kind)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.startswith("model.layers") and name.endswith("layernorm.weight"):
                weight.copy_(torch.linspace(0.1, 0.3, len(weight)))
    sorting = sort_on_disk(model, folder=tmp_path)
    shape, tokens_BT = shrunk(sorting, hidden_size=sorting.architecture.shape.hidden_size - 8), random_tokens(rows=4, seed=2)
    moments = measured(sorting, tokens_BT=random_tokens(rows=16, seed=1), folder=tmp_path / "moments")

    energy = built(sorting, shape, moments=moments, damping=1e-3)
    teacher = built(sorting, shape, moments=moments, damping=1e-3, gains="teacher")

    assert relative_difference(teacher, energy, tokens_BT=tokens_BT) < 1e-5
    norms = {name: weight for name, weight in teacher.state_dict().items() if name.startswith("model.layers") and name.endswith("layernorm.weight")}
    expected = torch.linspace(0.1, 0.3, sorting.architecture.shape.hidden_size).square().mean().sqrt()
    assert norms
    assert all(torch.allclose(weight, expected.expand_as(weight), rtol=1e-5) for weight in norms.values())
    assert torch.equal(teacher.model.norm.weight, energy.model.norm.weight)


@every_family
def test_only_streams_that_keep_their_function_are_rotated(kind: str, sort_on_disk: Sorted, random_tokens: Callable[..., Tensor], tmp_path: Path) -> None:
    model = random_model(kind)
    if model.config.tie_word_embeddings:
        with torch.no_grad():
            model.model.norm.weight.abs_()
    sorting = sort_on_disk(model, folder=tmp_path)

    moments = measured(sorting, tokens_BT=random_tokens(rows=4), folder=tmp_path / "moments")

    assert (moments.basis_DD is not None) == (KINDS[kind]["model_type"] in ROTATING)


def test_a_tied_head_behind_a_gain_that_is_not_positive_is_not_rotated(sort_on_disk: Sorted, random_tokens: Callable[..., Tensor], tmp_path: Path) -> None:
    model = random_model("llama", tie_word_embeddings=True)
    with torch.no_grad():
        model.model.norm.weight[3] = -0.5
    sorting = sort_on_disk(model, folder=tmp_path)

    assert measured(sorting, tokens_BT=random_tokens(rows=4), folder=tmp_path / "moments").basis_DD is None


@pytest.fixture(scope="module")
def sorting(sort_on_disk: Sorted, tmp_path_factory: pytest.TempPathFactory) -> Sorting:
    return sort_on_disk(random_model("llama, biases, as many KV heads as heads"), folder=tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def moments(sorting: Sorting, random_tokens: Callable[..., Tensor], tmp_path_factory: pytest.TempPathFactory) -> SecondMoments:
    return measured(sorting, tokens_BT=random_tokens(rows=16, seed=1), folder=tmp_path_factory.mktemp("moments"))


def every_axis(sorting: Sorting) -> Shape:
    return shrunk(sorting, num_hidden_layers=2, hidden_size=18, intermediate_size=13, num_attention_heads=3, num_key_value_heads=3)


@every_family
def test_full_size_is_the_identity(kind: str, sort_on_disk: Sorted, random_tokens: Callable[..., Tensor], tmp_path: Path) -> None:
    sorting = sort_on_disk(random_model(kind), folder=tmp_path)
    moments = measured(sorting, tokens_BT=random_tokens(rows=4), folder=tmp_path / "moments")
    shape = sorting.architecture.shape

    state, config = reconstruct(sorting, shape, moments=moments, damping=1e-3)

    plain, plain_config = slice_student(sorting, shape)
    assert config == plain_config
    assert all(torch.equal(state[name], plain[name]) for name in plain)


def test_infinite_damping_is_the_plain_slice(sorting: Sorting, moments: SecondMoments) -> None:
    shape = dataclasses.replace(every_axis(sorting), hidden_size=24)
    unrotated = dataclasses.replace(moments, basis_DD=None)
    for smaller, chosen in ((shape, moments), (every_axis(sorting), unrotated)):
        state, _ = reconstruct(sorting, smaller, moments=chosen, damping=1e12)
        fitted, _ = reconstruct(sorting, smaller, moments=chosen, damping=1e-3)
        plain, _ = slice_student(sorting, smaller)

        assert all(torch.allclose(state[name], plain[name], atol=1e-6) for name in plain)
        assert not torch.allclose(fitted["model.layers.0.mlp.down_proj.weight"], plain["model.layers.0.mlp.down_proj.weight"], atol=1e-3)


def test_the_fit_is_the_least_squares_solution(sorting: Sorting, moments: SecondMoments, random_tokens: Callable[..., Tensor]) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    teacher = load_model(sorting.folder, dtype="float32", device="cpu")
    seen: list[Tensor] = []
    teacher.get_submodule(name.rpartition(".")[0]).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].double().flatten(0, 1)))
    with torch.no_grad():
        teacher(random_tokens(rows=16, seed=1))
    target_ND = seen[0] @ teacher.get_parameter(name).double().t()
    expected_FD = torch.linalg.lstsq(seen[0][:, :13], target_ND).solution

    state, _ = reconstruct(sorting, shrunk(sorting, intermediate_size=13), moments=moments, damping=0.0)

    assert torch.allclose(state[name].double(), expected_FD.t(), atol=1e-3)


def test_the_layer_before_a_gap_takes_over_what_the_removed_one_added(sort_on_disk: Sorted, random_tokens: Callable[..., Tensor], tmp_path: Path) -> None:
    sorting = sort_on_disk(random_model("granite"), folder=tmp_path, depths=(2, 3))  # its sublayers are scaled by a constant
    shape, tokens_BT, layers = shrunk(sorting, num_hidden_layers=2), random_tokens(rows=16, seed=1), sorting.layers[2]
    moments = measured(sorting, tokens_BT=tokens_BT, folder=tmp_path / "moments")
    before = next(number for number, layer in enumerate(layers) if layer + 1 not in layers)  # 0 where layer 1 is gone, 1 where layer 2 is
    after = layers[before + 1] if before + 1 < len(layers) else 3

    def stream(model: PreTrainedModel, num_layers: int) -> Tensor:
        module, seen = [*model.model.layers, model.model.norm][num_layers], list[Tensor]()
        module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        with torch.no_grad():
            model(tokens_BT)
        return seen[0]

    expected_BTD = stream(load_model(sorting.folder, dtype="float32", device="cpu"), after)
    plain_BTD = stream(build_student(sorting, shape, dtype="float32", device="cpu").eval(), before + 1)
    fitted_BTD = stream(built(sorting, shape, moments=moments), before + 1)

    assert (fitted_BTD - expected_BTD).norm() < 0.9 * (plain_BTD - expected_BTD).norm()


def test_neither_batches_nor_passes_change_the_result(sorting: Sorting, moments: SecondMoments, random_tokens: Callable[..., Tensor], tmp_path: Path) -> None:
    shape, tokens_BT = every_axis(sorting), random_tokens(rows=16, seed=1)
    state, config = reconstruct(sorting, shape, moments=moments, damping=1e-2)
    again, _ = reconstruct(sorting, shape, moments=measured(sorting, tokens_BT=tokens_BT, folder=tmp_path / "again"), damping=1e-2)
    other, other_config = reconstruct(
        sorting, shape, moments=measured(sorting, tokens_BT=tokens_BT, folder=tmp_path / "other", batch_size=3, max_bytes=5000), damping=1e-2
    )

    assert all(torch.equal(state[name], again[name]) for name in state)
    assert config["rms_norm_eps"] == pytest.approx(other_config["rms_norm_eps"])
    tokens_BT = random_tokens(rows=4, seed=2)
    models = [model_of(weights, config=config, dtype="float32", device="cpu").eval() for weights in (state, other)]
    # A rotation is unique up to signs only: compare what the students compute.
    assert relative_difference(models[0], models[1], tokens_BT=tokens_BT) < 1e-4


def test_a_rank_deficient_moment_matrix_is_safe_without_damping(sorting: Sorting, random_tokens: Callable[..., Tensor], tmp_path: Path) -> None:
    moments = measured(sorting, tokens_BT=random_tokens(rows=1, seed=1, length=5), folder=tmp_path)  # five tokens for twenty neurons
    state, _ = reconstruct(sorting, every_axis(sorting), moments=moments, damping=0.0)
    assert all(bool(tensor.isfinite().all()) for tensor in state.values())


class Misleading(SecondMoments):
    """Moments of something else."""

    def gram(self, source: Source) -> Tensor:
        size = len(SecondMoments.gram(self, source))
        signs_X = torch.randn(size, generator=torch.Generator().manual_seed(size)).sign()
        loudness_X = torch.where(torch.arange(size) < size // 2, 1.0, 10.0)  # the kept ones foretell loud ones
        return torch.outer(signs_X * loudness_X, signs_X * loudness_X)


def test_a_reconstruction_that_is_worse_is_not_kept(sorting: Sorting, moments: SecondMoments, random_tokens: Callable[..., Tensor]) -> None:
    shape = dataclasses.replace(every_axis(sorting), num_hidden_layers=3, hidden_size=24)
    wrong = Misleading(folder=moments.folder, basis_DD=moments.basis_DD)
    teacher = load_model(sorting.folder, dtype="float32", device="cpu")
    held_out_NT = text_of(teacher, rows=64, random_tokens=random_tokens)

    student, result = reconstruct_student(sorting, shape, moments=wrong, held_out_NT=held_out_NT, dtype="float32", device="cpu", batch_size=4, dampings=(1e-3,))

    plain, _ = slice_student(sorting, shape)
    assert not result.kept
    assert result.loss_after is not None
    assert result.loss_before is not None
    assert result.loss_after >= result.loss_before
    assert "plain slice" in result.reason
    assert all(torch.equal(student.get_parameter(name), plain[name]) for name in plain)


def test_the_best_damping_on_held_out_tokens_is_taken(sorting: Sorting, moments: SecondMoments, random_tokens: Callable[..., Tensor]) -> None:
    shape = dataclasses.replace(every_axis(sorting), num_hidden_layers=3, hidden_size=24)
    teacher = load_model(sorting.folder, dtype="float32", device="cpu")
    held_out_NT = text_of(teacher, rows=64, random_tokens=random_tokens)

    def result(*dampings: float) -> Reconstruction:
        return reconstruct_student(sorting, shape, moments=moments, held_out_NT=held_out_NT, dtype="float32", device="cpu", batch_size=4, dampings=dampings)[1]

    alone = {damping: result(damping).loss_after for damping in (1e-3, 1e3)}
    assert result(1e-3, 1e3).loss_after == min(value for value in alone.values() if value is not None)


def test_the_whole_teacher_is_not_measured(sorting: Sorting, moments: SecondMoments, random_tokens: Callable[..., Tensor]) -> None:
    _, result = reconstruct_student(
        sorting, sorting.architecture.shape, moments=moments, held_out_NT=random_tokens(rows=2), dtype="float32", device="cpu", batch_size=4
    )
    assert (result.kept, result.reason, result.loss_before) == (False, "nothing was removed", None)


@pytest.mark.parametrize(("rows", "length", "expected"), [(1, 8, (1, 1)), (7, 8, (6, 1)), (64, 8, (56, 8)), (4096, 128, (4064, 32))])
def test_the_check_is_on_blocks_that_were_not_measured(rows: int, length: int, expected: tuple[int, int]) -> None:
    first_NT, last_NT = split_calibration(torch.arange(rows * length).view(rows, length))
    assert (len(first_NT), len(last_NT)) == expected
    assert rows == 1 or int(first_NT.max()) < int(last_NT.min())


def test_moments_are_found_again(sorting: Sorting, moments: SecondMoments) -> None:
    found = load_moments(moments.folder)
    assert found.basis_DD is not None
    assert moments.basis_DD is not None
    assert torch.equal(found.basis_DD, moments.basis_DD)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_rotated_stream_is_the_mapped_stream_of_the_teacher(tied: bool, sort_on_disk: Sorted, random_tokens: Callable[..., Tensor], tmp_path: Path) -> None:
    model = with_narrow_stream("llama", width=16, hidden_size=24, tie_word_embeddings=tied)
    sorting = sort_on_disk(model, folder=tmp_path)
    moments = measured(sorting, tokens_BT=random_tokens(rows=16, seed=1), folder=tmp_path / "moments")
    shape, tokens_BT = shrunk(sorting, hidden_size=16), random_tokens(rows=4, seed=2)
    onto = stream_map(sorting, shape, moments=moments)
    student, teacher = built(sorting, shape, moments=moments), load_model(sorting.folder, dtype="float32", device="cpu")

    with torch.no_grad():
        found, expected = ([*each(tokens_BT, output_hidden_states=True).hidden_states] for each in (student, teacher))

    for layer in range(3):
        assert torch.allclose(found[layer], expected[layer] @ onto.stream, atol=2e-3)
    final_BTD = expected[3] @ onto.final  # up to the student's one gain
    assert torch.nn.functional.cosine_similarity(found[3], final_BTD, dim=-1).min() > 0.999


def test_without_a_rotation_the_stream_is_a_choice_of_channels(sorting: Sorting, moments: SecondMoments) -> None:
    shape = every_axis(sorting)
    assert stream_map(sorting, shape, moments=None).stream.tolist() == list(range(18))
    assert kept_of(sorting, shape, result=None)["hidden_channels"] == sorting.order.hidden_D[:18].tolist()
    assert kept_of(sorting, shape, result=Reconstruction(kept=True, rotated=True, reason=""))["hidden_channels"] is None


def test_what_was_found_is_built_again_bit_for_bit(sort_on_disk: Sorted, random_tokens: Callable[..., Tensor], tmp_path: Path) -> None:
    teacher = with_repeated_neurons("llama")
    sorting = sort_on_disk(teacher, folder=tmp_path, as_it_is=True)
    shape = shrunk(sorting, intermediate_size=SIZES["intermediate_size"])
    moments = measured(sorting, tokens_BT=random_tokens(rows=16, seed=1), folder=tmp_path / "moments")
    held_out_NT = text_of(teacher, rows=64, random_tokens=random_tokens)
    student, result = reconstruct_student(sorting, shape, moments=moments, held_out_NT=held_out_NT, dtype="float32", device="cpu", batch_size=4)

    again = rebuild_student(sorting, shape, moments=moments, result=result, dtype="float32", device="cpu")

    assert result.kept
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in student.state_dict().items())
