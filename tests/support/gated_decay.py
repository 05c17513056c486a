"""A memory rule for tests, added without touching the project: each head forgets at a learned rate before it writes."""

import torch
from torch import nn

from infini_ds.model.memory import MemoryState, key_features, segment_updates
from infini_ds.model.memory_rule import AssociativeRule, register_memory_rule


class GatedDecay(AssociativeRule):
    """M_s = sigmoid(a_h) M_{s-1} + phi(K_s)^T V_s, z alike, for segments that write anything; `a` is learned."""

    name = "gated_decay"
    optimizer_group = "gates"

    def parameters(self, config):
        return {"a": nn.Parameter(torch.full((config.num_heads,), 2.0))}

    def write(self, state, k, v, write_mask, memory_document, parameters):
        B, N = k.shape[:2]
        updates = segment_updates(key_features(k, write_mask), v)
        decay = torch.sigmoid(parameters["a"].to(state.z.dtype))
        keep = decay.expand(B, N, -1)  # (B, N, H)
        if write_mask is not None:
            keep = torch.where(write_mask.any(-1)[:, :, None], keep, 1)
        if memory_document is not None:
            keep = keep * (memory_document[:, :-1] == memory_document[:, 1:])[:, :, None]
        states = [state]
        for s in range(N):
            M = keep[:, s, :, None, None] * states[-1].M + updates.M[:, s]
            states.append(MemoryState(M, keep[:, s, :, None] * states[-1].z + updates.z[:, s]))
        before = MemoryState(*(torch.stack(x, dim=1) for x in zip(*states[:-1], strict=True)))
        return before, states[-1]

    def flops_per_token(self, config):
        D, S = config.head_dim, config.segment_length
        return super().flops_per_token(config) + config.num_heads * D * (D + 1) / S  # the decay, once a segment


register_memory_rule(GatedDecay())
