"""The recipe that a command takes if none is named: a model that this machine trains in minutes, and its text."""

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
    """A data folder that the project prepares by itself, from text that every machine has."""

    path: str
    source: str
    sequence_length: int
    vocab_size: int

    @property
    def prepare(self) -> list[str]:
        """Arguments of Python that prepare it. A folder that is complete is left as it is."""
        shape = ["--sequence-length", str(self.sequence_length), "--vocab-size", str(self.vocab_size)]
        return ["-m", "data_prep", "--source", self.source, "--out", self.path, *shape]

    @property
    def is_prepared(self) -> bool:
        return Path(self.path, MANIFEST_NAME).is_file()


# tiny-cpu reads little text, so what it reads is without the library's tests, which are most of its lines and repeat
# themselves. Rows and vocabulary are small: see docs/training.md for what they were compared with.
DEFAULT_DATA = {
    data.path: data
    for data in (
        DefaultData("data/stdlib", "stdlib", sequence_length=2048, vocab_size=4096),
        DefaultData("data/stdlib-modules", "stdlib-modules", sequence_length=1024, vocab_size=1024),
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


def default_data(recipe: Recipe) -> DefaultData | None:
    """Return the data that the recipe reads, if the project prepares them by itself."""
    return None if recipe.data.streams or recipe.data.curriculum else DEFAULT_DATA.get(str(recipe.data.path))


def data_to_prepare(recipe: Recipe) -> DefaultData | None:
    """Return the data that the recipe reads, if the project prepares them by itself and they are not prepared yet."""
    data = default_data(recipe)
    return None if data is None or data.is_prepared else data


def with_data_to_prepare(recipe: Recipe) -> Recipe:
    """Return a recipe that can be planned before the default's data are prepared: with their shapes."""
    data = data_to_prepare(recipe)
    if data is None:
        return recipe
    plan = recipe.plan.model_copy(update={"sequence_length": recipe.plan.sequence_length or data.sequence_length})
    config = {"vocab_size": data.vocab_size, **recipe.model.config}
    return recipe.model_copy(update={"plan": plan, "model": recipe.model.model_copy(update={"config": config})})


def prepare_default_data(recipe: Recipe, environment: DistEnv) -> None:
    """Prepare the default's data: rank 0 does, in a process of its own, and the others wait for the complete folder.

    Called before the ranks are connected.

    Raises:
        UserError: the preparation failed, or its folder did not appear on this rank's node in time.
    """
    data = data_to_prepare(recipe)
    if data is None:
        return
    by_hand = f"`python {' '.join(data.prepare)}`"
    if environment.is_rank_zero:
        logger.info(f"{data.path} is not prepared yet: preparing it, as {by_hand} does")
        kept = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
        code = subprocess.run([sys.executable, *data.prepare], env=kept).returncode
        if code:
            raise UserError(f"preparing {data.path} ended with exit code {code}: fix what it reports above")
        return
    waited_until = time.monotonic() + 60 * recipe.timeout_minutes
    while not data.is_prepared:
        if time.monotonic() > waited_until:
            raise UserError(
                f"{data.path}, which rank 0 prepares, has not appeared on this node within timeout_minutes="
                f"{recipe.timeout_minutes}: use a file system that all nodes share, or run {by_hand} on each node first"
            )
        time.sleep(SECONDS_BETWEEN_LOOKS)
