"""How much memory a training step takes on one rank, counted before anything is built.

Shapes: B rows that a rank computes at a time, T tokens a row, N segments of S tokens, G segments a block, n = B G S
tokens a block, L layers, E width, F inner width, H heads, D head size, V vocabulary.

Three moments matter. `computing`: a block is there as a whole, and its loss is computed or its backward pass begins.
`reducing`: gradients are whole and DeepSpeed takes them. `step`: the optimizer's. All counts are in bytes.
`tests/planning/test_plan.py` holds the counts against what torch's allocator hands out in real steps.
"""

import math
from dataclasses import dataclass, field, replace

from infini_ds.config.batch_shape import BatchShape
from infini_ds.config.model_config import block_schedule
from infini_ds.config.recipe import Recipe
from infini_ds.model import BlockSchedule, InfiniGPTNeoConfig
from infini_ds.model.loss import chunk_rows

BYTES = {"fp32": 4, "bf16": 2}
MOST_SEGMENTS = 32  # a block: larger ones were not faster, see docs/training.md
HEADROOM = 0.1  # of a device's memory: what the allocator cannot join, communication, CUDA's own, errors of the count


@dataclass(frozen=True)
class Workload:
    """What one rank computes at a time.

    Attributes:
        rows, tokens: B and T of a micro-batch.
        schedule: G, and what of a block is recomputed and offloaded.
        accumulation: micro-batches a step.
        packed: rows may hold several documents, so attention has masks.
        checkpointing: a block's activations are computed again in its backward pass.
    """

    config: InfiniGPTNeoConfig
    rows: int
    tokens: int
    precision: str
    schedule: BlockSchedule = field(default_factory=BlockSchedule)
    accumulation: int = 1
    packed: bool = True
    checkpointing: bool = False

    @classmethod
    def of(
        cls, recipe: Recipe, config: InfiniGPTNeoConfig, shape: BatchShape, tokens: int, precision: str
    ) -> "Workload":
        """What the recipe asks for; rows may hold several documents. `auto` segments a block are all of them here."""
        return cls(
            config=config,
            rows=shape.micro_rows,
            tokens=tokens,
            precision=precision,
            schedule=block_schedule(recipe),
            accumulation=shape.accumulation,
            checkpointing=recipe.model.gradient_checkpointing,
        )

    def in_blocks_of(self, segments: int) -> "Workload":
        """Return the same workload with `segments` segments a block."""
        return replace(self, schedule=replace(self.schedule, segments_per_block=segments))

    @property
    def segment(self) -> int:
        """S, or the row's length where that is shorter."""
        return min(self.config.segment_length, self.tokens)

    @property
    def segments(self) -> int:
        return math.ceil(self.tokens / self.segment)

    @property
    def G(self) -> int:
        return min(self.schedule.segments_per_block or self.segments, self.segments)

    @property
    def blocks(self) -> int:
        return math.ceil(self.segments / self.G)

    @property
    def block_tokens(self) -> int:
        """n = B G S."""
        return self.rows * self.G * self.segment

    @property
    def has_masked_writes(self) -> bool:
        """Tokens of a document that ended before its segment did, and empty slots behind a row."""
        return self.packed or self.tokens % self.segment > 0


@dataclass(frozen=True)
class ZeroSharding:
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
    def from_json(cls, config: dict, ranks: int) -> "ZeroSharding":
        zero = config["zero_optimization"]
        return cls(
            ranks=ranks,
            stage=zero["stage"],
            offload=(zero.get("offload_optimizer") or {}).get("device", "none") != "none",
            bucket=int(zero.get("reduce_bucket_size", 500_000_000)),
            buffers=(2 if zero.get("overlap_comm") else 1) if zero.get("contiguous_gradients", True) else 0,
        )


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by part at each of the three moments; `host`: what offloading keeps in the host's memory, for one rank."""

    computing: dict[str, int]
    reducing: dict[str, int]
    step: dict[str, int]
    host: int

    @property
    def peak(self) -> int:
        return max(sum(parts.values()) for parts in (self.computing, self.reducing, self.step))


def parameters(config: InfiniGPTNeoConfig) -> int:
    """Trained numbers; the output layer is the input embedding."""
    E, F, L = config.hidden_size, inner_width(config), config.num_layers
    positions = config.max_position_embeddings * E if config.position_embedding == "segment" else 0
    layer = 4 * E * E + E + 2 * E * F + F + E + 4 * E + config.num_heads
    return config.vocab_size * E + positions + L * layer + 2 * E


def inner_width(config: InfiniGPTNeoConfig) -> int:
    return config.intermediate_size or 4 * config.hidden_size


def state_bytes(work: Workload) -> int:
    """(M, z) of all layers between two blocks: B L H (D² + D) in fp32."""
    config = work.config
    return 4 * work.rows * config.num_layers * config.num_heads * (config.head_dim**2 + config.head_dim)


def layer_activations(work: Workload) -> int:
    """What autograd keeps of one layer over one block, tensor by tensor as in `model/modeling.py` and `memory.py`."""
    config, a = work.config, BYTES[work.precision]
    E, H, D, n = config.hidden_size, config.num_heads, config.head_dim, work.block_tokens
    # In the model's precision: inputs of both norms and their outputs; q, k, v, or q and k turned; local attention;
    # out_proj's input; before and after the activation function.
    kept = a * n * (9 * E + 2 * inner_width(config))
    # In fp32, of width E: phi(k), phi(q), the numerator, what is retrieved; in bf16 local attention once more.
    wide = 4 + (a < 4)
    delta = config.memory_rule != "linear"
    if work.rows * work.G > 1:  # products copy their factors, whose heads do not lie at equal distances
        wide += 4  # phi(k) and v of dM; phi(q) of the numerator and of the denominator
        if delta:  # phi(k) of n, both factors of A, and phi(k) of those that write
            wide += 3 + work.has_masked_writes
    else:  # factors are what they were computed as: v in fp32, phi(k) of those that write, phi(k) / n
        wide += (a < 4) + work.has_masked_writes + delta
    kept += 4 * n * E * wide
    # Statistics of two norms; per head: log-sum-exp, denominator as it was and as it is held, the gate of each token.
    kept += 4 * n * (4 + (3 + work.packed) * H)
    # The memory before each segment. The delta rule keeps both factors of each product too.
    kept += 4 * work.rows * work.G * H * (D * D * (3 if delta else 1) + D)
    if _has_masks(work):  # each layer makes its own additive mask of the boolean one
        kept += a * n * work.segment
    return kept


def _has_masks(work: Workload) -> bool:
    return work.packed and work.config._attn_implementation != "flex_attention"


def block_activations(work: Workload) -> tuple[int, int, int, int]:
    """Of a block: what is there while its loss is computed, what autograd keeps of that, and what is there when its
    last layer goes backward, and its first one.
    """
    config, a, layer = work.config, BYTES[work.precision], layer_activations(work)
    n = work.block_tokens
    hidden = a * n * config.hidden_size
    masks = 2 * n * work.segment if _has_masks(work) else 0  # boolean, one of each kind of layer
    # A block holds on to keys and values until it is through, which autograd does not where layers are computed again,
    # and not to the keys that rotary positions turn.
    if work.schedule.checkpoint_layers:
        of_layer, until_through, again = hidden, 2 * hidden, layer - hidden
    else:
        of_layer, until_through, again = layer, hidden * (config.position_embedding == "rotary"), 0
    layers = config.num_layers * of_layer
    in_loss = layers + config.num_layers * until_through + 2 * hidden + masks  # around the last norm
    backward = again + hidden + a * n * inner_width(config)  # gradients of the layer's result and of the inner width's
    return in_loss, layers + hidden, layers + backward, of_layer + backward


def loss_bytes(work: Workload) -> tuple[int, int]:
    """Of one block's loss, as in `model/loss.py`: all that is there while it is computed, and its gradients, which are
    computed with it.
    """
    config, a = work.config, BYTES[work.precision]
    E, V, n = config.hidden_size, config.vocab_size, work.block_tokens
    rows = min(n, chunk_rows(V))
    chunk, next_chunk = rows * V, min(n - rows, rows) * V
    # Beside logits and probabilities: the product for the gradient of rows. In bf16 the softmax copies logits to fp32,
    # while the gradient of the chunk before is still there; that, and the product for the weights, are copies too. (A
    # CPU copies that product to fp32 to add it. A GPU is taken to do without, so this is not counted.)
    beside = a * rows * E
    if work.precision == "bf16":
        beside = max(4 * chunk, a * chunk + 4 * next_chunk, a * (chunk + rows * E + V * E))
    gradients = a * n * E + 4 * V * E  # the weights' summed in fp32
    return gradients + (a + 4) * chunk + beside, a * (n * E + V * E)


def estimate_memory(work: Workload, sharding: ZeroSharding) -> MemoryEstimate:
    """The memory of a step of `work` on one rank."""
    config, a = work.config, BYTES[work.precision]
    E, V, F = config.hidden_size, config.vocab_size, inner_width(config)
    count = parameters(config)
    share = math.ceil(count / sharding.ranks)
    weights, embedding, matrix, attention = a * count, a * V * E, a * E * F, a * 4 * E * E  # or their gradients
    resident = {"weights": weights, "optimizer": 0 if sharding.offload else 12 * share}

    # DeepSpeed sums the gradients of a rank's share in fp32: in one buffer in bf16, in a new one each time in fp32.
    summed_in_place = work.precision == "bf16"
    partition = 0 if sharding.offload and not summed_in_place else 4 * share
    earlier = partition if work.accumulation > 1 else 0  # of the micro-batches before
    step = resident | {"gradients": partition}
    if not sharding.offload:
        step["copies in the step"] = 0 if summed_in_place else partition

    in_loss, kept, in_last, in_first = block_activations(work)
    computing_loss, of_loss = loss_bytes(work)
    states = state_bytes(work) * 2
    if work.checkpointing:
        states += state_bytes(work) * (1 if work.schedule.offload_states else work.blocks)
    token_ids = 8 * work.rows * work.tokens * (6 if work.packed else 4)

    def moment(gradients: float, activations: float, loss: float = 0, states: int = states) -> dict[str, int]:
        parts = {
            "gradients": earlier + gradients,
            "memory between blocks": states,
            "activations": activations,
            "loss and logits": loss,
            "token ids": token_ids,
        }
        return resident | {name: round(size) for name, size in parts.items()}

    # A weight's gradient is whole once all of its uses have added to it, which with several blocks is in the last one
    # to go backward. So each rank holds the gradients of all weights, not of its share: with checkpointing from the
    # first block on, when nothing else is left of it, without it while activations of other blocks are there.
    several = work.blocks > 1
    behind = weights if work.checkpointing and several else 0
    others = 0 if work.checkpointing else work.segments / work.G - 1
    kept_of_others, loss_of_others = others * kept, others * of_loss
    computing = [
        moment(behind, kept_of_others + in_loss, loss_of_others + computing_loss),
        moment(behind, kept_of_others + kept, loss_of_others + 2 * of_loss),  # kept ones times the gradient
        # The output layer's gradient waits for the embedding's: they are one weight.
        moment(behind + embedding + matrix, kept_of_others + in_last, loss_of_others),
    ]
    if work.checkpointing or several:  # by the end of a block, gradients of all of its layers are there too
        computing += [
            moment(weights - matrix - attention, kept_of_others + in_first, loss_of_others),
            moment(weights + embedding + (embedding if behind else 0), kept_of_others, loss_of_others),
        ]

    # Gradients move into the bucket, and when the next one does not fit, a copy of it is reduced over the ranks. From
    # then on the share of the sums exists, and what the bucket held has gone from where it was.
    bucket = a * sharding.bucket * sharding.buffers
    left = 1 - max(0, sharding.bucket - E * F) / count if sharding.bucket < count else 0
    reduced = a * min(sharding.bucket, count)
    if summed_in_place:  # each gradient of the reduced ones is added as a copy in fp32
        sums = partition - earlier + reduced + min(partition, 4 * max(V * E, E * F))
    else:
        sums = max(partition, reduced)
    if work.checkpointing:  # all of them come at once, when all blocks are done
        reducing = [moment(weights + bucket, 0, states=0), moment(left * weights + bucket + sums, 0, states=0)]
    else:
        held = weights if several else embedding
        reducing = [
            moment(held + matrix + bucket, in_last),
            moment(left * held + bucket + sums, left * in_last),
        ]

    host = (12 + 4 + a) * share if sharding.offload else 0
    if work.checkpointing and work.schedule.offload_states:
        host += state_bytes(work) * work.blocks
    return MemoryEstimate(_largest(computing), _largest(reducing), step, host)


def _largest(moments: list[dict[str, int]]) -> dict[str, int]:
    return max(moments, key=lambda parts: sum(parts.values()))


def largest_block(work: Workload, sharding: ZeroSharding, room: int) -> int | None:
    """The most segments a block, up to MOST_SEGMENTS, with which a step fits into `room` bytes; None if none does."""
    for segments in range(min(MOST_SEGMENTS, work.segments), 0, -1):
        if estimate_memory(work.in_blocks_of(segments), sharding).peak <= room:
            return segments
    return None
