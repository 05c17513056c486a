"""A memory rule for tests, added without touching the project: each head forgets at a learned rate before it writes."""

import torch
from torch import nn

from infini_ds.model.memory import MemoryState, memory_dtype, segment_updates
from infini_ds.model.memory_rule import AssociativeRule, register_memory_rule


def decayed(state, span):
    """Return the memory after segments that keep a share of it, (B, H), and write M and z."""
    keep, M, z = span
    return MemoryState(keep[:, :, None, None] * state.M + M, keep[:, :, None] * state.z + z)


class GatedDecay(AssociativeRule):
    """M_s = sigmoid(a_h) M_{s-1} + phi(K_s)^T V_s, z alike, for segments that write anything; `a` is learned."""

    name = "gated_decay"
    optimizer_group = "gates"

    def parameters(self, config):
        return {"a": nn.Parameter(torch.full((config.num_heads,), 2.0))}

    def write(self, state, k, v, write_mask, memory_document, parameters):
        updates = segment_updates(self.key_features(k, write_mask, parameters), v)
        keep = self.keep(k, write_mask, memory_document, parameters)
        states = [state]
        for s in range(k.shape[1]):
            states.append(decayed(states[-1], (keep[:, s], updates.M[:, s], updates.z[:, s])))
        before = MemoryState(*(torch.stack(x, dim=1) for x in zip(*states[:-1], strict=True)))
        return before, states[-1]

    def write_divided(self, state, k, v, write_mask, memory_document, parameters, group):
        """A rank's segments are to the memory as one segment: it decays by the product, and the writes are added."""
        own = group.of_span(memory_document)
        _, written = self.write(MemoryState(*map(torch.zeros_like, state)), k, v, write_mask, own, parameters)
        keep = self.keep(k, write_mask, own, parameters).prod(1)
        state, after = group.scan(decayed, state, (keep, *written))
        before, _ = self.write(state, k, v, write_mask, own, parameters)
        return before, after

    def keep(self, k, write_mask, memory_document, parameters):
        """Return what is left of the memory when each segment is written, (B, N, H)."""
        keep = torch.sigmoid(parameters["a"].to(memory_dtype(k.dtype))).expand(*k.shape[:2], -1)
        if write_mask is not None:
            keep = torch.where(write_mask.any(-1)[:, :, None], keep, 1)
        if memory_document is not None:
            keep = keep * (memory_document[:, :-1] == memory_document[:, 1:])[:, :, None]
        return keep

    def flops_per_token(self, config):
        D, S = config.head_dim, config.segment_length
        return super().flops_per_token(config) + config.num_heads * D * (D + 1) / S  # the decay, once a segment


register_memory_rule(GatedDecay())
