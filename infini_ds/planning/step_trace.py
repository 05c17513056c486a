"""Trace the memory of a micro-batch: run the real model forward and backward on fake tensors, and read live bytes.

Every reading is affine in the number of layers, and in the number of rows once the loss has several chunks. So two
shallow models stand for a deep one, two small micro-batches for a large one, and a few blocks for many.
`tests/planning/test_step_trace.py` compares with what runs in full.
"""

import json
import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from infini_ds.model import BlockSchedule, InfiniGPTNeoConfig, InfiniGPTNeoForCausalLM
from infini_ds.model.loss import chunk_rows
from infini_ds.planning.fake_group import FakeGroup
from infini_ds.planning.live_bytes import LiveBytes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Blocks that run in place of more. With checkpointing the first block decides: at its backward pass the gradients of
# all weights exist. Without, each block adds its activations, and the last of these blocks says how much.
CHECKPOINTED_BLOCKS, KEPT_BLOCKS = 2, 4
MANY_TOKENS = 32_768  # of a block, from which on fewer rows run in place of all


class Label(NamedTuple):
    """An event of a micro-batch: its name, its layer if it has one, and how often it occurred before."""

    event: str
    layer: int | None
    visit: int


class Reading(NamedTuple):
    """Memory from one event to the next, or at the moment when a gradient of a weight is complete.

    Attributes:
        live: bytes alive at most, without the weights.
        gradients: those of these bytes that are gradients of weights.
        taken: elements of the gradients that were complete before. ZeRO has taken them, so they are not alive.
        elements: elements of the gradient that is complete at this moment; 0 for any other event.
    """

    live: float
    gradients: float = 0
    taken: float = 0
    elements: float = 0


Readings = dict[Label, Reading]


@dataclass(frozen=True)
class StepTrace:
    """A micro-batch's memory without what ZeRO adds.

    Attributes:
        computing: the reading with the most bytes before the first gradient is complete.
        reducing: the readings from then on, in the order of time.
        states: bytes of the memory of all layers between two blocks.
    """

    computing: Reading
    reducing: tuple[Reading, ...]
    states: int


@dataclass(frozen=True)
class MicroBatch:
    """What a rank computes at a time. Hashable: each is traced once.

    Attributes:
        config: the model's configuration as JSON, which holds all but `attention`, the attention implementation.
        rows, tokens: the shape of the input.
        precision: "fp32" or "bf16".
        packed: rows may hold several documents.
        checkpointing: blocks are recomputed in the backward pass.
        sequence: ranks over which the segments of each row are divided; all of them have the complete input.
    """

    config: str
    attention: str
    rows: int
    tokens: int
    precision: str
    schedule: BlockSchedule
    packed: bool
    checkpointing: bool
    sequence: int = 1

    def model_config(self) -> InfiniGPTNeoConfig:
        config = InfiniGPTNeoConfig.from_dict(json.loads(self.config))
        # Flex attention has no kernel for fake tensors. It keeps what this one keeps, but for the masks.
        config._attn_implementation = "sdpa"
        return config


@cache
def parameter_sizes(config: str) -> tuple[int, ...]:
    """Return the number of elements of each parameter of the model, the embedding first; `config` is JSON."""
    with torch.device("meta"):
        model = InfiniGPTNeoForCausalLM(InfiniGPTNeoConfig.from_dict(json.loads(config)))
    return tuple(parameter.numel() for parameter in model.parameters())


@cache
def trace(step: MicroBatch) -> StepTrace:
    """Trace a micro-batch of any number of layers and blocks."""
    config = step.model_config()
    S = min(config.segment_length, step.tokens)
    K = step.sequence
    segments = math.ceil(math.ceil(step.tokens / S) / K)  # of a rank
    G = min(step.schedule.segments_per_block or segments, segments)
    blocks, block_tokens = math.ceil(segments / G), K * G * S
    offload = step.checkpointing and step.schedule.offload_states
    step = replace(step, schedule=replace(step.schedule, segments_per_block=G, offload_states=False))
    if step.checkpointing:
        traced = min(blocks, CHECKPOINTED_BLOCKS)
        last = step.tokens
        if blocks > 1:  # of the last one, a segment of each rank is enough to complete the gradients
            last = min(last, (traced - 1) * block_tokens + (K - 1) * S + (step.tokens - 1) % S + 1)
        found = _trace_in_full(replace(step, tokens=last))
        inputs = _input_bytes(step, step.tokens - last)
        return _with_more(found, found.states * ((1 if offload else blocks) - traced) + inputs, inputs)
    found = _trace_in_full(replace(step, tokens=step.tokens - max(0, blocks - KEPT_BLOCKS) * block_tokens))
    if blocks <= KEPT_BLOCKS:
        return found
    one_less = _trace_in_full(replace(step, tokens=step.tokens - (blocks - KEPT_BLOCKS + 1) * block_tokens))
    more = blocks - KEPT_BLOCKS
    a_block = found.computing.live - one_less.computing.live
    return _with_more(found, more * a_block, _input_bytes(step, more * block_tokens))


def _with_more(found: StepTrace, computing: float, reducing: float) -> StepTrace:
    """Return the trace with so many bytes more at each moment."""
    return replace(
        found,
        computing=found.computing._replace(live=found.computing.live + computing),
        reducing=tuple(reading._replace(live=reading.live + reducing) for reading in found.reducing),
    )


def _input_bytes(step: MicroBatch, tokens: int) -> int:
    """Return the bytes of so many columns of the input and the labels, and of the documents in packed rows, each as
    given and as laid out in segments.
    """
    return 8 * step.rows * tokens * (6 if step.packed else 4)


def _trace_in_full(step: MicroBatch) -> StepTrace:
    """Trace all blocks of a micro-batch, and all layers and rows by extrapolation."""
    config = step.model_config()
    layers, period = config.num_layers, _period(config.attention_layers)
    if layers <= 2 * period:
        readings, states = _read(step)
        rest = readings
    else:
        shallow, _ = _read(replace(step, config=_with_layers(step.config, period)))
        rest, states_of_two = _read(replace(step, config=_with_layers(step.config, 2 * period)))
        readings, states = deepen(shallow, rest, period, layers), states_of_two * layers // (2 * period)
    computing = [reading for reading in readings.values() if not (reading.taken or reading.elements)]
    reducing = [reading for reading in readings.values() if reading.taken or reading.elements]
    if step.checkpointing:  # all gradients are complete at once, and the engine takes them in no order that layers have
        reducing = _all_at_once(step, max(r.live - r.gradients for r in rest.values() if r.elements))
    reducing.sort(key=lambda reading: (reading.taken, reading.elements > 0))
    return StepTrace(max(computing), tuple(reducing), states)


def _read(step: MicroBatch) -> tuple[Readings, int]:
    """Return readings and bytes of states, of many rows by extrapolation."""
    config = step.model_config()
    tokens = (step.schedule.segments_per_block or 1) * min(config.segment_length, step.tokens)
    few = math.ceil(2 * chunk_rows(config.vocab_size) / tokens)
    if step.rows * tokens <= MANY_TOKENS or step.rows <= 2 * few:
        return run_on_fake_tensors(step)
    less, _ = run_on_fake_tensors(replace(step, rows=few))
    more, states = run_on_fake_tensors(replace(step, rows=2 * few))
    times = step.rows / few - 2
    readings = {label: _line(reading, (times, less[label], reading)) for label, reading in more.items()}
    return readings, states * step.rows // (2 * few)


def _all_at_once(step: MicroBatch, rest: float) -> list[Reading]:
    """Return the readings of gradients that wait until all are complete, the embedding's taken first, then from the
    last layer to the first. `rest`: bytes alive besides.
    """
    embedding, *others = parameter_sizes(step.config)
    readings, taken, waiting = [], 0, embedding + sum(others)
    for size in (embedding, *reversed(others)):
        gradients = waiting * DTYPES[step.precision].itemsize
        readings.append(Reading(rest + gradients, gradients, taken, size))
        taken, waiting = taken + size, waiting - size
    return [*readings, Reading(rest, taken=taken)]


def _period(kinds: list[str]) -> int:
    """Return after how many layers the kinds of layers repeat."""
    return next(p for p in range(1, len(kinds) + 1) if all(kinds[i] == kinds[i % p] for i in range(len(kinds))))


def _with_layers(config: str, layers: int) -> str:
    fields = json.loads(config)
    kinds = fields.pop("attention_layers")[:layers]
    return json.dumps(fields | {"num_layers": layers, "attention_types": [[[kind], 1] for kind in kinds]})


def deepen(shallow: Readings, deep: Readings, period: int, layers: int) -> Readings:
    """Return the readings of a model of `layers` layers, from those of one and two periods of layers.

    A reading is affine in the number of layers and, for an event of a layer, in the layer's number among layers of its
    kind. Both slopes follow from three readings.
    """
    more = layers / period - 2
    found = {}
    for label, reading in deep.items():
        if label.layer is None:
            found[label] = _line(reading, (more, shallow[label], reading))
        elif label.layer < period:
            of_next = deep[label._replace(layer=label.layer + period)]
            for layer in range(label.layer, layers, period):
                steps = (layer - label.layer) // period
                found[label._replace(layer=layer)] = _line(
                    reading, (more, shallow[label], reading), (steps, reading, of_next)
                )
    return found


def _line(start: Reading, *changes: tuple[float, Reading, Reading]) -> Reading:
    """Return `start` with so many times the difference from one reading to another."""
    return Reading(*(x + sum(n * (b[i] - a[i]) for n, a, b in changes) for i, x in enumerate(start)))


@cache
def run_on_fake_tensors(step: MicroBatch) -> tuple[Readings, int]:
    """Run forward and backward pass as they are. Returns the readings, and the bytes of all layers' memory."""
    with LiveBytes() as live:
        model = _build_model(step.model_config(), DTYPES[step.precision]).train()
        model.block_schedule = step.schedule
        model.sequence_group = FakeGroup.of(step.sequence) if step.sequence > 1 else None
        if step.checkpointing:
            model.gradient_checkpointing_enable()
        recorder = _Recorder(live, model)
        ids = torch.zeros(step.rows, step.tokens, dtype=torch.long)
        batch = {"input_ids": ids, "labels": torch.zeros_like(ids)}
        if step.packed:
            name = "attention_mask" if step.attention == "flex_attention" else "document_ids"
            batch[name] = torch.ones_like(ids)
        output = model(**batch)
        states = sum(x.nbytes for x in tree_leaves(output.memory) if isinstance(x, Tensor))
        loss = output.loss
        del output
        loss.backward()
        return recorder.readings(), states


def _build_model(config: InfiniGPTNeoConfig, dtype: torch.dtype) -> InfiniGPTNeoForCausalLM:
    """Build the model in `dtype`, since the parameters of a model on fake tensors cannot be converted."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return InfiniGPTNeoForCausalLM(config)
    finally:
        torch.set_default_dtype(default)


class _Recorder:
    """Reads the live bytes between the events of a model's forward and backward pass.

    The events: the embedding, a layer, or the loss of a block starts, forward or backward; the gradient of a weight is
    complete, and ZeRO takes it.
    """

    def __init__(self, live: LiveBytes, model: InfiniGPTNeoForCausalLM):
        self._live, self._weights = live, live.now
        self._moments: list[tuple[int, Label, Reading]] = []  # with the interval that each belongs to
        self._gradients: list[tuple[int, int, int]] = []  # intervals of allocation and completion, bytes
        self._visits: Counter = Counter()
        self._taken = 0
        self._begin("start", None)
        body = model.transformer
        modules = [("layer", number, layer) for number, layer in enumerate(body.h)]
        before: tuple[str, int | None] = "embedding", None
        body.wte.register_forward_pre_hook(lambda *_: self._next("embedding", None))
        for event, number, module in [*modules, ("loss", None, body.ln_f)]:
            module.register_forward_pre_hook(partial(self._start, event, number, before))
            before = event, number
        for name, parameter in model.named_parameters():
            layer_number = int(name.split(".")[2]) if name.startswith("transformer.h.") else None
            event = name if layer_number is None else name.split(".", 3)[3]
            parameter.register_post_accumulate_grad_hook(partial(self._complete, event, layer_number))

    def readings(self) -> Readings:
        """End the last interval, and return all readings."""
        self._end()
        found = {}
        for interval, label, reading in self._moments:
            sizes = [size for first, last, size in self._gradients if first <= interval <= last]
            found[label] = reading._replace(gradients=sum(sizes))
        return found

    def _begin(self, event: str, layer: int | None) -> None:
        self._label = Label(event, layer, self._visits[event, layer])
        self._visits[event, layer] += 1
        self._live.start_interval()

    def _end(self) -> None:
        reading = Reading(self._live.peak - self._weights, taken=self._taken)
        self._moments.append((self._live.interval, self._label, reading))

    def _start(
        self, event: str, layer: int | None, before: tuple[str, int | None], _: nn.Module, inputs: tuple[Tensor, ...]
    ) -> None:
        """A module starts. The backward pass of the one before starts when the gradient of the input is complete."""
        self._next(event, layer)
        hidden = inputs[0]
        if hidden.requires_grad and not hidden._backward_hooks:  # which a layer that is recomputed has already
            hidden.register_hook(lambda gradient: self._next(f"{before[0]} backward", before[1]))

    def _next(self, event: str, layer: int | None) -> None:
        self._end()
        self._begin(event, layer)

    def _complete(self, event: str, layer: int | None, weight: Tensor) -> None:
        gradient = weight.grad
        assert gradient is not None, "autograd calls this after it has set the gradient"
        self._end()
        reading = Reading(self._live.now - self._weights, 0, self._taken, weight.numel())
        self._moments.append((self._live.interval, Label(event, layer, 0), reading))
        self._gradients.append((self._live.allocated_in(gradient), self._live.interval, gradient.nbytes))
        del gradient
        self._taken += weight.numel()
        weight.grad = None
        self._begin(f"after {event}", layer)
