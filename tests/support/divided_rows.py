"""A tiny model on rows that are divided over ranks, against the same model on complete rows, as one of the ranks.

python tests/support/divided_rows.py OUT CASES     writes OUT/RANK.json: the largest differences of each case, and the
errors of all checks
"""

import copy
import json
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import gated_decay  # noqa: F401, registers the rule
import pytest
import torch
import torch.distributed as dist
from reference import TINY, random_ids, tiny_model
from torch.testing import assert_close

from infini_ds.model import InfiniGPTNeoForSequenceClassification, MemoryRule, SequenceGroup, register_memory_rule
from infini_ds.model.linear_rule import LinearRule

exact = {"rtol": 1e-10, "atol": 1e-10}
S = TINY["segment_length"]
# Tokens of a row. With 2 or 4 ranks and blocks of 1 or 3 segments a rank, some blocks are incomplete and some spans
# consist of empty segments.
LENGTHS = {"one segment": 3, "short": 2 * S + 1, "even": 8 * S, "ragged": 6 * S + 2, "long": 13 * S - 1}


@dataclass(frozen=True)
class Case:
    """A model, rows and a block schedule."""

    rule: str = "linear"
    length: str = "ragged"
    rows: str = "plain"  # "packed": documents; "padded": padding anywhere; "both"
    segments: int | None = None  # of a block, on each rank
    recompute: str = "no"  # "blocks": gradient checkpointing; "all": of layers too, and states on the CPU
    dtype: str = "float64"
    truncate: int | None = None  # blocks
    fields: tuple[tuple[str, object], ...] = ()  # of the configuration

    def model(self):
        dtype = getattr(torch, self.dtype)
        everything = self.recompute == "all"
        schedule = {"segments_per_block": self.segments, "truncate_blocks": self.truncate}
        schedule |= {"checkpoint_layers": everything, "offload_states": everything}
        model = tiny_model(3, dtype, memory_rule=self.rule, **schedule, **dict(self.fields)).train()
        if self.recompute != "no":
            model.gradient_checkpointing_enable()
        return model

    def inputs(self) -> dict[str, torch.Tensor]:
        B, T = 3, LENGTHS[self.length]
        generator = torch.Generator().manual_seed(T)
        ids = random_ids(B, T, T)
        labels = ids.masked_fill(torch.rand(B, T, generator=generator) < 0.1, -100)
        inputs = {"input_ids": ids, "labels": labels}
        if self.rows in ("packed", "both"):
            # The first row changes its document in every other segment, the second rarely, the third once.
            starts = torch.rand(B, T, generator=generator) < torch.tensor([0.1, 0.03, 0.0])[:, None]
            starts[2, T // 2] = True
            inputs["document_ids"] = starts.long().cumsum(1)
        if self.rows in ("padded", "both"):
            mask = torch.rand(B, T, generator=generator) > torch.tensor([0.1, 0.5, 0.0])[:, None]
            mask[2, T // 2 :] = False
            inputs |= {"attention_mask": mask.long(), "labels": labels.masked_fill(~mask, -100)}
        return inputs


def outcome(model, inputs: dict[str, torch.Tensor], **arguments) -> dict[str, torch.Tensor]:
    """Return the loss, the memory after the rows, and the gradient of each weight by its name."""
    model.zero_grad()
    output = model(**inputs, **arguments)
    (output.loss.sum() if output.loss.ndim else output.loss).backward()
    found = {"loss": output.loss.detach()}
    for layer, state in enumerate(output.memory):
        found |= {f"state {layer}.{i}": x.detach() for i, x in enumerate(state)}
    for name, weight in model.named_parameters():
        found[f"gradient {name}"] = torch.zeros_like(weight) if weight.grad is None else weight.grad
    return found


def averaged(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the outcome with the mean of the gradients over the ranks, as ZeRO takes it."""
    for name, x in found.items():
        if name.startswith("gradient"):
            dist.all_reduce(x)
            x /= dist.get_world_size()
    return found


def differences(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return the largest differences: "loss", "state", "gradient", relative to the largest value where it exceeds 1."""
    worst = {"loss": 0.0, "state": 0.0, "gradient": 0.0}
    assert a.keys() == b.keys()
    for name in a:
        kind, scale = name.split()[0], max(1.0, a[name].abs().max().item())
        worst[kind] = max(worst[kind], (a[name] - b[name]).abs().max().item() / scale)
    return worst


def compare(case: Case, group: SequenceGroup) -> dict[str, float]:
    model, inputs = case.model(), case.inputs()
    reference = case.model()
    if case.truncate:  # blocks are as long as those of all ranks together
        assert case.segments is not None
        reference = Case(**asdict(case) | {"segments": case.segments * group.size}).model()
    model.sequence_group = group
    return differences(outcome(reference, inputs), averaged(outcome(model, inputs)))


def as_divided(group: SequenceGroup, **case) -> tuple:
    """Return a model on divided rows, the same on complete rows, and the rows."""
    case = Case(**case)
    model, reference = case.model(), case.model()
    model.sequence_group = group
    return model, reference, case.inputs()


def check_losses(group: SequenceGroup) -> None:
    """Every reduction gives the losses of the complete rows, in training and outside of it."""
    model, reference, inputs = as_divided(group, rows="both", segments=1)
    for arguments in ({"loss_reduction": "sum"}, {"loss_reduction": "none"}, {"num_items_in_batch": 7}):
        found = differences(outcome(reference, inputs, **arguments), averaged(outcome(model, inputs, **arguments)))
        assert max(found.values()) < 1e-10, (arguments, found)
    model.eval(), reference.eval()
    with torch.no_grad():
        for arguments in ({"use_memory": False}, {"memory_of": torch.tensor([1, 2, 0])}, {"loss_reduction": "none"}):
            assert_close(model(**inputs, **arguments).loss, reference(**inputs, **arguments).loss, **exact)
        ignored = inputs | {"labels": torch.full_like(inputs["labels"], -100)}
        assert model(**ignored, loss_reduction="sum").loss == 0


def check_outputs(group: SequenceGroup) -> None:
    """Logits and hidden states, where they are asked for, are those of the complete rows, with their gradients."""
    model, reference, inputs = as_divided(group, rows="both", segments=1, recompute="blocks")
    del inputs["labels"]
    weighted = []
    for each in (model, reference):
        output = each(**inputs, output_hidden_states=True)
        assert output.past_key_values is None
        loss = (output.logits * torch.linspace(-1, 1, output.logits.numel()).view_as(output.logits)).sum()
        each.zero_grad()
        (loss + output.hidden_states[1].square().sum()).backward()
        gradients = {f"gradient {name}": weight.grad for name, weight in each.named_parameters()}
        weighted.append({"loss": output.logits.detach()} | gradients)
        weighted[-1] |= {f"state {i}": x.detach() for i, x in enumerate(output.hidden_states)}
    found = differences(weighted[1], averaged(weighted[0]))
    assert max(found.values()) < 1e-10, found
    for kept in (1, torch.tensor([0, -3])):  # so few that each rank keeps the hidden states of these tokens alone
        assert_close(
            model(**inputs, logits_to_keep=kept).logits, reference(**inputs, logits_to_keep=kept).logits, **exact
        )
    hidden = model.transformer(**inputs).last_hidden_state
    assert_close(hidden, reference.transformer(**inputs).last_hidden_state, **exact)


def check_embeddings(group: SequenceGroup) -> None:
    """Embeddings in place of ids: each rank has the gradient of its segments' tokens alone."""
    model, reference, inputs = as_divided(group, segments=1, recompute="blocks")
    embeds = [each.transformer.wte(inputs.pop("input_ids")).detach().requires_grad_() for each in (reference,)]
    embeds.append(embeds[0].detach().clone().requires_grad_())
    for each, x in zip((reference, model), embeds, strict=True):
        each(inputs_embeds=x, **inputs).loss.backward()
    mine = embeds[1].grad.clone() / group.size
    assert 0 < mine.count_nonzero() < mine.numel()
    dist.all_reduce(mine)
    assert_close(mine, embeds[0].grad, **exact)


def check_classifier(group: SequenceGroup) -> None:
    """The last token's hidden state is on one rank, and the logits on all."""
    torch.manual_seed(1)
    config = Case(fields=(("num_labels", 3),)).model().config
    model = InfiniGPTNeoForSequenceClassification(config).double()
    inputs = Case(rows="padded").inputs()
    del inputs["labels"]
    found = []
    for each in (None, group):
        model.sequence_group = each
        found.append(outcome(model, inputs, labels=torch.tensor([0, 2, 1])))
    worst = differences(found[0], averaged(found[1]))
    assert max(worst.values()) < 1e-10, worst


def check_dropout(group: SequenceGroup) -> None:
    """The recomputation repeats each rank's own draws."""
    fields = tuple((f"{name}_dropout", 0.3) for name in ("attention", "embed", "resid"))
    found = []
    for recompute in ("no", "blocks", "all"):
        model, _, inputs = as_divided(group, segments=1, recompute=recompute, fields=fields)
        torch.manual_seed(group.rank)
        found.append(averaged(outcome(model, inputs)))
    for other in found[1:]:
        assert max(differences(found[0], other).values()) < 1e-10
    model.sequence_group = None
    assert abs(outcome(model, inputs)["loss"] - found[0]["loss"]) > 1e-3


def check_frozen(group: SequenceGroup) -> None:
    """Frozen weights leave the exchange as it is, also where nothing before the first layer has a gradient."""
    model, reference, inputs = as_divided(group, rule="delta", segments=1)
    for each in (model, reference):
        each.requires_grad_(False)
        each.transformer.h[1].requires_grad_(True)
    found = differences(outcome(reference, inputs), averaged(outcome(model, inputs)))
    assert max(found.values()) < 1e-10, found


def check_autocast(group: SequenceGroup) -> None:
    """Under autocast in bf16 the memory is exchanged in fp32, and the losses are those of one rank."""
    model, reference, inputs = as_divided(group, rule="delta", segments=1, dtype="float32", recompute="blocks")
    losses = []
    for each in (model, reference):
        with torch.autocast("cpu", torch.bfloat16):
            output = each(**inputs)
        output.loss.backward()
        assert output.memory[0].M.dtype == torch.float32
        losses.append(output.loss.detach())
    assert_close(*losses, rtol=1e-2, atol=0)


class Undivided(LinearRule):
    name = "undivided"
    write_divided = MemoryRule.write_divided


def check_refusals(group: SequenceGroup) -> None:
    """What is not possible with divided rows is refused in one sentence, before anything is exchanged."""
    register_memory_rule(Undivided())
    model = tiny_model(memory_rule="undivided")
    with pytest.raises(ValueError, match=r"memory_rule='undivided' has no write_divided, so .*: set .* or take a rule"):
        model.sequence_group = group
    model, _, inputs = as_divided(group)
    ids, sentence = inputs["input_ids"], "a cache is not possible where rows are divided over ranks: .* to None"
    with pytest.raises(ValueError, match=sentence):
        model.eval()(ids, use_cache=True)
    with pytest.raises(ValueError, match=sentence):
        model.generate(ids, max_new_tokens=2)
    model.sequence_group = None
    assert model.generate(ids, max_new_tokens=2).shape == (3, ids.shape[1] + 2)


def check_copies(group: SequenceGroup) -> None:
    """A model with a group is copied and saved as any other; the group is no part of what is saved."""
    model, _, _ = as_divided(group)
    assert copy.deepcopy(model).sequence_group is group
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        assert type(model).from_pretrained(folder).sequence_group is None


def check_own_gradients(group: SequenceGroup) -> None:
    """The ranks' gradients differ, each from its own segments: the mean is no mean of equal numbers."""
    model, _, inputs = as_divided(group)
    mine = outcome(model, inputs)["gradient transformer.wte.weight"]
    mean = mine.clone()
    dist.all_reduce(mean)
    assert (mine - mean / group.size).abs().max() > 0.1 * mean.abs().max()


def check_traffic(group: SequenceGroup) -> None:
    """In each layer and block B H (D² + D) numbers of a rank, there and back, however long the row; and the loss."""
    model, _, _ = as_divided(group)
    B, H, D, layers, blocks = 1, 2, 4, 2, 2
    for rule in ("linear", "delta"):
        for tokens in (32 * S, 512 * S):
            model = Case(rule, segments=tokens // (S * blocks * group.size)).model()
            model.sequence_group = group
            sent: list[int] = []
            with counted(sent):
                model(random_ids(B, tokens), labels=random_ids(B, tokens)).loss.backward()
            memory = B * H * (D * D + D) if rule == "linear" else B * H * (2 * D * D + D)
            assert sum(sent) == 2 * (layers * blocks * memory + 1), (rule, tokens)


@contextmanager
def counted(sent: list[int]):
    """Note how many numbers of this rank's own each collective takes."""
    names = ("all_gather_into_tensor", "reduce_scatter_single")
    originals = {name: getattr(dist, name) for name in names}

    def count(name):
        def call(output, mine, group):
            sent.append(mine.numel() if name == "all_gather_into_tensor" else output.numel())
            return originals[name](output, mine, group=group)

        return call

    for name in names:
        setattr(dist, name, count(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


CHECKS = {name.removeprefix("check_"): check for name, check in vars().copy().items() if name.startswith("check_")}


def run_check(check: Callable[[SequenceGroup], None], group: SequenceGroup) -> str:
    """Return what went wrong on this rank; nothing if all is well."""
    try:
        check(group)
    except Exception:
        return traceback.format_exc()
    return ""


def main(out: Path, cases: list[dict]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    group = SequenceGroup(None, dist.get_rank(), dist.get_world_size())
    found: dict = {"cases": [compare(Case(**case), group) for case in cases]}
    found["checks"] = {name: run_check(check, group) for name, check in CHECKS.items()}
    (out / f"{group.rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))
