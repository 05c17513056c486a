"""GPT-Neo language models with Infini-attention, trained with DeepSpeed."""

__version__ = "0.2.0"
