"""The recipe that a command takes if none is named: a model that this machine trains in minutes, and its text."""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from data_prep.manifest import NAME as MANIFEST_NAME
from infini_ds.config.recipe import Recipe, load_recipe
from infini_ds.distributed.environment import LAUNCHER_VARIABLES, DistEnv
from infini_ds.utils.errors import UserError

logger = logging.getLogger(__name__)

RECIPES = Path(__file__).resolve().parents[2] / "launch" / "recipes"
DATA = "data/stdlib"
SEQUENCE_LENGTH, VOCABULARY = 2048, 4096
# Arguments of Python. A folder that is complete is left as it is.
PREPARE = [
    *("-m", "data_prep", "--source", "stdlib", "--out", DATA),
    *("--sequence-length", str(SEQUENCE_LENGTH), "--vocab-size", str(VOCABULARY)),
]
SECONDS_BETWEEN_LOOKS = 1.0


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


def lacks_default_data(recipe: Recipe) -> bool:
    """Return whether the recipe reads the default's data, which are not prepared yet."""
    return recipe.data.path == DATA and not recipe.data.streams and not Path(DATA, MANIFEST_NAME).is_file()


def with_data_to_prepare(recipe: Recipe) -> Recipe:
    """Return a recipe that can be planned before the default's data are prepared: with their shapes."""
    if not lacks_default_data(recipe):
        return recipe
    plan = recipe.plan.model_copy(update={"sequence_length": recipe.plan.sequence_length or SEQUENCE_LENGTH})
    config = {"vocab_size": VOCABULARY, **recipe.model.config}
    return recipe.model_copy(update={"plan": plan, "model": recipe.model.model_copy(update={"config": config})})


def prepare_default_data(recipe: Recipe, environment: DistEnv) -> None:
    """Prepare the default's data: rank 0 does, in a process of its own, and the others wait for the complete folder.

    Called before the ranks are connected.

    Raises:
        UserError: the preparation failed, or its folder did not appear on this rank's node in time.
    """
    if not lacks_default_data(recipe):
        return
    by_hand = f"`python {' '.join(PREPARE)}`"
    if environment.is_rank_zero:
        logger.info(f"{DATA} is not prepared yet: preparing it, as {by_hand} does")
        kept = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
        code = subprocess.run([sys.executable, *PREPARE], env=kept).returncode
        if code:
            raise UserError(f"preparing {DATA} ended with exit code {code}: fix what it reports above")
        return
    waited_until = time.monotonic() + 60 * recipe.timeout_minutes
    while lacks_default_data(recipe):
        if time.monotonic() > waited_until:
            raise UserError(
                f"{DATA}, which rank 0 prepares, has not appeared on this node within timeout_minutes="
                f"{recipe.timeout_minutes}: use a file system that all nodes share, or run {by_hand} on each node first"
            )
        time.sleep(SECONDS_BETWEEN_LOOKS)
