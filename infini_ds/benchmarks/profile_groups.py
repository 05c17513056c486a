"""What the operators of a profile, or the kernels of a GPU, are for."""

import re

from infini_ds.benchmarks.results import Profile

# The first match counts. Names are those of PyTorch's operators on the CPU, and of kernels of cuBLAS, CUTLASS,
# FlashAttention, Triton and PyTorch on a GPU.
GROUPS = (
    ("attention in a segment", r"flash|fmha|sdpa|attention"),
    ("optimizer", r"adam|multi_tensor"),
    ("matrix products", r"gemm|gemv|cutlass|cublas|nvjet|xmma|aten::(add)?mm\b|aten::(bmm|baddbmm|linear|matmul)"),
    ("compiled kernels", r"triton"),
    ("softmax and loss", r"softmax|nll|loss"),
    ("norms", r"layer_norm|layernorm"),
    ("activation function", r"gelu"),
    ("copies", r"memcpy|memset|copy|aten::(cat|clone|contiguous|fill_|zero_)|CatArray|FillFunctor"),
    ("element by element", r"elementwise|vectorized|reduce|aten::(add|mul|div|sum|exp|clamp|lerp|sub|where)_?\b"),
)
OTHERS = "others"


def shares(profile: Profile) -> dict[str, float]:
    """Return the share of each group in the time of all operators, the largest first."""
    total = sum(operator.seconds for operator in profile.operators)
    sums: dict[str, float] = {}
    for operator in profile.operators:
        group = next((name for name, words in GROUPS if re.search(words, operator.name, re.IGNORECASE)), OTHERS)
        sums[group] = sums.get(group, 0.0) + operator.seconds / total
    return dict(sorted(sums.items(), key=lambda item: -item[1]))
