"""What is refused before it is loaded, and that what we write loads with plain transformers."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from nas.compress import teacher as module
from nas.compress.teacher import check_teacher, fetch_teacher, load_model, load_tokenizer, write_checkpoint
from nas.cost import count_parameters
from nas.errors import InvalidSpec, TeacherUnavailable


@pytest.fixture
def folder(random_llama: Callable[..., LlamaForCausalLM], save_teacher: Callable[..., Path], tmp_path: Path) -> Path:
    return save_teacher(random_llama(tie_word_embeddings=True), folder=tmp_path / "teacher")


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_every_kind_of_model_is_accepted_and_counted(model: LlamaForCausalLM, save_teacher: Callable[..., Path], tmp_path: Path) -> None:
    teacher = check_teacher(save_teacher(model, folder=tmp_path))
    assert teacher.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert teacher.parameters == count_parameters(teacher.architecture, teacher.architecture.shape).total


def test_the_config_is_written_out(folder: Path) -> None:
    path = folder / "config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key not in ("rms_norm_eps", "mlp_bias")}
    path.write_text(json.dumps({**config, "_name_or_path": "/somewhere/else"}))
    checked = check_teacher(folder).config
    assert checked["rms_norm_eps"] == AutoConfig.from_pretrained(folder).rms_norm_eps
    assert checked["head_dim"] == 8
    assert checked["mlp_bias"] is False
    assert "_name_or_path" not in checked


def test_the_digest_is_of_the_content_and_not_of_the_place(folder: Path, tmp_path: Path) -> None:
    digest = check_teacher(folder).digest
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "README.md").write_text("not part of the model")
    assert check_teacher(copy).digest == digest
    (copy / "tokenizer_config.json").write_text("{}")
    assert check_teacher(copy).digest != digest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
        ({"model_type": "gpt2"}, "model_type: expected one of gemma2, .* got .gpt2"),
        ({"hidden_act": "gelu"}, "hidden_act: expected silu or swish, got 'gelu'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"hidden_size": 37, "head_dim": 8}, "hidden_size: expected a multiple of num_attention_heads=4, as transformers' llama wants it, got 37"),
        ({"intermediate_size": 21}, r"expected 19620 as config.json says, got 19296 in the safetensors files; 9 tensors differ"),
        ({"num_hidden_layers": 2}, "no such tensor"),
        ({"num_hidden_layers": 4}, "missing"),
        ({"attention_bias": True}, "missing"),
    ],
)
def test_a_config_that_cannot_be_trusted_is_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    change_config(folder, **changes)
    with pytest.raises(TeacherUnavailable, match=message):
        check_teacher(folder)


@pytest.mark.parametrize("content", ["not json", "[]"])
def test_a_config_that_is_no_json_object_is_refused(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(TeacherUnavailable, match=r"config\.json: expected"):
        check_teacher(folder)


@pytest.mark.parametrize(
    ("remove", "message"),
    [(["config.json"], r"config\.json: expected a file"), (["model.safetensors"], "no weights"), (["tokenizer.json"], "expected a tokenizer")],
)
def test_an_incomplete_folder_is_refused(folder: Path, remove: list[str], message: str) -> None:
    for name in remove:
        (folder / name).unlink()
    with pytest.raises(TeacherUnavailable, match=message):
        check_teacher(folder)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TeacherUnavailable, match="got no folder"):
        check_teacher(tmp_path / "nothing")


def test_pickles_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(TeacherUnavailable, match=r"only pytorch_model\.bin \(pickles are never loaded"):
        check_teacher(folder)


def test_a_broken_weight_file_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(TeacherUnavailable, match="expected a safetensors file"):
        check_teacher(folder)


def test_a_tokenizer_with_code_is_refused(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}))
    with pytest.raises(TeacherUnavailable, match=r"tokenizer_config\.json: expected no auto_map"):
        check_teacher(folder)


def test_a_link_that_leaves_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").rename(tmp_path / "secret.json")
    (folder / "tokenizer.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(TeacherUnavailable, match="got a link to"):
        check_teacher(folder)


def test_a_snapshot_of_the_hub_cache_is_accepted(folder: Path, tmp_path: Path) -> None:
    digest = check_teacher(folder).digest
    blobs, snapshot = tmp_path / "models--org--name" / "blobs", tmp_path / "models--org--name" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        shutil.copy(path, blobs / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    assert check_teacher(snapshot).digest == digest


def test_shards_are_read_through_their_index(folder: Path, random_llama: Callable[..., LlamaForCausalLM]) -> None:
    parameters = check_teacher(folder).parameters
    (folder / "model.safetensors").unlink()
    random_llama(tie_word_embeddings=True).save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert check_teacher(folder).parameters == parameters
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}))
    with pytest.raises(TeacherUnavailable, match=r"expected names of \.safetensors files beside it"):
        check_teacher(folder)


def test_a_tied_head_stored_twice_is_counted_once(folder: Path) -> None:
    parameters = check_teacher(folder).parameters
    change_weights(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    assert check_teacher(folder).parameters == parameters


def test_a_tied_head_that_differs_is_refused(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}))
    with pytest.raises(TeacherUnavailable, match="tie_word_embeddings"):
        check_teacher(folder)


def test_a_rotary_buffer_of_old_checkpoints_is_ignored(folder: Path) -> None:
    parameters = check_teacher(folder).parameters
    change_weights(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert check_teacher(folder).parameters == parameters


def test_integer_weights_are_refused(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(36, dtype=torch.int8)}))
    with pytest.raises(TeacherUnavailable, match=r"model\.norm\.weight: expected dtype F32 or F16 or BF16, got I8"):
        check_teacher(folder)


def test_loading_never_invents_weights(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(TeacherUnavailable, match=r"expected every weight of its config, got none or another size for model\.norm\.weight"):
        load_model(folder, dtype="float32", device="cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_is_loaded_in_the_dtype_asked_for(folder: Path, dtype: str) -> None:
    model = load_model(folder, dtype=dtype, device="cpu")
    assert {str(parameter.dtype) for parameter in model.parameters()} == {f"torch.{dtype}"}
    assert not model.training


def test_an_unknown_dtype_is_an_invalid_spec(folder: Path) -> None:
    with pytest.raises(InvalidSpec, match="dtype: expected float32 or bfloat16, got 'int3'"):
        load_model(folder, dtype="int3", device="cpu")


def test_a_written_checkpoint_loads_with_plain_transformers(model: LlamaForCausalLM, folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "written"
    write_checkpoint(model.state_dict(), config=model.config.to_dict(), tokenizer_from=folder, folder=target)
    reloaded = AutoModelForCausalLM.from_pretrained(target)
    assert all(torch.equal(tensor, reloaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert AutoTokenizer.from_pretrained(target)("w3 w7")["input_ids"] == load_tokenizer(folder)("w3 w7")["input_ids"] == [3, 7]
    assert ("lm_head.weight" in load_file(target / "model.safetensors")) is not model.config.tie_word_embeddings
    assert json.loads((target / "config.json").read_text())["dtype"] == "float32"
    assert not [path for path in target.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 5e5}, {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}])
def test_rope_is_written_for_old_readers_too(
    random_llama: Callable[..., LlamaForCausalLM], folder: Path, tmp_path: Path, rope: dict[str, Any], max_difference: Callable[..., float]
) -> None:
    model = random_llama(rope_parameters=rope)
    write_checkpoint(model.state_dict(), config=model.config.to_dict(), tokenizer_from=folder, folder=tmp_path / "written")
    config = json.loads((tmp_path / "written" / "config.json").read_text())
    assert config["rope_theta"] == 5e5
    assert (config.get("rope_scaling") or {}).get("factor") == rope.get("factor")
    assert max_difference(model, AutoModelForCausalLM.from_pretrained(tmp_path / "written")) == 0


@pytest.mark.reference
@pytest.mark.parametrize(("name", "parameters"), [("stories260K", 260_032), ("tales4M", 4_328_640)])
def test_the_reference_teachers_are_accepted(name: str, parameters: int) -> None:
    if "NAS_REFERENCE" not in os.environ:
        pytest.skip("NAS_REFERENCE is not set: no reference teachers")
    assert check_teacher(Path(os.environ["NAS_REFERENCE"]) / "models" / name).parameters == parameters


def test_a_folder_is_its_own_teacher(folder: Path, tmp_path: Path) -> None:
    assert fetch_teacher(str(folder), cache=tmp_path) == folder


@pytest.mark.parametrize("name", ["/no/such/folder", "../up", "https://host/model", "org/model/more", ""])
def test_what_is_neither_folder_nor_id_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(TeacherUnavailable, match="expected an existing folder or a Hugging Face id"):
        fetch_teacher(name, cache=tmp_path)


def test_without_a_network_the_message_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(module, "snapshot_download", unreachable)
    with pytest.raises(TeacherUnavailable, match=r"hf download org/model --local-dir"):
        fetch_teacher("org/model", cache=tmp_path)
