"""Loss by position on long documents: with the memory, with it switched off, and with that of another document.

If the memory of another document serves as well, the memory carries style and not content.
"""

import hashlib
import json
import math
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor

from infini_ds.config.training_data import find_sources
from infini_ds.data.batches import collate
from infini_ds.data.sources import DataSource
from infini_ds.data.streams import ValidationRows
from infini_ds.distributed import collectives
from infini_ds.evaluation.model_loading import EvaluatedModel, has_memory
from infini_ds.evaluation.result_cache import ResultCache
from infini_ds.evaluation.scoring import settings, token_losses
from infini_ds.model.loss import IGNORE_INDEX
from infini_ds.streaming_compat.stale_memory import one_start_at_a_time
from infini_ds.training.validation import PositionLosses
from infini_ds.utils.errors import UserError
from infini_ds.utils.progress import ProgressBar

STEP = 128  # tokens that stand for a segment where a model has none
POINTS = 256  # of the loss by position, at most


def measure(subject: EvaluatedModel, sources: list[DataSource], limit: int | None, session: ResultCache) -> dict:
    """Over `limit` validation rows (None: all), taken evenly from the whole split.

    Raises:
        UserError: the rows are of another tokenizer than the model's.
    """
    _check_tokenizer(subject, sources)
    with one_start_at_a_time(collectives.is_local_rank_zero()):
        rows = ValidationRows(sources)
    number = min(limit or len(rows), len(rows))
    chosen = [i * len(rows) // number for i in range(number)]
    S = subject.model.config.segment_length if has_memory(subject.model) else STEP
    options = {"data": data_sha256(sources), "rows": chosen, "segment_length": S}
    T = len(rows[0]["input_ids"])
    others = _rows_of_others(chosen, rows.documents(sources[0].manifest.tokenizer.start_id))
    measured = {}
    for memory in settings(subject.model):
        if memory == "other" and others is None:
            continue
        measured[memory] = session.part(
            f"position/{memory}",
            options,
            lambda memory=memory: _summary(*_losses(subject, rows, chosen, others, memory, session.batch_tokens), S),
        )
    return {
        "data": {"path": ", ".join(str(source.folder) for source in sources), "sha256": options["data"]},
        "rows": number,
        "sequence_length": T,
        "segment_length": S,
        "memory": measured,
        "gained": {memory: _gained(measured["on"], measured[memory]) for memory in measured if memory != "on"},
    }


def sources_of(run: Path) -> list[DataSource]:
    """The data of a run.

    Raises:
        UserError: it is no run, or its data are gone.
    """
    if not (run / "recipe.yaml").is_file():
        raise UserError(f"{run} is no run: it holds no recipe.yaml")
    data = OmegaConf.load(run / "recipe.yaml").data
    return find_sources(data.path, data.streams, data.cache)


def _check_tokenizer(subject: EvaluatedModel, sources: list[DataSource]) -> None:
    folder = sources[0].folder / "tokenizer"
    theirs = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    ours = subject.tokenizer.get_vocab()
    if any(ours.get(token) != number for token, number in theirs.items()):
        raise UserError(
            f"the rows of {sources[0].folder} are of another tokenizer than {subject.path}'s: prepare the text for it, "
            f"with python -m data_prep --tokenizer {subject.path} and --out another folder, and name that with --data"
        )


def data_sha256(sources: list[DataSource]) -> str:
    """Of the hashes of all validation shards."""
    shards = [[[s["samples"], s["raw_data"]["hashes"]] for s in source.shards("validation")] for source in sources]
    return hashlib.sha256(json.dumps(shards, sort_keys=True).encode()).hexdigest()


def _rows_of_others(chosen: list[int], documents: list[tuple[int, int]]) -> list[int] | None:
    """For each row one that shares no document with it, from half of the split further on; None if there is none."""
    others = []
    for row in chosen:
        first, last = documents[row]
        n = len(documents)
        candidates = ((row + n // 2 + i) % n for i in range(n))
        found = next((i for i in candidates if documents[i][1] < first or documents[i][0] > last), None)
        if found is None:
            return None
        others.append(found)
    return others


def _losses(
    subject: EvaluatedModel, rows: ValidationRows, chosen: list[int], others: list[int] | None, memory: str, tokens: int
) -> tuple[PositionLosses, list[float]]:
    """By position, summed over rows; and the mean of each row."""
    T = len(rows[0]["input_ids"])
    size = max(1, tokens // T)
    batches = collectives.split_across_ranks(
        [list(range(at, min(at + size, len(chosen)))) for at in range(0, len(chosen), size)]
    )
    total, means = torch.zeros(2, T - 1, dtype=torch.float64), []
    with ProgressBar(f"position, memory {memory}", len(batches), shown=collectives.is_rank_zero()) as progress:
        for batch in batches:
            part = collate([rows[chosen[i]] for i in batch])
            other = collate([rows[others[i]] for i in batch]) if memory == "other" else None
            losses = token_losses(subject.model, part, memory, other).double().cpu()
            count = (part.labels[:, 1:] != IGNORE_INDEX).double()
            total += torch.stack([losses.sum(0), count.sum(0)])
            means.append((losses.sum(1) / count.sum(1).clamp_min(1)).tolist())
            progress.advance({"loss": f"{total[0].sum() / total[1].sum():.4f}"})
    return PositionLosses(*collectives.all_reduce_sum(total)), [
        mean for batch in collectives.gather_items(means) for mean in batch
    ]


def _summary(losses: PositionLosses, means: list[float], segment_length: int) -> dict:
    S = segment_length
    by_segment = binned(losses, S)
    by_position = binned(losses, -(-len(losses.loss) // POINTS))
    return {
        "loss": losses.mean,
        "perplexity": math.exp(losses.mean),
        "tokens": int(losses.count.sum()),
        "by_segment": {"loss": by_segment[1], "perplexity": [math.exp(loss) for loss in by_segment[1]]},
        "by_position": {"position": by_position[0], "loss": by_position[1]},
        "within_segment": {"loss": _within_segment(losses, S)},
        "by_row": means,
    }


def binned(losses: PositionLosses, width: int) -> tuple[list[float], list[float]]:
    """Mean loss of each `width` positions in which any token counts: (the middles of the bins, the losses)."""
    middles, means = [], []
    for first in range(0, len(losses.loss), width):
        count = losses.count[first : first + width].sum()
        if count:
            middles.append(first + min(width, len(losses.loss) - first) / 2)
            means.append((losses.loss[first : first + width].sum() / count).item())
    return middles, means


def _within_segment(losses: PositionLosses, S: int) -> list[float]:
    """Mean loss of each place in a segment, over all segments but the first, which has no memory to read."""

    def folded(x: Tensor) -> Tensor:
        x = x[S:]
        return torch.nn.functional.pad(x, (0, -len(x) % S)).view(-1, S).sum(0)

    count = folded(losses.count)
    return (folded(losses.loss) / count)[count > 0].tolist()


def _gained(on: dict, without: dict) -> dict:
    """By the memory as it is: the mean over rows of the loss without it less that with it, and its standard error."""
    gained = torch.tensor(without["by_row"], dtype=torch.float64) - torch.tensor(on["by_row"], dtype=torch.float64)
    error = gained.std() / math.sqrt(len(gained)) if len(gained) > 1 else None
    return {"mean": gained.mean().item(), "standard_error": None if error is None else error.item()}
