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
# The keys of groups, as DeepSpeed 0.19 declares them. It refuses others only when training starts, with a stack.
KNOWN_KEYS_OF_GROUPS = {
    "zero_optimization": {
        "stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "use_multi_rank_bucket_allreduce",
        "allgather_partitions", "allgather_bucket_size", "overlap_comm", "load_from_fp32_weights", "elastic_checkpoint",
        "offload_optimizer", "cpu_offload", "cpu_offload_use_pin_memory", "ignore_unused_parameters", "legacy_stage1",
        "round_robin_gradients", "enable_sanity_checks", "compute_grad_norm", "zenflow",
        "pipeline_loading_checkpoint", "override_module_apply", "log_trace_cache_warnings", "parameter_alignment",
        "save_muon_momentum_buffer_in_memory", "sub_group_size", "memory_efficient_linear", "leaf_module",
        "offload_param", "cpu_offload_param", "zero_hpz_partition_size", "zero_quantized_weights",
        "zero_quantized_nontrainable_weights", "zero_quantized_gradients",
        "stage3_gather_fp16_weights_on_model_save",
        *(f"{prefix}{key}" for prefix in ("", "stage3_") for key in (
            "prefetch_bucket_size", "param_persistence_threshold", "model_persistence_threshold",
            "max_live_parameters", "max_reuse_distance", "gather_16bit_weights_on_model_save",
            "module_granularity_threshold", "use_all_reduce_for_fetch_params", "allgather_sequential",
        )),
    },
    "bf16": {
        "enabled", "immediate_grad_update", "check_grad_overflow", "bf16_master_weights_and_grads",
        "bf16_optimizer_states",
    },
}  # fmt: skip
# Keys of DeepSpeed that the recipe, or this project, has in another place.
NOT_SUPPORTED = "this project does not support it, so leave it out"
ELSEWHERE = {
    "optimizer": "the recipe has the optimizer, in optimizer.kind, optimizer.learning_rate and so on, so leave it out",
    "scheduler": "the recipe has the learning rate's schedule, in schedule.kind and so on, so leave it out",
    "fp16": "this project trains in bf16 or fp32, by precision= of the recipe, so leave it out",
    "amp": "this project trains in bf16 or fp32, by precision= of the recipe, so leave it out",
    "bfloat16": "DeepSpeed's name for it today is bf16, so write that",
    "activation_checkpointing": "the recipe has it, in model.gradient_checkpointing, so leave it out",
    "compile": "the recipe has it, in model.compile, so leave it out",
    "seed": "the recipe has it, in seed, so leave it out",
    "tensorboard": "a run writes TensorBoard and metrics.jsonl by itself, so leave it out",
    "csv_monitor": "a run writes TensorBoard and metrics.jsonl by itself, so leave it out",
    "wandb": "a run writes TensorBoard and metrics.jsonl, so leave it out",
    "comet": "a run writes TensorBoard and metrics.jsonl, so leave it out",
    "monitor_config": "a run writes TensorBoard and metrics.jsonl by itself, so leave it out",
} | dict.fromkeys(
    (
        "autotuning", "compression_training", "curriculum_learning", "elasticity", "eigenvalue",
        "hybrid_engine", "nebula", "pipeline", "progressive_layer_drop", "quantize_training", "sequence_parallel_size",
        "sparse_attention", "sparse_gradients", "tensor_parallel", "use_node_local_storage", "weight_quantization",
        "fp32_allreduce", "graph_harvesting",
    ),
    NOT_SUPPORTED,
)  # fmt: skip


def default_file(device_type: str) -> Path:
    """Return the DeepSpeed JSON that `deepspeed: auto` stands for."""
    return FOLDER / ("zero2.json" if device_type == "cuda" else "zero2_cpu.json")


def _hint(key: str, known: set[str], group: str = "") -> str:
    """Return a hint for an unknown key. Only a misspelling has a near name: `fp16` is not meant as `bf16`."""
    return did_you_mean(key, known, prefix=group, cutoff=0.8)


def deepspeed_config(path: Path, recipe: Recipe, shape: BatchShape, precision: str) -> dict[str, Any]:
    """Return the configuration for `deepspeed.initialize`.

    Raises:
        UserError: the file is not JSON, has an unknown key, asks for a ZeRO stage other than 1 or 2, or contradicts
            the recipe.
    """
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"deepspeed={path} is not JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("zero_optimization", {}), dict):
        raise UserError(f"deepspeed={path} is not an object with an object zero_optimization: see {FOLDER}")
    if "checkpoint" in config:
        raise UserError(
            f"checkpoint={config['checkpoint']} in deepspeed={path}: DeepSpeed's other ways to write checkpoints "
            "break what this project guarantees of them (docs/architecture.md), so leave it out"
        )
    for key in config:
        if key in ELSEWHERE:
            raise UserError(f"{key} in deepspeed={path}: {ELSEWHERE[key]}")
        if key not in KNOWN_KEYS:
            raise UserError(f"unknown key {key} in deepspeed={path}{_hint(key, KNOWN_KEYS)}")
    for group, known in KNOWN_KEYS_OF_GROUPS.items():
        for key in config.get(group, {}) if isinstance(config.get(group, {}), dict) else ():
            if key not in known:
                raise UserError(f"unknown key {group}.{key} in deepspeed={path}{_hint(key, known, f'{group}.')}")
    offload = config.get("zero_optimization", {}).get("offload_optimizer")
    if not isinstance(offload, dict | None):
        raise UserError(
            f"zero_optimization.offload_optimizer={json.dumps(offload)} in deepspeed={path} is not an object: write "
            '{"device": "cpu"}'
        )
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
    # DeepSpeed counts every rank as one that reads rows of its own.
    config["train_batch_size"] *= recipe.parallel.sequence
    enabled = (config.get("bf16") or {}).get("enabled", "auto") if isinstance(config.get("bf16", {}), dict) else None
    if enabled not in ("auto", precision == "bf16"):
        raise UserError(
            f"bf16={json.dumps(config['bf16'])} in deepspeed={path} contradicts precision={precision}: write "
            '{"enabled": "auto"}'
        )
    config["bf16"] = (config.get("bf16") or {}) | {"enabled": precision == "bf16"}
    return config
