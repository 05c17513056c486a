"""The smallest task that needs a memory that binds: four facts in one segment, questions about them segments later.

python tests/support/binding.py even key --seeds 0 1 2

A fact is a key and a value, in either order, 16 of each; a question is a key, and its answer the value. Each fact is
asked for once. Chance is 1/16; knowing which four values were named, but not whose, is worth a third. Local attention
cannot reach the facts. Half of the batches have their questions in the segment of the facts, from which local attention
learns queries that the memory can use.

Shapes: B rows, T tokens.
"""

import argparse
import time
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from infini_ds.model import InfiniGPTNeoConfig, InfiniGPTNeoForCausalLM
from infini_ds.model.loss import IGNORE_INDEX
from infini_ds.model.short_conv import short_convolution

KEYS, VALUES, FILLER = 16, 16, 8
QUESTION = KEYS + VALUES + FILLER
PAIRS, S = 4, 20  # facts of a row; tokens of a segment, enough for the facts and all questions
ORDERS = ("key", "value", "both")  # what a fact names first; "both": drawn for each row
VARIANTS = {
    "none": "no convolution",
    "even": "k and v, even start",
    "identity": "k and v, identity at the start",
    "k": "k alone, even start",
    "v": "v alone, even start",
    "q": "q, k and v, even start",
}


def examples(generator: torch.Generator, B: int, order: str, segments: int) -> tuple[Tensor, Tensor]:
    """Return ids and labels (B, T): facts, filler and questions, `segments` segments apart (0: in the same one).

    The facts begin anywhere in their segment if the questions are in another one.
    """
    T = S * (segments + 1)
    ids = KEYS + VALUES + torch.randint(FILLER, (B, T), generator=generator)
    keys = torch.rand(B, KEYS, generator=generator).argsort(1)[:, :PAIRS]
    values = KEYS + torch.randint(VALUES, (B, PAIRS), generator=generator)
    value_first = torch.rand(B, 1, generator=generator) < {"key": 0.0, "value": 1.0, "both": 0.5}[order]
    facts = torch.stack([torch.where(value_first, values, keys), torch.where(value_first, keys, values)], dim=2)
    at = torch.zeros(B, 1, dtype=torch.long)
    if segments:
        at = torch.randint(S - 2 * PAIRS + 1, (B, 1), generator=generator)
    ids.scatter_(1, at + torch.arange(2 * PAIRS), facts.flatten(1))
    questions = T - S + 2 * PAIRS + 3 * torch.arange(PAIRS)
    asked = torch.rand(B, PAIRS, generator=generator).argsort(1)
    ids[:, questions] = QUESTION
    ids[:, questions + 1] = keys.gather(1, asked)
    ids[:, questions + 2] = values.gather(1, asked)
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[:, questions + 2] = ids[:, questions + 2]
    return ids, labels


class ConvolvedProjection(nn.Module):
    """A projection and a short convolution of its output, for queries, which the model does not convolve."""

    def __init__(self, projection: nn.Linear, width: int):
        super().__init__()
        self.projection = projection
        self.weight = nn.Parameter(torch.full((width, projection.out_features), 1 / width))

    def forward(self, hidden: Tensor) -> Tensor:
        x = self.projection(hidden)
        segments = x.view(x.shape[0], -1, 1, S, x.shape[2])  # as (B, N, H, S, D) with one head
        return short_convolution(segments, self.weight).view(x.shape)


def build(variant: str, seed: int, width: int = 2) -> InfiniGPTNeoForCausalLM:
    """Return a new model of one of VARIANTS."""
    torch.manual_seed(seed)
    config = InfiniGPTNeoConfig(
        vocab_size=QUESTION + 1,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global"], 2]],
        segment_length=S,
        max_position_embeddings=S,
        initializer_range=0.05,
        short_conv=0 if variant == "none" else width,
        **dict.fromkeys(("resid_dropout", "embed_dropout", "attention_dropout"), 0.0),
    )
    model = InfiniGPTNeoForCausalLM(config)
    for layer in model.transformer.h:
        attention = layer.attention
        if variant == "identity":
            attention.short_conv.start_as_identity()
        elif variant in ("k", "v"):
            frozen = attention.short_conv.v if variant == "k" else attention.short_conv.k
            with torch.no_grad():
                frozen.copy_(torch.eye(width)[0][:, None])
            frozen.requires_grad_(False)
        elif variant == "q":
            attention.q_proj = ConvolvedProjection(attention.q_proj, width)
    return model


def train(model: InfiniGPTNeoForCausalLM, order: str, seed: int, steps: int, rate: float) -> list[float]:
    """Train with AdamW, and return the loss of each step."""
    gates = [weight for name, weight in model.named_parameters() if name.endswith("beta")]
    others = [w for name, w in model.named_parameters() if not name.endswith("beta") and w.requires_grad]
    groups = [{"params": others, "lr": rate}, {"params": gates, "lr": 1e-2}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 20, (steps - step) / (0.3 * steps))
    )
    generator, losses = torch.Generator().manual_seed(1000 + seed), []
    model.train()
    for step in range(steps):
        segments = step % 2 * int(torch.randint(1, 3, (), generator=generator))
        ids, labels = examples(generator, 32 if segments else 64, order, segments)
        loss = model(ids, labels=labels).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def accuracy(model: InfiniGPTNeoForCausalLM, order: str, segments: int, memory: str = "on", rows: int = 200) -> float:
    """Return the share of correct answers with the memory on, off, or of another row."""
    ids, labels = examples(torch.Generator().manual_seed(7), rows, order, segments)
    settings = {"on": {}, "off": {"use_memory": False}, "other": {"memory_of": torch.arange(rows).roll(1)}}
    found = model.eval()(ids, use_cache=False, **settings[memory]).logits[:, :-1].argmax(-1)
    asked = labels[:, 1:] != IGNORE_INDEX
    return (found == labels[:, 1:])[asked].double().mean().item()


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", choices=VARIANTS, help=str(VARIANTS))
    parser.add_argument("order", choices=ORDERS, help="what facts name first in training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rate", type=float, default=5e-3, help="learning rate")
    parser.add_argument("--segments", type=int, nargs="+", default=[1, 16], help="between facts and questions")
    args = parser.parse_args(None if arguments is None else list(arguments))
    torch.set_num_threads(1)
    for seed in args.seeds:
        start = time.process_time()
        model = build(args.variant, seed)
        losses = train(model, args.order, seed, args.steps, args.rate)
        seconds, found = time.process_time() - start, []
        for order in ("key", "value") if args.order == "both" else (args.order,):
            for segments in args.segments:
                of_settings = [f"{accuracy(model, order, segments, memory):.3f}" for memory in ("on", "off", "other")]
                found.append(f"{order}@{segments}: {'/'.join(of_settings)}")
        mean = sum(losses[-20:]) / 20
        print(f"{args.variant} {args.order} seed {seed} loss {mean:.3f} {seconds:.1f} s", *found, sep="  ", flush=True)


if __name__ == "__main__":
    main()
