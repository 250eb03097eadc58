"""What of a model's folder is read at all, and as what. A folder from outside is never handed to transformers as it is.

transformers reads more than a model needs: code named by `auto_map`, adapters that name another model, chat templates, attention kernels
from a hub, tokenizer files by path. So it is shown a folder of our own (`clean_view`): links to the safetensors files, the config with the
keys that the family's config class knows, the tokenizer's files under their own names, its config without code or paths, and nothing else.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from nas.architecture import Architecture
from nas.errors import TeacherUnavailable
from nas.families import FAMILIES

CONFIG_FILE = "config.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    TOKENIZER_CONFIG_FILE,
    "vocab.json",
)
GENERATION_FILE = "generation_config.json"

MAX_JSON_BYTES = 64 * 2**20
"""The index of a thousand shards has 20 MB; a config a few kB."""
MAX_TOKENIZER_BYTES = 512 * 2**20
MAX_TENSORS = 2**20
"""Layers x experts x weights: a config can promise more than fits any machine, and each is a name of ours."""
MAX_SIZE = 2**24
"""Of any axis; the largest vocabularies have 2^19."""

_FURTHER_KEYS = frozenset({"model_type", "head_dim", "torch_dtype", "rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor"})
"""What models read, or config classes take over from older versions, without a field of that name."""
_PATH_ENDINGS = ("_file", "_files", "_path", "_dir")
_NO_OPTIONS = frozenset({"auto_map", "init_inputs", "local_files_only", "is_local", "token", "trust_remote_code", "gguf_file", "mistral_format"})


def read_json(folder: Path, *, name: str) -> dict[str, Any]:
    """A JSON object from a file of the folder.

    Raises:
        TeacherUnavailable: not there, outside of the folder, too large, too deep, no object, or with a number that is not finite.
    """
    path = inside(folder, name=name)
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise TeacherUnavailable(f"{folder / name}: expected at most {MAX_JSON_BYTES} bytes, got {size}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number, parse_float=_finite)
    except (ValueError, RecursionError) as broken:
        raise TeacherUnavailable(f"{folder / name}: expected JSON, got {broken}") from broken
    if not isinstance(value, dict):
        raise TeacherUnavailable(f"{folder / name}: expected a JSON object, got {type(value).__name__}")
    return value


def inside(folder: Path, *, name: str) -> Path:
    """The file behind `folder/name`; a link may stay in the folder, or in the hub cache's own folder of this model.

    Raises:
        TeacherUnavailable: it leaves them, or there is no regular file.
    """
    real = folder.resolve()
    roots = [real, *(parent for parent in real.parents if parent.name.startswith("models--"))]
    try:
        path = (folder / name).resolve()
        is_file = path.is_file()
    except (OSError, RuntimeError) as circle:
        raise TeacherUnavailable(f"{folder / name}: expected a file, got {circle}") from circle
    if not any(path.is_relative_to(root) for root in roots):
        raise TeacherUnavailable(f"{folder / name}: expected a file inside the teacher's folder, got a link to {path}")
    if not is_file:
        raise TeacherUnavailable(f"{folder / name}: expected a file, got nothing")
    return path


def clean_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a config that its family's config class knows. `auto_map`, kernels to fetch and whatever else stands there are left out."""
    family = FAMILIES[config["model_type"]]
    class_ = CONFIG_MAPPING[family.model_type]
    ours = {*family.layer_lists, *family.layer_thresholds, *family.layer_patterns, *family.expert_keys, *family.presumed, family.eps_key, family.activation_key}
    known = {field.name for field in dataclasses.fields(class_)} | set(class_.attribute_map) | ours | _FURTHER_KEYS
    return {key: value for key, value in config.items() if key in known}


def check_size(architecture: Architecture) -> None:
    """Refuse a config whose tensors could not even be named.

    Raises:
        TeacherUnavailable: an axis, or the number of tensors, is beyond any model.
    """
    shape = architecture.shape
    sizes = {**shape.as_dict(), "vocab_size": architecture.vocab_size}
    if large := {name: size for name, size in sizes.items() if size is not None and size > MAX_SIZE}:
        name, size = next(iter(large.items()))
        raise TeacherUnavailable(f"{CONFIG_FILE}: {name}: expected at most {MAX_SIZE}, got {size}")
    num_tensors = shape.num_hidden_layers * (shape.num_experts or 1) * len(architecture.weights)
    if num_tensors > MAX_TENSORS:
        raise TeacherUnavailable(f"{CONFIG_FILE}: num_hidden_layers and experts: expected at most {MAX_TENSORS} tensors, got {num_tensors}")


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """The tokenizer's files, and the generation config beside them, by name; the tokenizer's config without code and without paths.

    Raises:
        TeacherUnavailable: a file is too large or outside of the folder, or the config is no JSON object.
    """
    files = {}
    for name in (*TOKENIZER_FILES, GENERATION_FILE):
        if not os.path.lexists(folder / name):
            continue
        path = inside(folder, name=name)
        if (size := path.stat().st_size) > MAX_TOKENIZER_BYTES:
            raise TeacherUnavailable(f"{folder / name}: expected at most {MAX_TOKENIZER_BYTES} bytes, got {size}")
        files[name] = path.read_bytes()
    if TOKENIZER_CONFIG_FILE in files:
        options = read_json(folder, name=TOKENIZER_CONFIG_FILE)
        clean = {key: value for key, value in options.items() if key not in _NO_OPTIONS and not key.endswith(_PATH_ENDINGS)}
        if clean != options:
            files[TOKENIZER_CONFIG_FILE] = json.dumps(clean, indent=2).encode()
    return files


@contextmanager
def clean_view(folder: Path, *, weight_files: Collection[str] = ()) -> Iterator[Path]:
    """A folder of our own with what may be read of another one: config, tokenizer, and links to these weight files. It goes when the block ends.

    Raises:
        TeacherUnavailable: what is there is not what it should be.
    """
    config = read_json(folder, name=CONFIG_FILE)
    with tempfile.TemporaryDirectory(prefix="nas-model-") as temporary:
        view = Path(temporary)
        (view / CONFIG_FILE).write_text(json.dumps(clean_config(config)), encoding="utf-8")
        for name, content in tokenizer_files(folder).items():
            (view / name).write_bytes(content)
        for name in weight_files:
            (view / name).symlink_to(inside(folder, name=name))
        yield view


def _no_number(text: str) -> float:
    raise ValueError(f"{text}, which is no number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text}, which is no finite number")
    return number
