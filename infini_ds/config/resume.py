"""Whether a run's folder can be resumed with a recipe and data."""

import json
from typing import Any

from infini_ds.config.keys import list_keys
from infini_ds.config.loader import show
from infini_ds.config.recipe import Recipe, load_run_recipe
from infini_ds.config.training_data import check_fingerprint
from infini_ds.utils.errors import UserError

ABSENT = "the default"  # of a key of model.config that one of the two recipes does not give
RESUMABLE = frozenset(key.name for key in list_keys(Recipe) if key.resumable)


def check_same_run(recipe: Recipe, data_fingerprint: dict[str, Any]) -> None:
    """Raise a UserError if the run in `recipe.folder` was begun with a recipe or data that give other results.

    Keys that are `resumable` may differ; data may lie elsewhere, since their fingerprints are compared.
    """
    try:
        begun = _flatten(load_run_recipe(recipe.folder).model_dump())
    except UserError as error:
        raise UserError(
            f"{error}: the run in {recipe.folder} was begun with another version of infini_ds and cannot be resumed "
            "with this one, so choose another name="
        ) from error
    now = _flatten(recipe.model_dump())
    for key in now | begun:
        if key not in RESUMABLE and now.get(key, ABSENT) != begun.get(key, ABSENT):
            before, value = (show(values[key]) if key in values else ABSENT for values in (begun, now))
            same = f"give {key}={before}" if key in begun else f"leave {key} out"
            raise UserError(
                f"{key}={value}, but the run in {recipe.folder} was begun with {key}={before}: choose another name=, "
                f"or {same} to resume it"
            )
    described = json.loads((recipe.folder / "data_manifest.json").read_text())
    if "fingerprint" in described:  # the earliest runs have none
        check_fingerprint(described["fingerprint"], data_fingerprint)


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {"model.preset": "tiny"} for {"model": {"preset": "tiny"}}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
