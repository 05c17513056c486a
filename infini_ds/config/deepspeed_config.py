"""DeepSpeed's JSON, checked, with each "auto" filled in from the recipe. DeepSpeed itself ignores unknown keys."""

import json
from pathlib import Path
from typing import Any

from infini_ds.config.batch_shape import BatchShape
from infini_ds.config.recipe import Recipe
from infini_ds.utils.errors import UserError, did_you_mean

FOLDER = Path(__file__).resolve().parents[2] / "ds_configs"

# The top-level keys of DeepSpeed 0.19 that this project's engine supports.
KNOWN_KEYS = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "bf16",
    "zero_optimization", "communication_data_type", "data_types", "torch_autocast",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "wall_clock_breakdown", "steps_per_print",
    "prescale_gradients", "gradient_predivide_factor", "flops_profiler", "comms_logger", "dump_state",
    "disable_allgather", "data_efficiency", "aio", "timers",
}  # fmt: skip


def default_file(device_type: str) -> Path:
    """Return the DeepSpeed JSON that `deepspeed: auto` stands for."""
    return FOLDER / ("zero2.json" if device_type == "cuda" else "zero2_cpu.json")


def deepspeed_config(path: Path, recipe: Recipe, shape: BatchShape, precision: str) -> dict[str, Any]:
    """Return the configuration for `deepspeed.initialize`.

    Raises:
        UserError: the file is not JSON, has an unknown key, asks for a ZeRO stage other than 1 or 2, or contradicts
            the recipe.
    """
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"deepspeed={path} is not JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("zero_optimization", {}), dict):
        raise UserError(f"deepspeed={path} is not an object with an object zero_optimization: see {FOLDER}")
    if "checkpoint" in config:
        raise UserError(
            f"checkpoint={config['checkpoint']} in deepspeed={path}: DeepSpeed's other ways to write checkpoints "
            "break what this project guarantees of them (docs/architecture.md), so leave it out"
        )
    for key in config:
        if key not in KNOWN_KEYS:
            raise UserError(f"unknown key {key} in deepspeed={path}{did_you_mean(key, KNOWN_KEYS)}")
    stage = config.get("zero_optimization", {}).get("stage")
    if stage not in (1, 2):
        raise UserError(
            f"zero_optimization.stage={json.dumps(stage)} in deepspeed={path}: this project trains with stage 1 or 2"
        )
    if config["zero_optimization"].get("compute_grad_norm") is False:
        raise UserError(
            f"zero_optimization.compute_grad_norm=false in deepspeed={path}: without the norm DeepSpeed does not see a "
            "non-finite gradient and steps on it, so leave it out"
        )
    set_by_recipe = {
        "train_batch_size": shape.rows,
        "train_micro_batch_size_per_gpu": shape.micro_rows,
        "gradient_accumulation_steps": shape.accumulation,
        "gradient_clipping": recipe.optimizer.gradient_clipping,
    }
    for key, value in set_by_recipe.items():
        if config.get(key, "auto") not in ("auto", value):
            raise UserError(
                f"{key}={config[key]} in deepspeed={path} contradicts the recipe, by which it is {value}: write "
                '"auto" in the file'
            )
        config[key] = value
    enabled = (config.get("bf16") or {}).get("enabled", "auto") if isinstance(config.get("bf16", {}), dict) else None
    if enabled not in ("auto", precision == "bf16"):
        raise UserError(
            f"bf16={json.dumps(config['bf16'])} in deepspeed={path} contradicts precision={precision}: write "
            '{"enabled": "auto"}'
        )
    config["bf16"] = (config.get("bf16") or {}) | {"enabled": precision == "bf16"}
    return config
