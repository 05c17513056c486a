"""The linear rule (Munkhdalai et al. 2024, eq. 4): each segment adds to the memory."""

from collections.abc import Mapping

from torch import Tensor

from .memory import MemoryState, prefix_sums, segment_updates
from .memory_rule import AssociativeRule, register_memory_rule
from .sequence_parallel import SequenceGroup


class LinearRule(AssociativeRule):
    """M_s = M_{s-1} + phi(K_s)^T V_s and z_s = z_{s-1} + sum_t phi(k_t), for all segments at once."""

    name = "linear"

    def write(
        self,
        state: MemoryState,
        k: Tensor,
        v: Tensor,
        write_mask: Tensor | None,
        memory_document: Tensor | None,
        parameters: Mapping[str, Tensor],
    ) -> tuple[MemoryState, MemoryState]:
        updates = segment_updates(self.key_features(k, write_mask, parameters), v)
        M, M_after = prefix_sums(state.M, updates.M, memory_document)
        z, z_after = prefix_sums(state.z, updates.z, memory_document)
        return MemoryState(M, z), MemoryState(M_after, z_after)

    def write_divided(
        self,
        state: MemoryState,
        k: Tensor,
        v: Tensor,
        write_mask: Tensor | None,
        memory_document: Tensor | None,
        parameters: Mapping[str, Tensor],
        group: SequenceGroup,
    ) -> tuple[MemoryState, MemoryState]:
        updates = segment_updates(self.key_features(k, write_mask, parameters), v)
        sums, after = group.prefix_sums(state, updates, memory_document)
        return MemoryState(*(before for before, _ in sums)), after


register_memory_rule(LinearRule())
