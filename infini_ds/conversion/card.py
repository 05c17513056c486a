"""The model card of an export: what the model is, how to use it, how it came about, what it reached."""

import json

from infini_ds.checkpoint.manifest import read_manifest
from infini_ds.conversion.locate import Source
from infini_ds.metrics.metric_writers import read_metrics
from infini_ds.model import InfiniGPTNeoConfig

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [infini-attention, gpt-neo, compressive-memory]
---
# {name}

A GPT-Neo language model with Infini-attention ([Munkhdalai et al. 2024](https://arxiv.org/abs/2404.07143)): attention
inside segments of {segment_length} tokens, and a compressive memory of all earlier segments in every layer.
{layers} layers, width {width}, {heads} heads, vocabulary {vocabulary}. Text of any length costs the same memory.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
inputs = tokenizer(tokenizer.bos_token + "import", return_tensors="pt")  # the token that every document begins with
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

{origin}
"""


def fill_card(name: str, config: InfiniGPTNeoConfig, origin: str) -> str:
    return CARD.format(
        name=name,
        segment_length=config.segment_length,
        layers=config.num_layers,
        width=config.hidden_size,
        heads=config.num_heads,
        vocabulary=config.vocab_size,
        origin=origin,
    )


def model_card(source: Source) -> str:
    """The card of a checkpoint, from what its run wrote down."""
    config = InfiniGPTNeoConfig.from_pretrained(source.checkpoint)
    stands = read_manifest(source.checkpoint).state
    recipe = (source.run / "recipe.yaml").read_text()
    data = json.loads((source.run / "data_manifest.json").read_text())
    results = [line for line in read_metrics(source.run) if "validation/loss" in line and line["step"] <= stands.step]
    origin = f"## Training\nStep {stands.step}, {stands.tokens:,} tokens.\n"
    if results:
        last = results[-1]
        origin += (
            f"Validation loss at step {last['step']}: {last['validation/loss']:.4f} nats a token, "
            f"{last['validation/loss_memory_off']:.4f} with the memory switched off.\n"
        )
    origin += f"\n### Data\n```json\n{json.dumps(data, indent=1)}\n```\n\n### Recipe\n```yaml\n{recipe}```"
    return fill_card(source.run.name, config, origin)
