"""Named model sizes: GPT-Neo's from EleutherAI's published configurations, `study-9m` from the TU Delft study."""

from .configuration import InfiniGPTNeoConfig


def _alternating(layers: int) -> list:
    return [[["global", "local"], layers // 2], [["global"], layers % 2]]


PRESETS: dict[str, dict] = {
    # The default on a machine without a GPU.
    "tiny": {"hidden_size": 128, "num_layers": 4, "num_heads": 4, "max_position_embeddings": 512},
    "study-9m": {
        "vocab_size": 10_000,
        "hidden_size": 512,
        "num_layers": 2,
        "num_heads": 4,
        "intermediate_size": 1024,
        "max_position_embeddings": 512,
        "position_embedding": "rotary",
    },
    # study-9m reduced for a CPU: layers, heads and the ratio of the inner width are the same.
    "study-tiny": {
        "hidden_size": 128,
        "num_layers": 2,
        "num_heads": 4,
        "intermediate_size": 256,
        "max_position_embeddings": 512,
        "position_embedding": "rotary",
    },
    "33m": {"hidden_size": 768, "num_layers": 4, "num_heads": 16},
    "125m": {"hidden_size": 768, "num_layers": 12, "num_heads": 12},
    "350m": {"hidden_size": 1024, "num_layers": 24, "num_heads": 16},
    "1.3b": {"hidden_size": 2048, "num_layers": 24, "num_heads": 16},
    "2.7b": {"hidden_size": 2560, "num_layers": 32, "num_heads": 20},
}


def preset_config(name: str, **overrides) -> InfiniGPTNeoConfig:
    """Return the configuration of a preset; `overrides` are fields of `InfiniGPTNeoConfig`.

    Raises:
        ValueError: the preset is unknown, or the value of a field is invalid.
    """
    if name not in PRESETS:
        raise ValueError(f"preset={name!r} is not one of {', '.join(PRESETS)}")
    fields = PRESETS[name] | overrides
    fields.setdefault("attention_types", _alternating(fields["num_layers"]))
    return InfiniGPTNeoConfig(**fields)
