"""GPT-Neo -> Infini-GPT-Neo: the same weights, and gates that let the memory in as training opens them."""

import contextlib
from pathlib import Path

import torch
from transformers import AutoTokenizer, GPTNeoConfig
from transformers.utils import logging

from infini_ds.conversion.card import fill_card
from infini_ds.conversion.export import write_folder
from infini_ds.model import InfiniGPTNeoConfig, InfiniGPTNeoForCausalLM
from infini_ds.utils.errors import UserError

GATES = {"closed": -4.0, "zero": 0.0}  # sigmoid: 2% of the memory, or half of it


def from_gpt_neo(name: str, out: Path, segment_length: int, gates: str, max_shard_size: str = "2GB") -> None:
    """Write a folder that `model.start_from=` of a recipe can go on training.

    Args:
        name: folder or hub name of a GPTNeoForCausalLM.
        gates: "closed": the model begins near GPT-Neo on segments alone; "zero": half local, half memory.
    Raises:
        UserError: it is no GPT-Neo, or its positions do not reach over a segment.
    """
    try:
        theirs = GPTNeoConfig.get_config_dict(name)[0]
    except OSError as error:
        raise UserError(f"--from-gpt-neo {name}: {str(error).splitlines()[0]}") from error
    if theirs.get("model_type") != "gpt_neo":
        raise UserError(f"--from-gpt-neo {name} is a {theirs.get('model_type')!r} model, not gpt_neo")
    fields = GPTNeoConfig(**theirs).to_diff_dict()
    for key in ("model_type", "architectures", "transformers_version", "torch_dtype", "dtype"):
        fields.pop(key, None)
    config = InfiniGPTNeoConfig(**fields, segment_length=segment_length, gate_init=GATES[gates])
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # that the gates are missing there is why we are here
    model = InfiniGPTNeoForCausalLM.from_pretrained(name, config=config, dtype=torch.float32)
    logging.set_verbosity(verbosity)
    origin = f"Made from `{name}` by adding a memory to each layer; its gates start {gates}, not yet trained."
    write_folder(model, None, out, fill_card(out.name, config, origin), max_shard_size)
    with contextlib.suppress(OSError, ValueError, TypeError):  # a folder of weights alone has no tokenizer
        AutoTokenizer.from_pretrained(name).save_pretrained(out)
