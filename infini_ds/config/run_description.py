"""What a run's folder says about the run."""

import shutil
from dataclasses import asdict

from infini_ds.config.recipe import RECIPE_FILE
from infini_ds.config.resolve import ResolvedRun
from infini_ds.utils.atomic import write_json_atomic, write_text_atomic


def write_run_description(run: ResolvedRun) -> None:
    """Write the recipe, and the data's fingerprint, manifests and tokenizer, into the run's folder."""
    folder = run.recipe.folder
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomic(folder / RECIPE_FILE, run.recipe.to_yaml())
    streams = [
        {"folder": str(source.folder), "remote": source.remote, "manifest": asdict(source.manifest)}
        for source in run.all_sources
    ]
    write_json_atomic(folder / "data_manifest.json", {"fingerprint": run.data_fingerprint, "streams": streams})
    shutil.copytree(run.sources[0].folder / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
