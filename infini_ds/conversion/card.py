"""The model card of an exported folder: the model, how to use it, how it was trained, its validation loss."""

import json
from pathlib import Path

from infini_ds.checkpoint.manifest import read_manifest
from infini_ds.metrics.metric_writers import read_metrics
from infini_ds.model import InfiniGPTNeoConfig

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [infini-attention, gpt-neo, compressive-memory]
---
# {name}

A GPT-Neo language model with Infini-attention ([Munkhdalai et al. 2024](https://arxiv.org/abs/2404.07143)): attention
within segments of {segment_length} tokens, and in every layer a compressive memory of all earlier segments.
{layers} layers, width {width}, {heads} heads, vocabulary {vocabulary}. The memory has the same size for text of any
length, so the length of a text is not limited: `max_position_embeddings` in `config.json` is the number of positions
within a segment, and `n_positions` says to tools that more tokens are read.

{usage}

### Read once, ask often
The memory of a text is a file of the same size for a text of any length, and continuing from it does not read the text
again. A file is refused by every other model, and by this one at another step of its training.

```python
cache = model(prompt, use_cache=True).past_key_values  # after the lines above: any text, a book
cache.save("text.memory", model)

cache = model.load_cache("text.memory")
question = torch.tensor([[5, 6, 7]])  # token ids that continue the text
answer = model.generate(question, past_key_values=cache.copy(), max_new_tokens=50)  # each question has a copy
```

{origin}
"""

LOAD = """import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = {folder}  # the path of this folder, or its name on the hub
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)"""

WITH_TOKENIZER = """```python
{load}
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)

ids = tokenizer.encode("import", add_special_tokens=False)
prompt = torch.tensor([[{start}*ids]])
output = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=50)
print(tokenizer.decode(output[0], skip_special_tokens=True))
```"""

WITHOUT_TOKENIZER = """The folder holds no tokenizer: take that of the model it was converted from.

```python
{load}

prompt = torch.tensor([[{start}1, 2, 3]])  # token ids
output = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=50)
print(output[0].tolist())
```"""


def format_card(title: str, config: InfiniGPTNeoConfig, origin: str, folder: str, has_tokenizer: bool = True) -> str:
    """Return the card of a model.

    Args:
        origin: Markdown on where its weights come from.
        folder: name of the folder, for the example.
        has_tokenizer: whether the folder holds one.
    """
    # A tokenizer may add the start token or not, and a token at the end: the example adds exactly the one at the start.
    start = "" if config.bos_token_id is None else "model.config.bos_token_id, "
    example = (WITH_TOKENIZER if has_tokenizer else WITHOUT_TOKENIZER).format(
        load=LOAD.format(folder=json.dumps(folder, ensure_ascii=False)), start=start
    )
    note = "Every document of the training data begins with the start token, and so does a prompt:\n\n" if start else ""
    return CARD.format(
        name=title,
        segment_length=config.segment_length,
        layers=config.num_layers,
        width=config.hidden_size,
        heads=config.num_heads,
        vocabulary=config.vocab_size,
        usage=note + example,
        origin=origin,
    )


def card_of_checkpoint(checkpoint: Path, run: Path, folder: str, sharpen: float | None = None) -> str:
    """Return the card of a checkpoint that is exported to `folder`: its run's recipe, data and validation loss.

    Args:
        sharpen: what the scales of the memory's softmax features are multiplied by.
    """
    config = InfiniGPTNeoConfig.from_pretrained(checkpoint)
    state = read_manifest(checkpoint).state
    recipe = (run / "recipe.yaml").read_text()
    data = json.loads((run / "data_manifest.json").read_text())
    validations = [line for line in read_metrics(run) if "validation/loss" in line and line["step"] <= state.step]
    origin = f"## Training\nStep {state.step}, {state.tokens:,} tokens.\n"
    if validations:
        last = validations[-1]
        origin += (
            f"Validation loss at step {last['step']}: {last['validation/loss']:.4f} nats a token, "
            f"{last['validation/loss_memory_off']:.4f} with the memory off.\n"
        )
    if sharpen is not None:
        origin += (
            f"After training the scales of the memory's softmax features were multiplied by {sharpen}: the losses are "
            "those before.\n"
        )
    origin += f"\n### Data\n```json\n{json.dumps(data, indent=1)}\n```\n\n### Recipe\n```yaml\n{recipe}```"
    return format_card(run.name, config, origin, folder)
