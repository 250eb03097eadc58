"""What training or preparing takes, in bytes, computed from the shapes before anything is loaded. Closed form, no torch.

The peak of a training step is the largest of its phases; what each holds follows from what autograd keeps of a decoder layer:

    teacher    its weights, and one layer's outputs of a forward pass that keeps nothing
    loss       what the student's layers keep for the backward pass, a chunk of logits, the head's gradient
    backward   gradients grow while the kept activations shrink; with more than one micro-batch both are there whole
    step       gradients, and the moments of one weight where they are not kept as float32 on the device

Training on stored signals has no teacher phase.

`fit_training` chooses among the settings that change no result (micro-batch, checkpointing, where the moments lie), and last bfloat16 moments, or
says with all numbers why nothing fits. `tests/benchmarks/memory.py` prints the estimate beside measured peaks.
Reads no device: compress/device.py does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from nas.architecture import Architecture
from nas.cost import count_parameters
from nas.errors import DoesNotFit
from nas.families import Axis
from nas.shape import Shape

Moments = Literal["float32", "offloaded", "bfloat16"]
"""The optimiser's state: float32 beside the weights; float32 in the host's memory, the same result for transfers of twice its size a step;
bfloat16 beside the weights, half of it."""
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**27}
"""Logits that the losses hold at once, in elements: four megabytes on the CPU, half a GiB on CUDA."""
MIN_CHUNK_TOKENS = 64
"""The head's gradient is read and written once per chunk, so a large vocabulary needs some tokens to pay for it. On a CPU
256 tokens instead of 64 take 12 % less time at a vocabulary of 4,096, 7 % at 32,000 and none at 512 (LOG.md)."""
_CHUNK_COPIES = 5
"""Float32 arrays of a chunk's size that the KL and its gradient hold at once: the logits and log-probabilities of both, and the probabilities."""
_CPU_SLACK = 0.3
"""Share of the activations that glibc's allocator holds on top of them, measured (tests/benchmarks/memory.py): it keeps freed blocks of up to
32 MB, and fits later ones between them. With checkpointing it is told not to (compress/heap.py)."""
_EFFICIENT_TOKENS = {"cpu": 256, "cuda": 4096}
"""Tokens of a forward pass below which a device is no longer busy: checkpointing is dearer than smaller passes only above it."""
_HEADROOM = 0.05
"""Share of a device that is left free: what the allocator cannot use, and what the closed form does not know."""


def chunk_tokens(*, vocab_size: int, device: str) -> int:
    """Tokens whose logits exist at once in the losses."""
    return max(MIN_CHUNK_TOKENS, CHUNK_ELEMENTS.get(device, CHUNK_ELEMENTS["cpu"]) // vocab_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How a student is trained, as far as memory depends on it."""

    sequence_length: int
    batch_size: int
    """Blocks of a step on this device."""
    micro_batch_size: int
    """Blocks of a forward pass."""
    dtype: str = "float32"
    """Of the arithmetic; weights and gradients are float32."""
    checkpoint_activations: bool = False
    """Keep each layer's input only and run its forward pass again in the backward pass."""
    moments: Moments = "float32"
    optimizer: Literal["adamw", "muon"] = "adamw"
    device: str = "cpu"
    num_shards: int = 1
    """Processes among which weights, gradients and moments are divided (FSDP2); 1: each process holds all."""

    @property
    def micro_tokens(self) -> int:
        return self.micro_batch_size * self.sequence_length


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherMemory:
    """A teacher beside the student."""

    architecture: Architecture
    dtype: str
    stored: bool = False
    """Its final hidden states are read from disk: only its head is in memory."""
    num_shards: int = 1
    """Processes among which its layers are divided."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Bytes at the peak, by what they are for."""

    phase: str
    """The part of the work at which the most is held."""
    device: Mapping[str, int]
    host: Mapping[str, int]
    """In the host's memory where that is not the device's."""

    @property
    def device_bytes(self) -> int:
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())

    def as_dict(self) -> dict[str, object]:
        return {"phase": self.phase, "device_bytes": self.device_bytes, "device": dict(self.device), "host_bytes": self.host_bytes, "host": dict(self.host)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What there is, in bytes, as this process may use it."""

    device: str
    """cpu or cuda."""
    device_bytes: int
    """Free on the device, with what this process already holds there."""
    host_bytes: int
    """Free in the host's memory; on a CPU the same memory."""

    @property
    def usable_bytes(self) -> int:
        return int(self.device_bytes * (1 - _HEADROOM))

    @property
    def usable_host_bytes(self) -> int:
        return int(self.host_bytes * (1 - _HEADROOM))


def training_memory(architecture: Architecture, shape: Shape, *, training: Training, teacher: TeacherMemory | None) -> Estimate:
    """The peak of a training step of a student of `shape`; `teacher` None: trained on stored signals or on the next token."""
    parameters = count_parameters(architecture, shape).total
    own = parameters // training.num_shards + _unsharded(architecture, shape, num_shards=training.num_shards)
    # An expert's two projections of its input lie in one parameter with those of all others.
    largest = max(weight.numel(architecture.sizes(shape)) * (2 * (shape.num_experts or 0) if weight.per_expert else 1) for weight in architecture.weights)
    always = {"student weights (float32)": 4 * own}
    if training.dtype != "float32":
        always[f"student weights ({training.dtype} copies)"] = DTYPE_BYTES[training.dtype] * _multiplied(architecture, shape) // training.num_shards
    state = _moments_bytes(architecture, shape, optimizer=training.optimizer) // training.num_shards
    match training.moments:
        case "float32":
            always["optimiser state (float32)"] = state
        case "bfloat16":
            always["optimiser state (bfloat16)"] = state // 2
        case "offloaded":
            pass
    if teacher is not None:
        always[_teacher_part(teacher)] = _teacher_weights(teacher)
    phases = {
        name: always | parts
        for name, parts in _phases(
            architecture, shape, training=training, teacher=teacher, gradients=4 * own, moment_buffer=0 if training.moments == "float32" else 16 * largest
        ).items()
    }
    phase = max(phases, key=lambda name: sum(phases[name].values()))
    host = {"optimiser state (float32, offloaded)": state} if training.moments == "offloaded" else {}
    return Estimate(phase=phase, device=phases[phase], host=host)


def _moments_bytes(architecture: Architecture, shape: Shape, *, optimizer: str) -> int:
    """AdamW keeps two moments of each weight, Muon one of each matrix inside the layers; float32."""
    single = (_multiplied(architecture, shape) - architecture.vocab_size * shape.hidden_size) if optimizer == "muon" else 0
    return 8 * count_parameters(architecture, shape).total - 4 * single


def inference_memory(teacher: TeacherMemory, *, tokens: int, device: str) -> Estimate:
    """The peak of a forward pass that keeps nothing, logits in chunks."""
    chunk = _CHUNK_COPIES * 4 * chunk_tokens(vocab_size=teacher.architecture.vocab_size, device=device) * teacher.architecture.vocab_size
    parts = {
        _teacher_part(teacher): _teacher_weights(teacher),
        "teacher activations": _inference_activations(teacher, tokens=tokens),
        "a chunk of logits": chunk,
    }
    return Estimate(phase="teacher", device=parts, host={})


def least_training_memory(architecture: Architecture, shape: Shape, *, wanted: Training, teacher: TeacherMemory | None) -> Estimate:
    """The setting of `fit_training` that takes least of the device."""
    settings = _settings(wanted, moments=get_args(Moments))
    return min((training_memory(architecture, shape, training=setting, teacher=teacher) for setting in settings), key=lambda estimate: estimate.device_bytes)


def state_bytes(architecture: Architecture, shape: Shape) -> int:
    """A training checkpoint on disk: weights and two moments, float32."""
    return 12 * count_parameters(architecture, shape).total


def preparation_disk(architecture: Architecture, *, corrected: bool, moments: bool) -> dict[str, int]:
    """What the prepare step leaves besides signals and blocks: the sorted teacher, the second moments of its activations (float32; with one gap
    before each layer), and the corrected teacher with the checkpoint of its training."""
    weights, sizes = 4 * count_parameters(architecture, architecture.shape).total, architecture.sizes(architecture.shape)
    per_layer = sum(sizes[source.axis] ** 2 for source in architecture.family.sources if "{layer}" in source.readers[0])
    gap = sizes[Axis.HIDDEN] * sizes[Axis.INTERMEDIATE]
    second_moments = 4 * (architecture.shape.num_hidden_layers * (per_layer + gap) + 2 * sizes[Axis.HIDDEN] ** 2)
    return (
        {"sorted teacher": weights}
        | ({"second moments": second_moments} if moments else {})
        | ({"corrected teacher": weights, "its checkpoints": 9 * weights} if corrected else {})
    )


def rung_disk(architecture: Architecture, shape: Shape) -> dict[str, int]:
    """The most that a rung of a trial writes: trunk, branch, the one of them that replaces an older one, and the student."""
    state = state_bytes(architecture, shape)
    return {"trunk": state, "decay branch": state, "the next of one of them": state, "student": state // 3}


def fit_training(
    architecture: Architecture,
    shape: Shape,
    *,
    wanted: Training,
    teacher: TeacherMemory | None,
    capacity: Capacity,
    moments: tuple[Moments, ...] = get_args(Moments),
) -> tuple[Training, Estimate]:
    """The setting that costs the least time among those that fit, and what it takes.

    Args:
        wanted: as the user asked; its micro-batch is the largest that is tried, its checkpointing is kept where it is on.
        moments: kinds of optimiser state that may be chosen, the first that fits is.
    Raises:
        DoesNotFit: with the least that would be needed, by component.
    """
    estimates = []
    for tried in _settings(wanted, moments=moments):
        estimate = training_memory(architecture, shape, training=tried, teacher=teacher)
        if estimate.device_bytes <= capacity.usable_bytes and estimate.host_bytes <= capacity.usable_host_bytes:
            return tried, estimate
        estimates.append(estimate)
    least = min(estimates, key=lambda estimate: estimate.device_bytes)
    raise DoesNotFit(explain(least, capacity=capacity, what=f"training a student of {count_parameters(architecture, shape).total:,} parameters"))


def explain(estimate: Estimate, *, capacity: Capacity, what: str) -> str:
    """The estimate as a table, beside what there is."""
    told = f"{what}: expected at most {written(capacity.usable_bytes)} on the {capacity.device} device, got {table(estimate.device)}"
    if estimate.host:
        told += f"\nand at most {written(capacity.usable_host_bytes)} in the host's memory, got {table(estimate.host)}"
    return told


def table(parts: Mapping[str, int]) -> str:
    """The sum, and a line for each component."""
    lines = [written(sum(parts.values()))] + [f"  {name:<44} {written(size):>12}" for name, size in parts.items() if size]
    return "\n".join(lines)


def written(size: int) -> str:
    """Bytes with a decimal unit."""
    value, units = float(size), ["B", "kB", "MB", "GB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:,.3f} {units[0]}"


def _settings(wanted: Training, *, moments: tuple[Moments, ...]) -> Iterator[Training]:
    """From the fastest to the smallest: smaller passes while the device stays busy, checkpointing, tiny passes; then the next kind of moments."""
    sizes = [wanted.micro_batch_size]
    while sizes[-1] > 1:
        sizes.append((sizes[-1] + 1) // 2)
    busy = [size for size in sizes if size * wanted.sequence_length >= _EFFICIENT_TOKENS.get(wanted.device, 1)] or sizes[:1]
    tiny = [size for size in sizes if size not in busy]
    checkpointing = (True,) if wanted.checkpoint_activations else (False, True)
    for kind in moments:
        if kind == "offloaded" and wanted.device == "cpu":
            continue  # the host's memory is the device's
        for some in (busy, tiny):
            for checkpoint in checkpointing:
                for size in some:
                    yield replace(wanted, micro_batch_size=size, checkpoint_activations=checkpoint, moments=kind)


def _phases(
    architecture: Architecture, shape: Shape, *, training: Training, teacher: TeacherMemory | None, gradients: int, moment_buffer: int
) -> dict[str, dict[str, int]]:
    """What each part of a step holds on top of what is always there."""
    tokens, width = training.micro_tokens, shape.hidden_size
    layer = tokens * kept_per_token(architecture, shape, dtype=training.dtype, sequence_length=training.sequence_length)
    kept = tokens * 4 * width * shape.num_hidden_layers + layer if training.checkpoint_activations else layer * shape.num_hidden_layers
    kept += tokens * (4 * 4 * width + 16)  # the last norm, the final hidden state and its gradient; token ids
    head = 4 * architecture.vocab_size * width
    chunk = _CHUNK_COPIES * 4 * chunk_tokens(vocab_size=architecture.vocab_size, device=training.device) * architecture.vocab_size
    signals = 0 if teacher is None else tokens * teacher.architecture.shape.hidden_size * DTYPE_BYTES[teacher.dtype]
    # Gradients of one layer's activations on the way back.
    passing = tokens * 4 * (2 * width + 2 * shape.intermediate_size) * (architecture.num_experts_per_tok or 1)
    accumulating = training.micro_batch_size < training.batch_size
    phases = {
        "loss": {
            "gradients": gradients if accumulating else 0,
            "activations": kept,
            "teacher's final hidden states": signals,
            "the head's gradient": head,
            "a chunk of logits": chunk,
        },
        "backward": {
            "gradients": gradients if accumulating else max(0, gradients - kept),
            "activations": kept + passing,
            "the head's gradient": 2 * head,
        },
        "step": {"gradients": gradients, "moments on their way": moment_buffer},
    }
    if training.device == "cpu" and not training.checkpoint_activations:
        for parts in phases.values():
            if "activations" in parts:
                parts["the allocator's slack"] = int(_CPU_SLACK * parts["activations"])
    if teacher is not None and not teacher.stored:
        activations = _inference_activations(teacher, tokens=tokens)
        phases["teacher"] = {"gradients": gradients if accumulating else 0, "teacher activations": activations}
    return phases


def kept_per_token(architecture: Architecture, shape: Shape, *, dtype: str, sequence_length: int) -> int:
    """Bytes per token that one layer keeps for the backward pass.

    A norm keeps its input and the normalised input (float32); a centring one is a single kernel and keeps its input. A matrix product keeps its
    input, once for all that read the same; under autocast each has its own low-precision copy. An MLP keeps what its activation and its gate read
    and give. `tests/test_memory.py` compares with what autograd keeps, family by family.
    """
    family, size, sizes = architecture.family, DTYPE_BYTES[dtype], architecture.sizes(shape)
    layer = [weight for weight in architecture.weights if weight.per_layer]
    sizes[Axis.HEAD_DIM] = (sizes[Axis.QUERY] + sizes[Axis.KEY_VALUE]) // 2  # a norm on each head works on all queries, another on all keys
    norms: int = (1 if family.norms_centre else 2) * 4 * sum(weight.lengths(sizes)[0] for weight in layer if weight.is_norm)
    sources = [source for source in family.sources if "{layer}" in source.readers[0]]
    inputs = size * sum(sizes[source.axis] * (1 if dtype == "float32" else len(source.readers)) for source in sources)
    if family.expert_keys:
        return norms + inputs + _kept_by_experts(architecture, shape) + _kept_by_attention(architecture, shape, size=size, sequence_length=sequence_length)
    gated = sum(weight.sides[0].count(Axis.INTERMEDIATE) for weight in layer if len(weight.sides) == 2) > 1
    mlp = size * (3 if gated else 1) * shape.intermediate_size
    return norms + inputs + mlp + _kept_by_attention(architecture, shape, size=size, sequence_length=sequence_length)


def _kept_by_experts(architecture: Architecture, shape: Shape) -> int:
    """Bytes per token beside the router's input: its probabilities, and for each expert that a token is sent to a copy of the token, the neurons
    before and behind the gate, and the output. Float32 under autocast too: it does not reach transformers' product of all experts at once.
    """
    chosen = architecture.num_experts_per_tok or 0
    return 4 * (shape.num_experts or 0) + chosen * (4 * (2 * shape.hidden_size + 5 * shape.intermediate_size) + 40)


def _kept_by_attention(architecture: Architecture, shape: Shape, *, size: int, sequence_length: int) -> int:
    """Bytes per token: queries, keys, values; fused kernels a log-sum per head, the eager form the scores and every head's own keys and values."""
    heads, sizes = shape.num_attention_heads, architecture.sizes(shape)
    if architecture.family.attention == "eager":
        scores = heads * sequence_length * (8 if size == 4 else 10)  # capped scores and probabilities; under autocast one of them twice
        return size * 4 * sizes[Axis.QUERY] + scores
    kept = size * (sizes[Axis.QUERY] + 2 * sizes[Axis.KEY_VALUE]) + 4 * heads
    if any(len(weight.sides[0]) > 1 and Axis.QUERY in weight.sides[0] for weight in architecture.weights):
        kept += size * (2 * sizes[Axis.QUERY] + sizes[Axis.KEY_VALUE])  # the values are a view of the fused output, which stays whole
    return kept


def _inference_activations(teacher: TeacherMemory, *, tokens: int) -> int:
    """The most that one layer holds when nothing is kept: residual, its norm in float32, and either the MLP's or the attention's outputs."""
    shape, size = teacher.architecture.shape, DTYPE_BYTES[teacher.dtype]
    attention = 3 * shape.num_attention_heads * shape.head_dim + 3 * shape.num_key_value_heads * shape.head_dim
    chosen = teacher.architecture.num_experts_per_tok
    widest = max(chosen * (3 * shape.intermediate_size + 2 * shape.hidden_size) if chosen else 3 * shape.intermediate_size, attention)
    return tokens * (size * (2 * shape.hidden_size + widest) + 4 * shape.hidden_size)


def _teacher_part(teacher: TeacherMemory) -> str:
    return f"teacher's head ({teacher.dtype})" if teacher.stored else f"teacher weights ({teacher.dtype})"


def _teacher_weights(teacher: TeacherMemory) -> int:
    architecture = teacher.architecture
    if teacher.stored:
        return DTYPE_BYTES[teacher.dtype] * architecture.vocab_size * architecture.shape.hidden_size
    count = count_parameters(architecture, architecture.shape)
    layers = count.non_embedding
    # The embeddings stay whole on every process; one layer is gathered while the next is on its way.
    gathered = 0 if teacher.num_shards == 1 else 2 * layers // architecture.shape.num_hidden_layers
    return DTYPE_BYTES[teacher.dtype] * (count.embedding + layers // teacher.num_shards + gathered)


def _unsharded(architecture: Architecture, shape: Shape, *, num_shards: int) -> int:
    """Parameters that are whole on every process during a sharded step: the embeddings and two layers."""
    if num_shards == 1:
        return 0
    count = count_parameters(architecture, shape)
    return count.embedding + 2 * count.non_embedding // shape.num_hidden_layers


def _multiplied(architecture: Architecture, shape: Shape) -> int:
    """Parameters of the matrices that are multiplied, the head among them; of these autocast makes copies. Not of the experts, which it does not reach."""
    sizes = architecture.sizes(shape)
    layers: int = sum(weight.numel(sizes) for weight in architecture.weights if weight.per_layer and not weight.per_expert and len(weight.sides) == 2)
    return layers * shape.num_hidden_layers + architecture.vocab_size * shape.hidden_size
