"""Hostile model folders: nothing that they carry runs, nothing outside of them is read, and what is refused says why, at once.

Every attack leaves a canary if it works: a file that its code would make, or the content of a file that lies outside.
"""

from __future__ import annotations

import inspect
import json
import os
import pickle
import re
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, LlamaForCausalLM

from nas.compress.corpus import check_corpus
from nas.compress.teacher import check_teacher, load_config, load_model, load_tokenizer, write_checkpoint
from nas.compress.untrusted import MAX_JSON_BYTES, clean_config, clean_view, tokenizer_files
from nas.errors import CorpusUnavailable, TeacherUnavailable
from nas.families import FAMILIES

SECRET = "the secret that lies outside"


@pytest.fixture
def folder(random_llama: Callable[..., LlamaForCausalLM], save_teacher: Callable[..., Path], tmp_path: Path) -> Path:
    return save_teacher(random_llama(tie_word_embeddings=True), folder=tmp_path / "teacher")


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret.json"
    path.write_text(json.dumps({"secret": SECRET}))
    return path


class Exploit:
    """Makes the canary when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.canary,)


def change(folder: Path, name: str, **changes: Any) -> None:
    path = folder / name
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**old, **changes}))


def use(folder: Path, *, into: Path) -> None:
    """Everything that the service does with a teacher's folder."""
    teacher = check_teacher(folder)
    model = load_model(folder, dtype="float32", device="cpu")
    load_tokenizer(folder)("w1 w2")
    load_config(folder)
    write_checkpoint(model.state_dict(), config=teacher.config, tokenizer_from=folder, folder=into)


def everything(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


# -- code ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_that_comes_with_a_model_is_refused_and_never_runs(folder: Path, canary: Path, tmp_path: Path, name: str) -> None:
    (folder / "evil.py").write_text(f"from pathlib import Path\nPath({str(canary)!r}).touch()\n")
    change(folder, name, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.T", None]})
    with pytest.raises(TeacherUnavailable, match="auto_map"):
        use(folder, into=tmp_path / "out")
    for load in (lambda: load_model(folder, dtype="float32", device="cpu"), lambda: load_tokenizer(folder), lambda: load_config(folder)):
        load()  # also where the check was not asked first, as after a change behind its back
    assert not canary.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "training_args.bin", "optimizer.pt"])
def test_pickles_are_never_read(folder: Path, canary: Path, tmp_path: Path, name: str) -> None:
    (folder / name).write_bytes(pickle.dumps(Exploit(canary)))
    torch.save({"weight": Exploit(canary)}, folder / f"torch_{name}")
    use(folder, into=tmp_path / "out")
    (folder / "model.safetensors").unlink()
    with pytest.raises(TeacherUnavailable, match="pickles are never loaded"):
        use(folder, into=tmp_path / "again")
    with pytest.raises(TeacherUnavailable):
        load_model(folder, dtype="float32", device="cpu")
    assert not canary.exists()


def test_a_pickle_under_the_name_of_a_safetensors_file_is_refused(folder: Path, canary: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Exploit(canary)))
    with pytest.raises(TeacherUnavailable, match="expected a safetensors file"):
        use(folder, into=tmp_path / "out")
    with pytest.raises(TeacherUnavailable):
        load_model(folder, dtype="float32", device="cpu")
    assert not canary.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"_attn_implementation_internal": "evil/kernels:run"},
        {"_attn_implementation": "evil/kernels"},
        {"attn_implementation": "evil/kernels:run"},
        {"experts_implementation": "evil/kernels"},
        {"kernel_config": {"kernel_mapping": {"RMSNorm": "evil/kernels:Norm"}}},
        {"per_layer_config": {"0": {"hidden_size": 8}}},
        {"custom_pipelines": {"text-generation": {"impl": "evil.Pipeline"}}},
        {"trust_remote_code": True},
    ],
)
def test_what_would_fetch_other_code_is_left_out_of_the_config(folder: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    change(folder, "config.json", **changes)
    use(folder, into=tmp_path / "out")
    model = load_model(folder, dtype="float32", device="cpu")
    assert model.config._attn_implementation == FAMILIES["llama"].attention
    assert "evil" not in json.dumps(check_teacher(folder).config)
    assert b"evil" not in everything(tmp_path / "out")


def test_an_adapter_beside_the_weights_is_not_read(folder: Path, secret: Path, tmp_path: Path) -> None:
    change(folder, "adapter_config.json", base_model_name_or_path=str(secret.parent), peft_type="LORA", auto_mapping={"parent_library": "evil"})
    with clean_view(folder, weight_files=["model.safetensors"]) as view:
        assert {path.name for path in view.iterdir()} <= {
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
            "generation_config.json",
        }
    use(folder, into=tmp_path / "out")


# -- files outside ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "special_tokens_map.json", "model.safetensors"],
)
@pytest.mark.parametrize("how", ["absolute", "relative", "through a folder"])
def test_a_link_out_of_the_folder_is_refused_whatever_its_name(folder: Path, secret: Path, tmp_path: Path, name: str, how: str) -> None:
    (folder / name).unlink(missing_ok=True)
    if how == "through a folder":
        (folder / "sub").symlink_to(tmp_path)
        (folder / name).symlink_to(Path("sub") / secret.name)
    else:
        (folder / name).symlink_to(secret if how == "absolute" else Path("..") / secret.name)
    with pytest.raises(TeacherUnavailable, match="got a link to"):
        use(folder, into=tmp_path / "out")
    assert not (tmp_path / "out").exists() or SECRET.encode() not in everything(tmp_path / "out")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_link_in_a_circle_or_to_nothing_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to(name)
    with pytest.raises(TeacherUnavailable, match="expected a"):
        use(folder, into=tmp_path / "out")
    (folder / name).unlink()
    (folder / name).symlink_to("nothing.json")
    with pytest.raises(TeacherUnavailable, match="expected a"):
        use(folder, into=tmp_path / "out")


def test_a_pipe_is_refused_and_never_waited_for(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")
    with pytest.raises(TeacherUnavailable, match="expected a file"):
        use(folder, into=tmp_path / "out")


@pytest.mark.parametrize("key", ["vocab_file", "merges_file", "tokenizer_file", "special_tokens_map_file", "chat_template_file", "spm_file"])
def test_paths_in_the_tokenizers_config_are_not_followed(folder: Path, tmp_path: Path, key: str) -> None:
    stranger = tmp_path / "tokenizer.json"
    stranger.write_text((folder / "tokenizer.json").read_text().replace("w1", SECRET))
    change(folder, "tokenizer_config.json", **{key: str(stranger)})
    assert SECRET not in load_tokenizer(folder).get_vocab()
    use(folder, into=tmp_path / "out")
    assert str(stranger).encode() not in everything(tmp_path / "out")


def test_a_versioned_tokenizer_file_does_not_lead_out(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.1.0.0.json").write_text((folder / "tokenizer.json").read_text().replace("w1", SECRET))
    change(folder, "tokenizer_config.json", fast_tokenizer_files=["../tokenizer.1.0.0.json", "tokenizer.json"])
    assert SECRET not in load_tokenizer(folder).get_vocab()


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "model.bin", "..", ""])
def test_an_index_names_only_safetensors_beside_it(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    change(folder, "model.safetensors.index.json", weight_map={"model.norm.weight": name})
    with pytest.raises(TeacherUnavailable, match="weight_map"):
        use(folder, into=tmp_path / "out")


def test_a_corpus_folder_keeps_to_its_own_files(tmp_path: Path, secret: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.txt").write_text("some text\n")
    (corpus / "b.txt").symlink_to("a.txt")  # inside: fine
    check_corpus([corpus])
    (corpus / "c.jsonl").symlink_to(secret)
    with pytest.raises(CorpusUnavailable, match="expected a file inside the corpus's folder, got a link to"):
        check_corpus([corpus])


# -- sizes -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "expected JSON"),
        ("[" * 100_000, "expected JSON"),
        ('{"rms_norm_eps": NaN}', "no number"),
        ('{"rms_norm_eps": -Infinity}', "no number"),
        ('{"rms_norm_eps": 1e400}', "no finite number"),
        ('{"vocab_size": ' + "9" * 5000 + "}", "expected JSON"),
        ("\ud800".encode("utf-16", "surrogatepass"), "expected JSON"),
    ],
)
def test_json_that_is_meant_to_break_the_reader_is_refused(folder: Path, content: str | bytes, message: str) -> None:
    (folder / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TeacherUnavailable, match=message):
        check_teacher(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_huge_file_is_refused_unread(folder: Path, name: str) -> None:
    os.truncate(folder / name, MAX_JSON_BYTES * 1000)  # sparse: it takes no room, and reading it would take minutes
    started = time.monotonic()
    with pytest.raises(TeacherUnavailable, match="expected at most"):
        check_teacher(folder)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9},
        {"vocab_size": 10**12},
        {"hidden_size": 2**40, "head_dim": 8},
        {"intermediate_size": 10**15},
        {"num_hidden_layers": 10**300},
    ],
)
def test_a_config_that_promises_the_impossible_is_refused_at_once(folder: Path, changes: dict[str, Any]) -> None:
    change(folder, "config.json", **changes)
    started = time.monotonic()
    with pytest.raises(TeacherUnavailable):
        check_teacher(folder)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    "content",
    [
        b"",
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 2**31) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 66) + b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,9999999999999]}}',
    ],
)
def test_a_header_that_lies_is_refused(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(TeacherUnavailable, match="expected a safetensors file"):
        check_teacher(folder)


def test_a_tokenizer_that_is_none_is_refused_when_it_is_loaded(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Evil"}}')
    with pytest.raises(TeacherUnavailable, match="tokenizer cannot be loaded"):
        load_tokenizer(folder)


@given(junk=st.binary(max_size=300))
def test_any_bytes_as_a_file_end_in_our_own_error(junk: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("junk")
    (folder / "config.json").write_bytes(junk)
    with pytest.raises(TeacherUnavailable):
        check_teacher(folder)


# -- and what is honest stays ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_key_that_a_family_s_code_reads_is_let_through(model_type: str) -> None:
    class_ = CONFIG_MAPPING[model_type]
    read: set[str] = set()
    for path in Path(inspect.getfile(class_)).parent.glob("modeling_*.py"):
        text = path.read_text(encoding="utf-8")
        read |= set(re.findall(r"config\.([a-z_0-9]+)", text)) | set(re.findall(r'getattr\((?:self\.)?config, "([a-z_0-9]+)"', text))
    # What the class has itself (methods, switches of how it is run) is not in a file; Gemma 3's module holds its images' model, too.
    others = {"text_config", "vision_config", "image_token_id", "mm_tokens_per_image"} if model_type == "gemma3_text" else set()
    asked = {key for key in read - others if not hasattr(class_, key)}
    assert asked <= set(clean_config({"model_type": model_type, **dict.fromkeys(asked, 1)}))


def test_a_clean_folder_is_seen_as_it_is(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    with clean_view(folder, weight_files=["model.safetensors"]) as view:
        assert json.loads((view / "config.json").read_text()) == config
        assert all((view / name).read_bytes() == content == (folder / name).read_bytes() for name, content in tokenizer_files(folder).items())
        assert load_file(view / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    assert not view.exists()
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors")  # the link's target is untouched
