"""The recipe that a command takes if none is named: a model that this machine trains in minutes, and its text. And the
data folders that the project prepares by itself.
"""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data_prep.manifest import NAME as MANIFEST_NAME
from infini_ds.config.recipe import Recipe, load_recipe
from infini_ds.distributed.environment import LAUNCHER_VARIABLES, DistEnv
from infini_ds.utils.errors import UserError

logger = logging.getLogger(__name__)

RECIPES = Path(__file__).resolve().parents[2] / "launch" / "recipes"
SECONDS_BETWEEN_LOOKS = 1.0


@dataclass(frozen=True)
class DefaultData:
    """A data folder that the project prepares by itself, from text that every machine has.

    vocab_size: None for a source whose tokenizer has a token for each word.
    """

    path: str
    source: str
    sequence_length: int
    vocab_size: int | None = None

    @property
    def prepare(self) -> list[str]:
        """Arguments of Python that prepare it. A folder that is complete is left as it is."""
        shape = ["--sequence-length", str(self.sequence_length)]
        shape += ["--vocab-size", str(self.vocab_size)] if self.vocab_size else []
        return ["-m", "data_prep", "--source", self.source, "--out", self.path, *shape]

    @property
    def is_prepared(self) -> bool:
        return Path(self.path, MANIFEST_NAME).is_file()


# What `make recall` trains on, stage by stage (docs/recall.md has the reasons). Facts of both orders begin at the start
# of a segment, where a token's position tells their order; facts in natural order begin anywhere in 32 tokens.
_BOTH = "pairs,first=both,pairs=4-8,multiple=32"
_NATURAL = "pairs,first=key,before=0-31,multiple=32"
RECALL_DATA = (
    DefaultData(
        "data/recall-1-start",
        f"recall:{_BOTH},queries=8-28,distance=0,documents=9000"
        f"+{_BOTH},queries=8,distance=0-10,documents=9000"
        f"+{_BOTH},queries=8,distance=32-544,documents=3000",
        sequence_length=1152,
    ),
    DefaultData(
        "data/recall-2-anywhere",
        f"recall:{_BOTH},queries=8-28,distance=0,documents=15000"
        f"+{_NATURAL},pairs=4-8,queries=8-28,distance=0,documents=10000"
        f"+{_BOTH},queries=8,distance=0-10,documents=15000"
        f"+{_NATURAL},pairs=4-32,queries=8,distance=0-10,documents=15000"
        f"+{_BOTH},queries=8,distance=32-544,documents=14000"
        f"+{_NATURAL},pairs=4-32,queries=8,distance=32-544,documents=10000",
        sequence_length=1152,
    ),
    DefaultData(
        "data/recall-3-far",
        f"recall:{_BOTH},queries=8,distance=32-1950,documents=4000"
        f"+{_NATURAL},pairs=4-32,queries=8,distance=32-1950,documents=4000",
        sequence_length=2304,
    ),
)

# tiny-cpu reads little text, so what it reads is without the library's tests, which are most of its lines and repeat
# themselves. Rows and vocabulary are small: see docs/training.md for what they were compared with.
DEFAULT_DATA = {
    data.path: data
    for data in (
        DefaultData("data/stdlib", "stdlib", sequence_length=2048, vocab_size=4096),
        DefaultData("data/stdlib-modules", "stdlib-modules", sequence_length=1024, vocab_size=1024),
        *RECALL_DATA,
    )
}


def default_recipe() -> Path:
    """Return the recipe that fits the hardware, relative to the current folder if it lies in it."""
    file = RECIPES / f"tiny-{'gpu' if torch.cuda.device_count() else 'cpu'}.yaml"
    return file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file


def needs_default(config: str | None, overrides: Sequence[str]) -> bool:
    """Return whether a command line names no recipe: neither a file nor a batch, which every recipe has to give."""
    keys = {override.partition("=")[0].strip() for override in overrides}
    return config is None and not keys & {"batch.rows", "batch.tokens"}


def load_recipe_or_default(config: str | None, overrides: Sequence[str]) -> Recipe:
    """Return the recipe of a command line, or the default recipe with its overrides, and log that it is taken."""
    if not needs_default(config, overrides):
        return load_recipe(config, overrides)
    file = default_recipe()
    recipe = load_recipe(file, overrides)
    logger.info(f"no --config: taking {file}")
    return recipe


def default_data(recipe: Recipe) -> list[DefaultData]:
    """Return those of the folders that the recipe reads that the project prepares by itself."""
    data = recipe.data  # with streams or a curriculum or neither
    folders = [part.path for part in data.streams] + [stage.path for stage in data.curriculum] or [data.path]
    return [DEFAULT_DATA[folder] for folder in dict.fromkeys(folders) if folder in DEFAULT_DATA]


def data_to_prepare(recipe: Recipe) -> list[DefaultData]:
    """Return those of `default_data` that are not prepared yet."""
    return [data for data in default_data(recipe) if not data.is_prepared]


def with_data_to_prepare(recipe: Recipe) -> Recipe:
    """Return a recipe that can be planned before the default's data are prepared: with their shapes."""
    missing = data_to_prepare(recipe)
    longest = max((data.sequence_length for data in missing), default=None)
    for data in missing:
        plan = recipe.plan.model_copy(update={"sequence_length": recipe.plan.sequence_length or longest})
        config = {"vocab_size": data.vocab_size, **recipe.model.config} if data.vocab_size else recipe.model.config
        recipe = recipe.model_copy(update={"plan": plan, "model": recipe.model.model_copy(update={"config": config})})
    return recipe


def prepare_default_data(recipe: Recipe, environment: DistEnv) -> None:
    """Prepare the default's data: rank 0 does, in a process of its own, and the others wait for the complete folder.

    Called before the ranks are connected.

    Raises:
        UserError: the preparation failed, or its folder did not appear on this rank's node in time.
    """
    for data in data_to_prepare(recipe):
        _prepare(data, environment, recipe.timeout_minutes)


def _prepare(data: DefaultData, environment: DistEnv, timeout_minutes: float) -> None:
    by_hand = f"`python {' '.join(data.prepare)}`"
    if environment.is_rank_zero:
        logger.info(f"{data.path} is not prepared yet: preparing it, as {by_hand} does")
        kept = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
        code = subprocess.run([sys.executable, *data.prepare], env=kept).returncode
        if code:
            raise UserError(f"preparing {data.path} ended with exit code {code}: fix what it reports above")
        return
    waited_until = time.monotonic() + 60 * timeout_minutes
    while not data.is_prepared:
        if time.monotonic() > waited_until:
            raise UserError(
                f"{data.path}, which rank 0 prepares, has not appeared on this node within timeout_minutes="
                f"{timeout_minutes}: use a file system that all nodes share, or run {by_hand} on each node first"
            )
        time.sleep(SECONDS_BETWEEN_LOOKS)
