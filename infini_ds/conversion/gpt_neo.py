"""Convert GPT-Neo to Infini-GPT-Neo: the same weights, and one gate a head that mixes in the memory."""

import tempfile
from pathlib import Path

from transformers import AutoTokenizer, GPTNeoConfig, PreTrainedTokenizerBase

from infini_ds.conversion.card import format_card
from infini_ds.conversion.export import write_folder
from infini_ds.model import InfiniGPTNeoConfig, InfiniGPTNeoForCausalLM
from infini_ds.utils.errors import UserError, first_line
from infini_ds.utils.pretrained import TOKENIZER_FILES, load_pretrained, load_tokenizer_files, read_config

# Initial beta of every gate; sigmoid(beta) is the weight of the memory in a head's output: 0.02 or 0.5.
GATES = {"closed": -4.0, "zero": 0.0}

# The parameters that a GPT-Neo does not have.
OURS = r"\.attn\.attention\.(beta$|memory_parameters\.|short_conv\.)|\.embed_conv\."


def from_gpt_neo(
    name: str,
    out: Path,
    segment_length: int,
    gates: str,
    max_shard_size: str = "2GB",
    short_conv: int = 0,
    embed_conv: int = 0,
) -> None:
    """Write a folder that training can start from (`model.start_from=`).

    Args:
        name: folder or hub name of a GPTNeoForCausalLM.
        gates: "closed" to start close to GPT-Neo on each segment by itself, "zero" to start with equal weights for
            local attention and memory.
        short_conv, embed_conv: widths of the convolutions of keys and values, and of the embeddings, which start as the
            identity; 0 for none.
    Raises:
        UserError: the model cannot be read or is incomplete, is not a GPT-Neo, has fewer positions than
            `segment_length`, or a width is not possible.
    """
    given = f"--from-gpt-neo {name}"
    if Path(name, "config.json").is_file():
        read_config(Path(name), given)
    try:
        gpt_neo = GPTNeoConfig.get_config_dict(name)[0]
    except OSError as error:
        raise UserError(f"{given}: {first_line(error)}") from error
    if gpt_neo.get("model_type") != "gpt_neo":
        raise UserError(f"{given} is a {gpt_neo.get('model_type')!r} model, not gpt_neo")
    fields = GPTNeoConfig(**gpt_neo).to_diff_dict()
    for key in ("model_type", "architectures", "transformers_version", "torch_dtype", "dtype"):
        fields.pop(key, None)
    try:
        config = InfiniGPTNeoConfig(
            **fields,
            segment_length=segment_length,
            gate_init=GATES[gates],
            short_conv=short_conv,
            embed_conv=embed_conv,
        )
    except ValueError as error:
        raise UserError(f"{given}: {first_line(error)}") from error
    model = load_pretrained(InfiniGPTNeoForCausalLM, name, given, config, may_lack=OURS)
    origin = f"Converted from `{name}`: each layer has a memory, whose gates start {gates} and are not trained yet."
    tokenizer = _load_tokenizer(name, given)
    card = format_card(out.name, config, origin, out.name, tokenizer is not None)
    with tempfile.TemporaryDirectory() as folder:
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        write_folder(model, Path(folder) if tokenizer is not None else None, out, card, max_shard_size)


def _load_tokenizer(name: str, given: str) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of a folder or hub name, or None where there are weights alone.

    Raises:
        UserError: a folder holds files of a tokenizer that cannot be loaded.
    """
    if any(Path(name, file).exists() for file in TOKENIZER_FILES):
        return load_tokenizer_files(Path(name), given)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, TypeError):
        return None
    return tokenizer
