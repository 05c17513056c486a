"""Validation rows that tasks evaluate: where they are, which are chosen, whose memory each reads, their losses.

Shapes: B rows, T tokens in a row.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor

from infini_ds.config.recipe import RECIPE_FILE, load_run_recipe
from infini_ds.config.training_data import find_sources, find_stages
from infini_ds.data.batches import Batch, collate
from infini_ds.data.sources import DataSource, StreamSpec, open_sources
from infini_ds.data.streams import ValidationRows
from infini_ds.distributed import collectives
from infini_ds.evaluation.model_loading import EvaluatedModel
from infini_ds.evaluation.scoring import memory_settings, segment_length, token_losses
from infini_ds.evaluation.task import DataFacts
from infini_ds.model.loss import IGNORE_INDEX
from infini_ds.streaming_compat.stale_memory import one_start_at_a_time
from infini_ds.utils.errors import UserError
from infini_ds.utils.hashing import sha256_of_json
from infini_ds.utils.pretrained import read_json
from infini_ds.utils.progress import ProgressBar

SHARD_CACHE = "data/cache"  # folder for the shards of remote data


@dataclass(frozen=True)
class Gain:
    """The loss in another setting minus that with the memory on: mean, and standard error over rows."""

    mean: float
    standard_error: float | None  # None for a single row

    def __str__(self) -> str:
        return f"{self.mean:+.4f}" + ("" if self.standard_error is None else f" ± {self.standard_error:.4f}")


@dataclass(frozen=True)
class ChosenRows:
    """Rows of a validation split, and the model that is evaluated on them.

    chosen: their numbers in the split.
    partners: for each of them the row whose memory it reads in the setting "other"; None if a row has none.
    segment_length: by which losses and distances are grouped, that of the model unless another one is asked for.
    """

    model: EvaluatedModel
    rows: ValidationRows
    chosen: list[int]
    partners: list[int] | None
    segment_length: int
    data: DataFacts

    @property
    def sequence_length(self) -> int:
        return len(self.rows[0]["input_ids"])

    def settings(self) -> list[str]:
        """Return the settings of the memory in which the rows can be evaluated."""
        settings = memory_settings(self.model.model)
        return [setting for setting in settings if setting != "other" or self.partners is not None]

    def cache_key(self) -> dict[str, Any]:
        """Return the options of a cached part that depends on the rows."""
        return {"data": self.data.sha256, "rows": self.chosen, "segment_length": self.segment_length}

    def losses(self, task: str, memory: str, batch_tokens: int) -> Iterator[tuple[Batch, Tensor, Tensor]]:
        """Yield this rank's batches in one setting of the memory, in the order of the rows.

        Args:
            task: for the progress bar.
        Yields:
            The batch, the losses of its tokens after the first one, (B, T - 1) in fp64 on the CPU, and whether these
            are predicted, bool (B, T - 1).
        """
        size = max(1, batch_tokens // self.sequence_length)
        batches = collectives.split_across_ranks(
            [list(range(first, min(first + size, len(self.chosen)))) for first in range(0, len(self.chosen), size)]
        )
        total, count = 0.0, 0
        with ProgressBar(f"{task}, memory {memory}", len(batches), shown=collectives.is_rank_zero()) as progress:
            for indices in batches:
                batch = collate([self.rows[self.chosen[i]] for i in indices])
                other = None
                if memory == "other":
                    assert self.partners is not None
                    other = collate([self.rows[self.partners[i]] for i in indices])
                losses = token_losses(self.model.model, batch, memory, other).double().cpu()
                predicted = batch.labels[:, 1:] != IGNORE_INDEX
                yield batch, losses, predicted
                total, count = total + losses.sum().item(), count + int(predicted.sum())
                progress.advance({"loss": f"{total / max(1, count):.4f}"})


def rows_of_options(model: EvaluatedModel, options: argparse.Namespace) -> ChosenRows:
    """Return the rows that --data, --rows and --segment-tokens choose, options of the task `position`."""
    sources = find_data(model, options.data)
    return choose_rows(model, sources, options.rows or None, options.segment_tokens or None)


def find_data(model: EvaluatedModel, path: str | None) -> list[DataSource]:
    """Return the data in `path`, or those that the model's run was trained on.

    Raises:
        UserError: `path` is None and the model is not part of a run, or the data cannot be read.
    """
    if path is not None:
        return open_sources([StreamSpec("--data", path)], SHARD_CACHE, "the cache")
    if model.run is None:
        raise UserError(f"{model.path} is not a run, so its data are unknown: name a folder of data_prep with --data")
    return sources_of_run(model.run)


def sources_of_run(run: Path) -> list[DataSource]:
    """Return the data that a run was trained on; of a curriculum, those of its last stage, as its validation does.

    Raises:
        UserError: the folder is not a run, its recipe cannot be read, or its data are gone.
    """
    if not (run / RECIPE_FILE).is_file():
        raise UserError(f"{run} is not a run: it has no {RECIPE_FILE}")
    data = load_run_recipe(run).data
    if data.curriculum:
        return find_stages([stage.path for stage in data.curriculum], data.cache)[-1:]
    return find_sources(data.path, data.streams, data.cache)


def choose_rows(
    model: EvaluatedModel, sources: list[DataSource], limit: int | None, segment_length_shown: int | None = None
) -> ChosenRows:
    """Return `limit` validation rows (None: all), evenly spaced over the split.

    Args:
        segment_length_shown: by which results are grouped; None: that of the model.
    Raises:
        UserError: the rows were tokenized with another tokenizer than the model's.
    """
    check_tokenizer(model, sources)
    with one_start_at_a_time(collectives.is_local_rank_zero()):
        rows = ValidationRows(sources)
    number = min(limit or len(rows), len(rows))
    chosen = [i * len(rows) // number for i in range(number)]
    partners = find_partners(chosen, rows.documents(sources[0].manifest.tokenizer.start_id))
    data = DataFacts(", ".join(str(source.folder) for source in sources), sha256_of_shards(sources))
    return ChosenRows(model, rows, chosen, partners, segment_length_shown or segment_length(model.model), data)


def check_tokenizer(model: EvaluatedModel, sources: list[DataSource]) -> None:
    """Raise a UserError if the rows were tokenized with another vocabulary than the model's."""
    folder = sources[0].folder
    file = folder / "tokenizer" / "tokenizer.json"
    read_json(file, sources[0].option)  # refuses a damaged file
    of_rows = Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=False)
    of_model = model.tokenizer.get_vocab()
    if any(of_model.get(token) != number for token, number in of_rows.items()):
        raise UserError(
            f"{folder} was prepared with another tokenizer than that of {model.path}: prepare the text again, with "
            f"python -m data_prep --tokenizer {model.path} and --out another folder, and name that with --data"
        )


def sha256_of_shards(sources: Sequence[DataSource]) -> str:
    """Return the SHA-256 of the hashes of all validation shards."""
    return sha256_of_json(
        [
            [[shard["samples"], shard["raw_data"]["hashes"]] for shard in source.shards("validation")]
            for source in sources
        ]
    )


def find_partners(chosen: list[int], documents: list[tuple[int, int]]) -> list[int] | None:
    """Return for each row one that shares no document with it, or None if a row has no such partner.

    The search starts half of the split away, so that partners of neighboring rows differ.

    Args:
        documents: the first and the last document of every row of the split.
    """
    partners = []
    n = len(documents)
    for row in chosen:
        first, last = documents[row]
        candidates = ((row + n // 2 + i) % n for i in range(n))
        partner = next((i for i in candidates if documents[i][1] < first or documents[i][0] > last), None)
        if partner is None:
            return None
        partners.append(partner)
    return partners
