"""How much memory a training step takes on one rank, counted before anything is built.

Shapes: B rows that a rank computes at a time, T tokens a row, N segments of S tokens, G segments a block, n = B G S
tokens a block, L layers, E width, F inner width, H heads, D head size, V vocabulary.

Two moments matter. `computing`: a block has been computed again and its backward pass begins, so all that autograd
keeps of it is there, and the gradients of the blocks behind it. `step`: the optimizer's. All counts are in bytes.
`tests/test_plan.py` holds the counts against what torch's allocator hands out in real steps.
"""

import math
from dataclasses import dataclass, replace

from infini_ds.model import InfiniGPTNeoConfig
from infini_ds.model.loss import chunk_rows
from infini_ds.training.recipe import BatchShape, Recipe

BYTES = {"fp32": 4, "bf16": 2}
MOST_SEGMENTS = 32  # a block: larger ones were not faster, see docs/training.md
SPARE = 0.1  # of a device's memory: what the allocator cannot join, communication, CUDA's own, errors of the count


@dataclass(frozen=True)
class Work:
    """What one rank computes at a time.

    Attributes:
        rows, tokens: B and T of a micro-batch.
        segments_per_block: G; None for all segments of a row.
        accumulation: micro-batches a step.
        packed: rows may hold several documents, so attention has masks.
        checkpointing: a block's activations are computed again in its backward pass.
    """

    config: InfiniGPTNeoConfig
    rows: int
    tokens: int
    precision: str
    segments_per_block: int | None = None
    accumulation: int = 1
    packed: bool = True
    checkpointing: bool = False

    @classmethod
    def of(cls, recipe: Recipe, config: InfiniGPTNeoConfig, shape: BatchShape, tokens: int, precision: str) -> "Work":
        """What the recipe asks for; rows may hold several documents. `auto` segments a block are all of them here."""
        return cls(
            config=config,
            rows=shape.micro_rows,
            tokens=tokens,
            precision=precision,
            segments_per_block=config.segments_per_block,
            accumulation=shape.accumulation,
            checkpointing=recipe.model.gradient_checkpointing,
        )

    @property
    def segment(self) -> int:
        """S, or the row's length where that is shorter."""
        return min(self.config.segment_length, self.tokens)

    @property
    def segments(self) -> int:
        return math.ceil(self.tokens / self.segment)

    @property
    def G(self) -> int:
        return min(self.segments_per_block or self.segments, self.segments)

    @property
    def blocks(self) -> int:
        return math.ceil(self.segments / self.G)

    @property
    def block_tokens(self) -> int:
        """n = B G S."""
        return self.rows * self.G * self.segment


@dataclass(frozen=True)
class Sharding:
    """What DeepSpeed's JSON says about memory.

    Attributes:
        stage: of ZeRO.
        offload: the optimizer is in the host's memory.
        bucket: elements of the buffer that gradients are reduced in; buffers: how many there are.
    """

    ranks: int
    stage: int = 2
    offload: bool = False
    bucket: int = 500_000_000
    buffers: int = 1

    @classmethod
    def from_json(cls, config: dict, ranks: int) -> "Sharding":
        zero = config["zero_optimization"]
        return cls(
            ranks=ranks,
            stage=zero["stage"],
            offload=(zero.get("offload_optimizer") or {}).get("device", "none") != "none",
            bucket=int(zero.get("reduce_bucket_size", 500_000_000)),
            buffers=(2 if zero.get("overlap_comm") else 1) if zero.get("contiguous_gradients", True) else 0,
        )


@dataclass(frozen=True)
class Footprint:
    """Bytes by part at each of the two moments; `host`: what offloading keeps in the host's memory, for one rank."""

    computing: dict[str, int]
    step: dict[str, int]
    host: int

    @property
    def peak(self) -> int:
        return max(sum(self.computing.values()), sum(self.step.values()))


def parameters(config: InfiniGPTNeoConfig) -> int:
    """Trained numbers; the output layer is the input embedding."""
    E, F, L = config.hidden_size, inner_width(config), config.num_layers
    positions = config.max_position_embeddings * E if config.position_embedding == "segment" else 0
    layer = 4 * E * E + E + 2 * E * F + F + E + 4 * E + config.num_heads
    return config.vocab_size * E + positions + L * layer + 2 * E


def inner_width(config: InfiniGPTNeoConfig) -> int:
    return config.intermediate_size or 4 * config.hidden_size


def state_bytes(work: Work) -> int:
    """(M, z) of all layers between two blocks: B L H (D² + D) in fp32."""
    config = work.config
    return 4 * work.rows * config.num_layers * config.num_heads * (config.head_dim**2 + config.head_dim)


def layer_activations(work: Work) -> int:
    """What autograd keeps of one layer over one block, tensor by tensor as in `model/modeling.py` and `memory.py`."""
    config, a = work.config, BYTES[work.precision]
    E, H, D, n = config.hidden_size, config.num_heads, config.head_dim, work.block_tokens
    # In the model's precision: inputs of both norms and their outputs; q, k, v; local attention; out_proj's input.
    kept = a * n * (9 * E + 2 * inner_width(config))  # and around the activation function
    # In fp32, of width E: phi(k), and phi(k) and v as factors of dM; phi(q), and as factor of numerator and of
    # denominator; the numerator; what is retrieved; in bf16 local attention once more.
    wide = 8 + (a < 4)
    delta = config.memory_rule != "linear"
    if delta:  # phi(k) as factor of n, both factors of A, and phi(k) of those that write
        wide += 3 + work.packed
    kept += 4 * n * E * wide
    # Statistics of two norms; per head: log-sum-exp, denominator as it was and as it is held, the gate of each token.
    kept += 4 * n * (4 + (3 + work.packed) * H)
    # The memory before each segment. The delta rule keeps both factors of each product too.
    kept += 4 * work.rows * work.G * H * (D * D * (3 if delta else 1) + D)
    if _has_masks(work):  # each layer makes its own additive mask of the boolean one
        kept += a * n * work.segment
    return kept


def _has_masks(work: Work) -> bool:
    return work.packed and work.config._attn_implementation != "flex_attention"


def loss_bytes(work: Work) -> tuple[int, int]:
    """Of one block's loss, as in `model/loss.py`: its gradients, which are computed with it, and what is there besides
    while they are.
    """
    a, E, V = BYTES[work.precision], work.config.hidden_size, work.config.vocab_size
    n = work.block_tokens
    logits = min(n, chunk_rows(V)) * V
    passing = (a + 4) * logits + 4 * V * E  # log-probabilities and logits; the weight's gradient summed in fp32
    return a * (n * E + V * E), passing - (a * V * E if a == 4 else 0)


def footprint(work: Work, sharding: Sharding) -> Footprint:
    """The memory of a step of `work` on one rank."""
    config, a = work.config, BYTES[work.precision]
    E, V, F, B = config.hidden_size, config.vocab_size, inner_width(config), work.rows
    n = work.block_tokens
    count = parameters(config)
    share = math.ceil(count / sharding.ranks)

    weights = a * count
    optimizer = 12 * share  # fp32 weights and Adam's two averages
    # DeepSpeed sums the gradients of a rank's share in fp32: in one buffer in bf16, in a new one each time in fp32.
    summed_in_place = work.precision == "bf16"
    partition = 0 if sharding.offload and not summed_in_place else 4 * share
    bucket = a * sharding.bucket * sharding.buffers

    layer, L = layer_activations(work), config.num_layers
    # Or of each layer its input, with its keys and values until the block is through, and all of one layer.
    layers = max(L * 3 * a * n * E, L * a * n * E + layer) if config.checkpoint_layers else L * layer
    activations = layers + 2 * a * n * E  # and around the last norm
    if _has_masks(work):
        activations += 2 * n * work.segment  # a boolean mask of each kind of layer
    gradients_of_loss, passing = loss_bytes(work)
    loss = 0
    if not work.checkpointing:
        activations *= work.segments / work.G
        loss = gradients_of_loss * (work.blocks - 1)
    # Then either the loss, or the layer that goes backward first: the gradients of its output, of the residual, of the
    # inner width, and of a matrix.
    going_backward = a * (n * (2 * E + F) + E * F)
    if gradients_of_loss + passing > going_backward + a * V * E:
        loss += gradients_of_loss + passing - a * V * E
    else:
        activations += going_backward
    # A parameter's gradient reaches ZeRO once all of its uses have added to it: with several blocks that is in the last
    # one to go backward, so until then each rank holds the gradients of all weights, not of its share.
    # Without checkpointing they grow while the blocks' activations go.
    whole = a * count if work.blocks > 1 else a * V * E
    if not work.checkpointing:
        whole = max(a * V * E, whole - activations / work.blocks)
    # From the first full bucket on, the rank's share exists; by then that part of the weights has gone backward.
    earlier = partition if work.accumulation > 1 else 0
    later = partition if summed_in_place else earlier + partition
    left = 1 - min(1.0, sharding.bucket / count)
    passing_by = activations + loss + whole
    if left * passing_by + later > passing_by + earlier:
        activations, loss, whole, earlier = left * activations, left * loss, left * whole, later

    resident = {"weights": weights, "optimizer": 0 if sharding.offload else optimizer}
    computing = resident | {
        "gradients": whole + bucket + earlier,
        "memory between blocks": state_bytes(work) * (2 + (1 if config.offload_states else work.blocks)),
        "activations": activations,
        "loss and logits": loss,
        "token ids": 8 * B * work.tokens * (6 if work.packed else 4),
    }
    step = resident | {"gradients": partition}
    if not sharding.offload:
        step["copies in the step"] = 0 if summed_in_place else partition
    host = (12 + 4 + a) * share if sharding.offload else 0
    return Footprint(*({name: round(size) for name, size in part.items()} for part in (computing, step)), host)


def largest_block(work: Work, sharding: Sharding, room: int) -> int | None:
    """The most segments a block, up to MOST_SEGMENTS, with which a step fits into `room` bytes; None if none does."""
    for segments in range(min(MOST_SEGMENTS, work.segments), 0, -1):
        if footprint(replace(work, segments_per_block=segments), sharding).peak <= room:
            return segments
    return None
