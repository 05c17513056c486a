"""A recipe: every choice of a training run, read from YAML and `key=value` overrides and checked before work starts.

recipe = load_recipe("launch/recipes/tiny-cpu.yaml", ["steps=100", "model.segment_length=64"])
"""

from collections.abc import Sequence
from pathlib import Path

from infini_ds.config.cross_checks import find_conflict
from infini_ds.config.loader import COMMAND_LINE, Loader
from infini_ds.config.sections import (
    BatchSection,
    CheckpointSection,
    DataSection,
    ModelSection,
    OptimizerSection,
    PlanSection,
    Recipe,
    ScheduleSection,
    StabilitySection,
    StageSection,
    StreamSection,
    ValidationSection,
)

__all__ = [
    "RECIPE_FILE",
    "BatchSection",
    "CheckpointSection",
    "DataSection",
    "ModelSection",
    "OptimizerSection",
    "PlanSection",
    "Recipe",
    "ScheduleSection",
    "StabilitySection",
    "StageSection",
    "StreamSection",
    "ValidationSection",
    "load_recipe",
    "load_run_recipe",
]

RECIPE_FILE = "recipe.yaml"  # in a run's folder: all keys of the run
# Earlier names of groups and keys, which the RECIPE_FILE of an older run may have.
RENAMED = {
    "guard": "stability",
    "stability.skipped_in_a_row": "stability.max_consecutive_skips",
    "stability.roll_backs": "stability.max_rollbacks",
}
ALTERNATIVES = (
    ("data.path", "data.streams"),
    ("data.path", "data.curriculum"),
    ("data.streams", "data.curriculum"),
)
# What other projects call a key, for hints.
SYNONYMS = {
    "lr": "optimizer.learning_rate",
    "batch_size": "batch.rows",
    "global_batch_size": "batch.rows",
    "micro_batch": "batch.micro_rows",
    "micro_batch_size": "batch.micro_rows",
    "epochs": "steps",
    "max_steps": "steps",
    "warmup": "schedule.warmup_steps",
    "clip": "optimizer.gradient_clipping",
    "grad_clip": "optimizer.gradient_clipping",
    "max_grad_norm": "optimizer.gradient_clipping",
    "bf16": "precision",
    "fp16": "precision",
    "dtype": "precision",
    "output_dir": "output",
    "run_name": "name",
    "num_workers": "data.workers",
    "save_steps": "checkpoint.every",
    "eval_steps": "validation.every",
    "logging_steps": "log_every",
    "zero_stage": "deepspeed",
    "dropout": "model.config.resid_dropout",
    **{
        name: f"model.config.{name}"
        for name in (
            *("hidden_size", "num_layers", "num_heads", "vocab_size", "intermediate_size", "attention_types"),
            *("attention_dropout", "embed_dropout", "resid_dropout", "layer_norm_epsilon", "initializer_range"),
        )
    },
}


def load_recipe(path: str | Path | None, overrides: Sequence[str] = (), origin: str = COMMAND_LINE) -> Recipe:
    """Return the defaults, overridden by a YAML file, then by `key=value` overrides.

    Args:
        path: a recipe; None for the defaults. It may be the RECIPE_FILE of a run, also of an older one.
        origin: where the overrides were given, as error sentences say it.
    Raises:
        UserError: the file does not exist, a key is unknown (the nearest known one is named), or a value is refused.
    """
    of_run = path is not None and Path(path).name == RECIPE_FILE and Path(path).with_name("data_manifest.json").exists()
    loader = Loader(Recipe, RENAMED, read_renamed=of_run, alternatives=ALTERNATIVES, synonyms=SYNONYMS)
    if path is not None:
        loader.add_file("--config", path, shipped="launch/recipes")
    loader.add_overrides(overrides, origin)
    recipe = loader.build()
    conflict = find_conflict(recipe)
    if conflict is not None:
        raise loader.error(conflict.keys, conflict.sentence)
    return recipe


def load_run_recipe(folder: Path) -> Recipe:
    """Return the recipe that a run was begun with, or last resumed with, from its folder.

    It is not checked for conflicts between sections or with this machine's files: the run may be of another machine.

    Raises:
        UserError: the folder holds no RECIPE_FILE, or one that this version cannot read.
    """
    loader = Loader(Recipe, RENAMED, read_renamed=True, alternatives=())
    loader.add_file("the run's recipe", folder / RECIPE_FILE)
    return loader.build()
