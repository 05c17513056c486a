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
length.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
inputs = tokenizer(tokenizer.bos_token + "import", return_tensors="pt")  # every document begins with this token
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

{origin}
"""


def format_card(name: str, config: InfiniGPTNeoConfig, origin: str) -> str:
    """Return the card of a model. `origin`: Markdown on where its weights come from."""
    return CARD.format(
        name=name,
        segment_length=config.segment_length,
        layers=config.num_layers,
        width=config.hidden_size,
        heads=config.num_heads,
        vocabulary=config.vocab_size,
        origin=origin,
    )


def card_of_checkpoint(checkpoint: Path, run: Path) -> str:
    """Return the card of a checkpoint, with the recipe, data and validation loss that its run recorded."""
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
    origin += f"\n### Data\n```json\n{json.dumps(data, indent=1)}\n```\n\n### Recipe\n```yaml\n{recipe}```"
    return format_card(run.name, config, origin)
