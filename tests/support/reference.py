"""A slow reference of Infini-GPT-Neo for tests: loops over rows, segments, heads and tokens, and tiny models for it.

It uses plain tensor operations, so that autograd gives a reference of every gradient too; run it on a model in fp64.
Shapes: B rows, T tokens, L layers, H heads, S tokens in a segment, D head size, E width, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from infini_ds.model import BlockSchedule, InfiniGPTNeoConfig, InfiniGPTNeoForCausalLM


@dataclass
class Memory:
    """One layer's memory of one row: M (D, D) and z (D,) of each head, and their document, None while empty."""

    M: list[Tensor]
    z: list[Tensor]
    document: int | None = None


def reference_forward(
    model: InfiniGPTNeoForCausalLM,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    use_memory: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits (B, T, V), 0 at padding and the last memory, M (L, B, H, D, D) and z (L, B, H, D)."""
    config, weights = model.config, dict(model.named_parameters(remove_duplicate=False))
    B, T = input_ids.shape
    valid = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    documents = torch.zeros_like(input_ids) if document_ids is None else document_ids
    logits, final = [], []
    for b in range(B):
        columns = [t for t in range(T) if valid[b, t]]
        memories = [_empty_memory(config, weights) for _ in range(config.num_layers)]
        outputs = {}
        row_documents = [int(documents[b, t]) for t in columns]
        embeddings = [weights["transformer.wte.weight"][int(input_ids[b, t])] for t in columns]
        if config.embed_conv:  # across the ends of segments
            embeddings = _short_convolution(weights["transformer.embed_conv.weight"], embeddings, row_documents)
        for start in range(0, len(columns), config.segment_length):
            span = slice(start, start + config.segment_length)
            computed = _segment(config, weights, embeddings[span], row_documents[span], memories, use_memory)
            outputs |= zip(columns[span], computed, strict=True)
        zero = weights["transformer.wte.weight"].new_zeros(config.vocab_size)
        logits.append(torch.stack([outputs.get(t, zero) for t in range(T)]))
        final.append(memories)
    M = torch.stack([torch.stack([torch.stack(row[layer].M) for row in final]) for layer in range(config.num_layers)])
    z = torch.stack([torch.stack([torch.stack(row[layer].z) for row in final]) for layer in range(config.num_layers)])
    return torch.stack(logits), M, z


def _empty_memory(config: InfiniGPTNeoConfig, weights: dict[str, Tensor]) -> Memory:
    H, D = config.num_heads, config.hidden_size // config.num_heads
    like = weights["transformer.wte.weight"]
    return Memory([like.new_zeros(D, D) for _ in range(H)], [like.new_zeros(D) for _ in range(H)])


def _segment(
    config: InfiniGPTNeoConfig,
    weights: dict[str, Tensor],
    embeddings: list[Tensor],
    documents: list[int],
    memories: list[Memory],
    use_memory: bool,
) -> list[Tensor]:
    """Return the logits of each token of one segment, and update `memories` to the state after it."""
    x = []
    for position, embedding in enumerate(embeddings):
        if config.position_embedding == "segment":
            embedding = embedding + weights["transformer.wpe.weight"][position]
        x.append(embedding)
    for layer, kind in enumerate(config.attention_layers):
        w = {
            name.removeprefix(f"transformer.h.{layer}."): value
            for name, value in weights.items()
            if name.startswith(f"transformer.h.{layer}.")
        }
        window = config.window_size if kind == "local" else len(embeddings)
        attended = _attention(config, w, x, documents, window, memories[layer], use_memory)
        x = [token + a for token, a in zip(x, attended, strict=True)]
        x = [token + _mlp(config, w, token) for token in x]
    scale, shift = weights["transformer.ln_f.weight"], weights["transformer.ln_f.bias"]
    x = [_layer_norm(token, scale, shift, config.layer_norm_epsilon) for token in x]
    return [weights["lm_head.weight"] @ token for token in x]


def _attention(
    config: InfiniGPTNeoConfig,
    w: dict[str, Tensor],
    x: list[Tensor],
    documents: list[int],
    window: int,
    memory: Memory,
    use_memory: bool,
) -> list[Tensor]:
    H = config.num_heads
    D = config.hidden_size // H
    heads = {}  # by "q", "k", "v": of each head, of each token
    normed = [_layer_norm(token, w["ln_1.weight"], w["ln_1.bias"], config.layer_norm_epsilon) for token in x]
    for name in ("q", "k", "v"):
        projected = [w[f"attn.attention.{name}_proj.weight"] @ token for token in normed]
        if config.short_conv and name != "q":
            projected = _short_convolution(w[f"attn.attention.short_conv.{name}"], projected, documents)
        heads[name] = [[token[h * D : (h + 1) * D] for token in projected] for h in range(H)]

    features = REFERENCE_FEATURES.get(config.memory_rule, _phi)
    parameters = {name.removeprefix(PARAMETERS): weight for name, weight in w.items() if name.startswith(PARAMETERS)}
    out = []  # of each head, of each token
    for h in range(H):
        q, k, v = (heads[name][h] for name in ("q", "k", "v"))
        gate = 1 / (1 + torch.exp(-w["attn.attention.beta"][h]))
        tokens = []
        for i in range(len(x)):
            visible = [j for j in range(i + 1) if documents[j] == documents[i] and i - j < window]
            scores = torch.stack([_rotated(config, q[i], i) @ _rotated(config, k[j], j) for j in visible])  # scale 1.0
            weights = torch.exp(scores - scores.max())
            weights = weights / weights.sum()
            result = sum(weight * v[j] for weight, j in zip(weights, visible, strict=True))
            if use_memory and memory.document == documents[i]:
                phi_q = features(q[i], parameters, h)
                norm = 1 if config.memory_rule in WITHOUT_Z else phi_q @ memory.z[h]
                retrieved = (phi_q @ memory.M[h]) / norm
                result = gate * retrieved + (1 - gate) * result
            tokens.append(result)
        out.append(tokens)

    # The segment is written after all reads, and only its last document.
    last = documents[-1]
    if memory.document != last:
        memory.M = [torch.zeros_like(M) for M in memory.M]
        memory.z = [torch.zeros_like(z) for z in memory.z]
        memory.document = last
    rule = REFERENCE_RULES[config.memory_rule]
    for h in range(H):
        written = [
            (features(heads["k"][h][i], parameters, h), heads["v"][h][i], heads["k"][h][i])
            for i in range(len(x))
            if documents[i] == last
        ]
        memory.M[h], memory.z[h] = rule(memory.M[h], memory.z[h], written, parameters, h)

    joined = [torch.cat([out[h][i] for h in range(H)]) for i in range(len(x))]
    return [w["attn.attention.out_proj.weight"] @ token + w["attn.attention.out_proj.bias"] for token in joined]


def _short_convolution(weight: Tensor, x: list[Tensor], documents: list[int]) -> list[Tensor]:
    """Return for each token the sum of weight[j] * x[t - j] over tokens of its document."""
    result = []
    for t in range(len(x)):
        taps = [j for j in range(len(weight)) if t - j >= 0 and documents[t - j] == documents[t]]
        result.append(sum(weight[j] * x[t - j] for j in taps))
    return result


PARAMETERS = "attn.attention.memory_parameters."
Written = list[tuple[Tensor, Tensor, Tensor]]  # phi(k), v and k of each token
WITHOUT_Z = {"gated_delta"}  # rules whose reads are not normalized
Write = Callable[[Tensor, Tensor, Written, dict[str, Tensor], int], tuple[Tensor, Tensor]]


def _write_linear(M: Tensor, z: Tensor, written: Written, parameters: dict, h: int) -> tuple[Tensor, Tensor]:
    for phi_k, v, _ in written:
        M, z = M + torch.outer(phi_k, v), z + phi_k
    return M, z


def _write_delta(
    M: Tensor, z: Tensor, written: Written, parameters: dict, h: int, bounded: bool
) -> tuple[Tensor, Tensor]:
    before, z_after = M, z + sum(phi_k for phi_k, _, _ in written)
    norm = z_after if bounded else z
    for phi_k, v, _ in written:
        if phi_k @ norm > 0:
            v = v - phi_k @ before / (phi_k @ norm)
        M = M + torch.outer(phi_k, v)
    return M, z_after


def _write_gated_delta(M: Tensor, z: Tensor, written: Written, parameters: dict, h: int) -> tuple[Tensor, Tensor]:
    for phi_k, v, k in written:
        strength = 1 / (1 + torch.exp(-(parameters["strength"][h] @ k + parameters["strength_bias"][h])))
        M = M + strength * torch.outer(phi_k, v - phi_k @ M)
    return M, z


# (M, z, written tokens, the rule's parameters, head) -> M and z of one head after a segment. Tests may add a rule.
REFERENCE_RULES: dict[str, Write] = {
    "linear": _write_linear,
    "softmax": _write_linear,
    "delta": partial(_write_delta, bounded=True),
    "delta_paper": partial(_write_delta, bounded=False),
    "gated_delta": _write_gated_delta,
}


def _phi(x: Tensor, parameters: dict, h: int) -> Tensor:
    return torch.where(x > 0, x + 1, torch.exp(torch.clamp(x, max=0)))


def _softmax(x: Tensor, parameters: dict, h: int) -> Tensor:
    powers = torch.exp(torch.exp(parameters["log_scale"][h]) * x)
    return powers / powers.sum()


def _unit_softmax(x: Tensor, parameters: dict, h: int) -> Tensor:
    phi = _softmax(x, parameters, h)
    return phi / torch.sqrt((phi * phi).sum())


# (x, the rule's parameters, head) -> phi(x), where it is not ELU(x) + 1
REFERENCE_FEATURES = {"softmax": _softmax, "gated_delta": _unit_softmax}


def _rotated(config: InfiniGPTNeoConfig, x: Tensor, position: int) -> Tensor:
    """Return x with each pair (x[i], x[i + D/2]) rotated by position * base^(-2i/D), the angle in fp32."""
    if config.position_embedding != "rotary":
        return x
    D = len(x)
    result = [None] * D
    for i in range(D // 2):
        frequency = config.rotary_base ** (torch.tensor(-2 * i, dtype=torch.float32) / D)
        angle = position * frequency
        cos, sin = angle.cos(), angle.sin()
        result[i] = x[i] * cos - x[i + D // 2] * sin
        result[i + D // 2] = x[i + D // 2] * cos + x[i] * sin
    return torch.stack(result)


def _mlp(config: InfiniGPTNeoConfig, w: dict[str, Tensor], x: Tensor) -> Tensor:
    x = _layer_norm(x, w["ln_2.weight"], w["ln_2.bias"], config.layer_norm_epsilon)
    x = w["mlp.c_fc.weight"] @ x + w["mlp.c_fc.bias"]
    x = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))  # "gelu_new"
    return w["mlp.c_proj.weight"] @ x + w["mlp.c_proj.bias"]


def _layer_norm(x: Tensor, scale: Tensor, shift: Tensor, epsilon: float) -> Tensor:
    variance = ((x - x.mean()) ** 2).mean()
    return (x - x.mean()) / torch.sqrt(variance + epsilon) * scale + shift


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float64, **fields) -> InfiniGPTNeoForCausalLM:
    """Return a model in eval mode with two layers, one of each kind, and large random weights.

    `fields`: of InfiniGPTNeoConfig or BlockSchedule. The forward pass returns no cache by default.
    """
    torch.manual_seed(seed)
    schedule, fields = split_schedule(fields)
    model = InfiniGPTNeoForCausalLM(InfiniGPTNeoConfig(**(TINY | fields)))
    model.block_schedule = schedule
    model.config.use_cache = fields.get("use_cache", False)  # generate() has a setting of its own
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ln_" not in name or name.endswith("bias"):
                parameter.normal_(std=0.4)
            else:
                parameter.normal_(mean=1.0, std=0.2)
    return model.to(dtype).eval()


def writer(**fields) -> InfiniGPTNeoForCausalLM:
    """Return a tiny model whose greedy text varies: with tied embeddings a random model repeats one token."""
    return tiny_model(seed=26, tie_word_embeddings=False, **fields)


def gradients(loss: Tensor, model: torch.nn.Module) -> dict[str, Tensor]:
    """Return the gradient of every parameter by name, 0 where the loss does not depend on it."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, grads, strict=True)}


def split_schedule(fields: dict) -> tuple[BlockSchedule, dict]:
    """Return the block schedule that some of the fields describe, and the others."""
    names = [field.name for field in dataclasses.fields(BlockSchedule) if field.name in fields]
    schedule = BlockSchedule(**{name: fields[name] for name in names})
    return schedule, {name: value for name, value in fields.items() if name not in names}


TINY = {
    "vocab_size": 19,
    "hidden_size": 8,
    "num_layers": 2,
    "num_heads": 2,
    "attention_types": [[["global", "local"], 1]],
    "window_size": 3,
    "max_position_embeddings": 32,
    "segment_length": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def random_ids(B: int, T: int, seed: int = 0) -> Tensor:
    """Return (B, T) random tokens of the tiny model, without 0, its end-of-text token."""
    return torch.randint(1, TINY["vocab_size"], (B, T), generator=torch.Generator().manual_seed(seed))
