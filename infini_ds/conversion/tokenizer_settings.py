"""The settings of an exported tokenizer, so that everyday calls of it fit the model."""

import json
from pathlib import Path

from transformers import AutoTokenizer

from infini_ds.model import InfiniGPTNeoConfig
from infini_ds.utils.pretrained import read_json

UNLIMITED = int(1e30)  # what transformers writes for a tokenizer without a limit


def write_tokenizer_settings(folder: Path, config: InfiniGPTNeoConfig) -> None:
    """Set, in tokenizer_config.json of an exported folder, what the model expects.

    - `model_input_names`: no `token_type_ids`, which the model does not have.
    - `padding_side`: left, since text is continued at its end.
    - `model_max_length`: none; the tokenizer of a GPT-Neo names that model's.
    - `pad_token`: if it has none, that of the configuration, or else the end token.
    """
    file = folder / "tokenizer_config.json"
    settings = read_json(file, str(folder))
    settings |= {
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",
        "model_max_length": UNLIMITED,
    }
    if (folder / "tokenizer.json").exists():  # transformers 4 and 5 both know this class
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    _write(file, settings)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:
        ids = (config.pad_token_id, config.eos_token_id, tokenizer.eos_token_id)
        pad = next((each for each in ids if each is not None), None)
        if pad is not None:
            _write(file, settings | {"pad_token": tokenizer.convert_ids_to_tokens(pad)})


def _write(file: Path, settings: dict[str, object]) -> None:
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
