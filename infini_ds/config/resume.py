"""Which keys of a recipe may change when a run is resumed, and the check that no other one did."""

import json
from dataclasses import asdict
from typing import Any

from omegaconf import OmegaConf

from infini_ds.config.recipe import Recipe
from infini_ds.data.streams import check_fingerprint
from infini_ds.utils.errors import UserError

# Keys, or groups of keys, that may differ between the recipe that began a run and the one that resumes it.
MAY_CHANGE = (
    *("name", "output", "steps", "resume", "log_every", "timeout_minutes", "deepspeed", "schedule", "validation"),
    *("data.path", "data.streams", "data.cache", "data.cache_limit", "data.workers"),  # the fingerprint is compared
    *("checkpoint", "stability", "guard", "batch.micro_rows", "model.segments_per_block"),
    *("model.gradient_checkpointing", "model.checkpoint_layers", "model.offload_states", "model.attention"),
    *("model.compile", "plan"),
)


def check_same_run(recipe: Recipe, data_fingerprint: dict) -> None:
    """Raise a UserError if the run in `recipe.folder` was begun with a recipe or data that give other results."""
    now, defaults = _flatten(asdict(recipe)), _flatten(asdict(Recipe()))  # a run may be older than a key
    begun = defaults | _flatten(OmegaConf.to_container(OmegaConf.load(recipe.folder / "recipe.yaml")))
    for key in now | begun:
        before, value = begun.get(key, "the default"), now.get(key, "the default")
        if not any(key == allowed or key.startswith(allowed + ".") for allowed in MAY_CHANGE) and value != before:
            raise UserError(
                f"{key}={value}, but the run in {recipe.folder} was begun with {key}={before}: choose another name=, "
                f"or give {key}={before} to resume it"
            )
    described = json.loads((recipe.folder / "data_manifest.json").read_text())
    if "fingerprint" in described:  # the earliest runs have none
        check_fingerprint(described["fingerprint"], data_fingerprint)


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
