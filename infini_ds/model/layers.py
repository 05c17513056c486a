"""A transformer layer of GPT-Neo with Infini-attention. Parameter names are GPT-Neo's."""

from typing import cast

from torch import Tensor, nn
from transformers.activations import ACT2FN

from .attention import InfiniAttention
from .configuration import InfiniGPTNeoConfig
from .memory_rule import State


class InfiniMLP(nn.Module):
    def __init__(self, config: InfiniGPTNeoConfig):
        super().__init__()
        inner = config.intermediate_size or 4 * config.hidden_size
        self.c_fc = nn.Linear(config.hidden_size, inner)
        self.c_proj = nn.Linear(inner, config.hidden_size)
        name = config.activation_function
        # torch's tanh form of GELU is the same function as "gelu_new", in one kernel rather than eight.
        self.act = nn.GELU(approximate="tanh") if name == "gelu_new" else ACT2FN[name]
        self.dropout = nn.Dropout(config.resid_dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.act(self.c_fc(hidden))))


class InfiniLayer(nn.Module):
    def __init__(self, config: InfiniGPTNeoConfig, attention_type: str):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.attn = nn.ModuleDict({"attention": InfiniAttention(config, attention_type)})  # two levels, as in GPT-Neo
        self.ln_2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = InfiniMLP(config)

    @property
    def attention(self) -> InfiniAttention:
        return cast(InfiniAttention, self.attn["attention"])

    def forward(self, hidden: Tensor, *args) -> tuple[Tensor, State, tuple[Tensor, Tensor]]:
        """Return what `InfiniAttention.forward` returns, for the layer; `args` are its further arguments."""
        attended, state, keys_values = self.attention(self.ln_1(hidden), *args)
        hidden = hidden + attended
        return hidden + self.mlp(self.ln_2(hidden)), state, keys_values
