"""Checkpoints on disk: check a teacher's folder before it is trusted, fetch it, load it, write ours.

Loads nothing but safetensors and never runs code that came with a model. Says nothing about which weights matter
(importance.py) and cuts nothing (slicing.py).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from nas.architecture import Architecture, read_architecture
from nas.compress.experts import by_file_names
from nas.compress.untrusted import (
    CONFIG_FILE,
    GENERATION_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILES,
    check_size,
    clean_config,
    clean_view,
    inside,
    read_json,
    tokenizer_files,
)
from nas.cost import count_parameters
from nas.errors import InvalidSpec, Problem, TeacherUnavailable
from nas.families import Source, Weight
from nas.files import file_digest, whole_file, write_json

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_STORED_DTYPES = ("F32", "F16", "BF16")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_BUFFERS = ("rotary_emb.inv_freq",)  # Llama-2 files of 2023 still carry this buffer; transformers recomputes it


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    """A checked folder: it is safe to load, and its tensors are the ones that its config promises."""

    path: Path
    files: tuple[str, ...]
    """Names of all that is read of the folder."""
    digest: str
    """sha256 over name and content of config, safetensors and tokenizer files: equal folders, equal digests."""
    config: dict[str, Any]
    """Its config.json, with every number that pruning changes or reads written out."""
    architecture: Architecture
    parameters: int
    """Counted from the safetensors headers; a tied head once."""


def check_teacher(folder: Path) -> Teacher:
    """Refuse whatever is unsafe, incomplete or of an unknown family; reads headers, but no weights except for the digest.

    Raises:
        TeacherUnavailable: what is wrong, with the file or field, the expected and what was found.
    """
    if not folder.is_dir():
        raise TeacherUnavailable(f"{folder}: expected a folder with {CONFIG_FILE}, safetensors and tokenizer files, got no folder")
    config = _explicit_config(_check_config(read_json(folder, name=CONFIG_FILE)))
    architecture = read_architecture(config)
    check_size(architecture)
    weight_files = _weight_files(folder)
    parameters = _check_weights([inside(folder, name=name) for name in weight_files], architecture=architecture)
    beside = list(tokenizer_files(folder))
    tokenizer = [name for name in beside if name != GENERATION_FILE]
    if not set(tokenizer) & set(_VOCABULARY_FILES):
        raise TeacherUnavailable(f"{folder}: expected a tokenizer ({' or '.join(_VOCABULARY_FILES)}), got none")
    if TOKENIZER_CONFIG_FILE in tokenizer:
        _refuse_code(read_json(folder, name=TOKENIZER_CONFIG_FILE), name=TOKENIZER_CONFIG_FILE)
    digest = _digest(folder, names=[CONFIG_FILE, *weight_files, *tokenizer])
    files = (CONFIG_FILE, *weight_files, *beside)
    return Teacher(path=folder, files=files, digest=digest, config=config, architecture=architecture, parameters=parameters)


def check_context(sequence_length: int, *, name: str, model: Teacher) -> list[Problem]:
    """The problem of a sequence that is longer than a model's context; `name` is what the user calls the model."""
    context = model.config.get("max_position_embeddings")
    if not isinstance(context, int) or sequence_length <= context:
        return []
    return [Problem(field="sequence_length", expected=f"at most the {name}'s context of {context}", got=str(sequence_length))]


def fetch_teacher(name: str, *, cache: Path) -> Path:
    """The folder of a teacher: `name` itself where it is one, else a Hugging Face id, downloaded into `cache` once.

    Raises:
        TeacherUnavailable: no such folder, not an id, or the hub cannot be reached or refuses; the message says what to do.
    """
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return folder
    if not _HUB_ID.fullmatch(name):
        raise TeacherUnavailable(f"teacher: expected an existing folder or a Hugging Face id such as org/model, got {name!r}")
    patterns = [CONFIG_FILE, GENERATION_FILE, INDEX_FILE, "model*.safetensors", *TOKENIZER_FILES]
    try:
        return Path(snapshot_download(name, cache_dir=cache, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError) as refused:
        raise TeacherUnavailable(
            f"{name}: the Hugging Face hub refused: {refused}; check the id and the rights of your token (`hf auth login`), or give a local folder"
        ) from refused
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as unreachable:
        raise TeacherUnavailable(
            f"{name}: no such local folder, and the Hugging Face hub cannot be reached; download it where there is a network "
            f"(`hf download {name} --local-dir DIR`), copy the folder here and give its path"
        ) from unreachable


def load_model(folder: Path, *, dtype: str, device: str) -> PreTrainedModel:
    """The checkpoint in evaluation mode; every weight comes from its files, none is invented.

    Raises:
        InvalidSpec: unknown dtype.
        TeacherUnavailable: not loadable, or its files lack weights of its config.
    """
    attention = read_architecture(read_json(folder, name=CONFIG_FILE)).family.attention
    try:
        with clean_view(folder, weight_files=_weight_files(folder)) as view:
            model, loading = AutoModelForCausalLM.from_pretrained(
                view,
                dtype=resolve_dtype(dtype),
                attn_implementation=attention,
                trust_remote_code=False,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
    except (OSError, SafetensorError, RuntimeError) as unreadable:
        raise TeacherUnavailable(f"{folder}: cannot be loaded: {unreadable}") from unreadable
    model.config._name_or_path = str(folder)
    if wrong := sorted(loading["missing_keys"]) + [key[0] for key in loading["mismatched_keys"]]:
        # transformers would go on with random numbers in their place
        raise TeacherUnavailable(f"{folder}: expected every weight of its config, got none or another size for {', '.join(wrong[:4])}")
    return model.to(device).eval()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder, from its own files."""
    try:
        with clean_view(folder) as view:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(view, trust_remote_code=False, local_files_only=True)
    except TeacherUnavailable:
        raise
    except Exception as unreadable:  # the tokenizers library raises plain Exception for a file that it cannot read
        raise TeacherUnavailable(f"{folder}: its tokenizer cannot be loaded: {unreadable}") from unreadable
    tokenizer.name_or_path = str(folder)
    return tokenizer


def load_config(folder: Path) -> PreTrainedConfig:
    """The config of a checkpoint folder as transformers resolves it, without what its family does not know.

    Raises:
        TeacherUnavailable: no JSON, of an unknown family, or refused by transformers.
    """
    return _resolve(read_json(folder, name=CONFIG_FILE))


def resolve_dtype(name: str) -> torch.dtype:
    """The torch dtype of a name in `DTYPES`."""
    if name not in DTYPES:
        raise InvalidSpec(Problem(field="dtype", expected=" or ".join(DTYPES), got=repr(name)))
    return DTYPES[name]


def checkpoint_weights(
    architecture: Architecture, *, num_hidden_layers: int, num_experts: int | None = None
) -> Iterator[tuple[str, Weight, int | None, int | None]]:
    """Every tensor of a checkpoint of that depth: its name, its row in the family's table, its layer, its expert.

    Args:
        num_experts: None: the architecture's.
    """
    experts = range(num_experts or architecture.shape.num_experts or 0)
    for weight in architecture.weights:
        for layer in range(num_hidden_layers) if weight.per_layer else (None,):
            for expert in experts if weight.per_expert else (None,):
                yield weight.name.format(layer=layer, expert=expert), weight, layer, expert


def checkpoint_sources(architecture: Architecture, *, num_hidden_layers: int) -> Iterator[Source]:
    """Every source of a model of that depth, with layers and experts written into its names: kind by kind, the layers of each in order.

    What the experts read together is one source; the neurons of each are one of their own, expert by expert within a layer.
    """
    experts = range(architecture.shape.num_experts or 0)
    for source in architecture.family.sources:
        for layer in range(num_hidden_layers) if "{layer}" in source.readers[0] else (0,):
            for own in ([expert] for expert in experts) if "{expert}" in source.readers[0] else (experts,):
                readers = tuple(reader.format(layer=layer, expert=expert) for reader in source.readers for expert in (own if "{expert}" in reader else (None,)))
                yield Source(axis=source.axis, readers=readers, norm=source.norm and source.norm.format(layer=layer))


def write_checkpoint(state_dict: Mapping[str, Tensor], *, config: Mapping[str, Any], tokenizer_from: Path, folder: Path) -> None:
    """A folder that plain AutoModelForCausalLM and AutoTokenizer load. The config is written last: with it the folder is whole.

    Args:
        state_dict: a model's, or a sliced one under the file's names; a tied head in it is not written.
        config: Hugging Face config of that state; `dtype` is taken from the tensors.
        tokenizer_from: the folder whose tokenizer (and generation config) the checkpoint gets.
    """
    folder.mkdir(parents=True, exist_ok=True)
    architecture = read_architecture(config)
    state_dict = by_file_names(state_dict, architecture=architecture)
    names = [name for name, _, _, _ in checkpoint_weights(architecture, num_hidden_layers=architecture.shape.num_hidden_layers)]
    tensors = {name: state_dict[name].detach().cpu().contiguous() for name in names}
    dtypes = {tensor.dtype for tensor in tensors.values()}
    assert len(dtypes) == 1, f"a checkpoint has one dtype, got {dtypes}"
    assert sum(tensor.numel() for tensor in tensors.values()) == count_parameters(architecture, architecture.shape).total

    with whole_file(folder / WEIGHTS_FILE) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    if tokenizer_from.resolve() != folder.resolve():
        for name, content in tokenizer_files(tokenizer_from).items():
            with whole_file(folder / name) as temporary:
                temporary.write_bytes(content)
    write_json(
        {**config, **_legacy_rope(config), **architecture.config_values(architecture.shape), "dtype": str(dtypes.pop()).removeprefix("torch.")},
        target=folder / CONFIG_FILE,
    )


def _refuse_code(config: Mapping[str, Any], *, name: str) -> None:
    if config.get("auto_map"):
        raise TeacherUnavailable(f"{name}: expected no auto_map (code that comes with a model is never run), got {config['auto_map']!r}")


def _check_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config, once nothing in it is unsafe, and nothing but defaults is missing."""
    family = read_architecture(config).family
    if not family.code_taken_over:
        _refuse_code(config, name=CONFIG_FILE)
    if config.get("quantization_config"):
        raise TeacherUnavailable(f"{CONFIG_FILE}: quantization_config: expected none (plain float weights), got {config['quantization_config']!r}")
    if (activation := config.get(family.activation_key, family.activations[0])) not in family.activations:
        raise TeacherUnavailable(f"{CONFIG_FILE}: {family.activation_key}: expected {' or '.join(family.activations)}, got {activation!r}")
    if unknown := [key for key, value in config.items() if "layer" in key and isinstance(value, list) and value and key not in family.layer_lists]:
        raise TeacherUnavailable(
            f"{CONFIG_FILE}: {unknown[0]}: expected no such list ({family.model_type} has one entry per layer only in "
            f"{', '.join(family.layer_lists) or 'none'}; it could not follow removed layers), got {config[unknown[0]]!r}"
        )
    return config


def _explicit_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as transformers resolves it: nothing is left to a default, which differs between families and versions."""
    explicit = {**clean_config(config), **_resolve(config).to_diff_dict()}
    for stale in ("_name_or_path", "torch_dtype"):  # a path of another machine; the old spelling of dtype
        explicit.pop(stale, None)
    architecture = read_architecture(explicit)
    return {**explicit, **architecture.config_values(architecture.shape)}


def _resolve(config: Mapping[str, Any]) -> PreTrainedConfig:
    model_type = read_architecture(config).model_type
    try:
        return CONFIG_MAPPING[model_type].from_dict(clean_config(config))
    except Exception as refused:  # transformers' validators raise their own types, ValueError, KeyError and TypeError
        raise TeacherUnavailable(f"{CONFIG_FILE}: transformers refuses it: {refused}") from refused


def _legacy_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """transformers 4 and older vLLM do not know `rope_parameters`: without these keys they run at theta 10000, silently."""
    rope = config.get("rope_parameters") or {}
    local = rope.get("sliding_attention")  # Gemma 3: one set per layer type; the old keys name the local base apart
    rope = rope.get("full_attention", rope)
    if "rope_theta" not in rope:
        return {}
    legacy = {"rope_theta": rope["rope_theta"]} | ({"rope_local_base_freq": local["rope_theta"]} if local else {})
    if "partial_rotary_factor" in rope:
        legacy["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if rope.get("rope_type", "default") != "default":
        legacy["rope_scaling"] = {key: rope[key] for key in rope if key != "rope_theta"}
    return legacy


def _weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files that transformers would load, with the index where there is one."""
    if (folder / WEIGHTS_FILE).exists():
        return [WEIGHTS_FILE]
    if not (folder / INDEX_FILE).exists():
        other = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".gguf", ".safetensors"))
        got = f"only {', '.join(other[:4])} (pickles are never loaded; convert them to safetensors first)" if other else "no weights"
        raise TeacherUnavailable(f"{folder}: expected {WEIGHTS_FILE} or {INDEX_FILE}, got {got}")
    weight_map = read_json(folder, name=INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise TeacherUnavailable(f"{folder / INDEX_FILE}: weight_map: expected tensor names with their files, got {type(weight_map).__name__}")
    shards = sorted(set(weight_map.values()))
    if strange := [name for name in shards if Path(name).name != name or not name.endswith(".safetensors")]:
        raise TeacherUnavailable(f"{folder / INDEX_FILE}: weight_map: expected names of .safetensors files beside it, got {strange[0]!r}")
    return [INDEX_FILE, *shards]


def _check_weights(files: list[Path], *, architecture: Architecture) -> int:
    """Parameters that the files hold, once their names, sizes and dtypes are those of the architecture."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        if path.name.endswith(".json"):
            continue
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                    tensor = file.get_slice(name)
                    if (dtype := tensor.get_dtype()) not in _STORED_DTYPES and not name.endswith(_BUFFERS):
                        raise TeacherUnavailable(f"{path.name}: {name}: expected dtype {' or '.join(_STORED_DTYPES)}, got {dtype}")
                    shapes[name] = tuple(tensor.get_shape())
        except SafetensorError as broken:
            raise TeacherUnavailable(f"{path}: expected a safetensors file, got {broken}") from broken
    _drop_redundant(shapes, files=files, architecture=architecture)

    shape = architecture.shape
    weights = checkpoint_weights(architecture, num_hidden_layers=shape.num_hidden_layers)
    sizes = architecture.sizes(shape)
    expected = {name: weight.lengths(sizes) for name, weight, _, _ in weights}
    counted, promised = sum(map(prod, shapes.values())), count_parameters(architecture, shape).total
    wrong = [
        f"{name} {shapes.get(name, 'missing')}, expected {expected.get(name, 'no such tensor')}"
        for name in {**expected, **shapes}
        if expected.get(name) != shapes.get(name)
    ]
    if wrong or counted != promised:
        found = f"got {counted} in the safetensors files; {len(wrong)} tensors differ: {'; '.join(wrong[:3])}"
        raise TeacherUnavailable(f"parameters: expected {promised} as {CONFIG_FILE} says, {found}")
    return counted


def _drop_redundant(shapes: dict[str, tuple[int, ...]], *, files: list[Path], architecture: Architecture) -> None:
    """Take out what transformers ignores: old buffers, and a tied head that is stored a second time."""
    for name in [name for name in shapes if name.endswith(_BUFFERS)]:
        del shapes[name]
    table = next(weight.name for weight in architecture.weights if weight.in_embedding)
    absent = {weight.name for weight in architecture.family.weights if weight.in_embedding} - {weight.name for weight in architecture.weights}
    for head in absent & shapes.keys():
        if table in shapes and not torch.equal(_read_tensor(files, name=head), _read_tensor(files, name=table)):
            raise TeacherUnavailable(f"{CONFIG_FILE}: tie_word_embeddings: expected false, as the files hold a {head} that differs from {table}, got true")
        del shapes[head]


def _read_tensor(files: list[Path], *, name: str) -> Tensor:
    for path in files:
        if not path.name.endswith(".json"):
            with safe_open(path, framework="pt") as file:
                if name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                    tensor: Tensor = file.get_tensor(name)
                    return tensor
    raise AssertionError(f"{name} is in none of the files")


def _digest(folder: Path, *, names: list[str]) -> str:
    lines = [f"{name}\0{file_digest(inside(folder, name=name))}\n" for name in sorted(names)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
