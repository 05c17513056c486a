"""Checkpoints during training: when they are due, at the last step, and before a stop."""

from infini_ds.checkpoint import manager as checkpoints
from infini_ds.training.hooks import Hook, Step
from infini_ds.training.trainer import Trainer


class Checkpointing(Hook):
    """Saves a checkpoint at the end of each step that is due for one."""

    def on_step_end(self, trainer: Trainer, step: Step) -> None:
        recipe, state = trainer.recipe, trainer.state
        # Not after a step without rows: otherwise a rollback to it would count as progress.
        due = state.step % recipe.checkpoint.interval(recipe.steps) == 0 and step.predicted_tokens > 0
        if due or state.step == recipe.steps or trainer.shutdown.agreed:
            trainer.latest_checkpoint = checkpoints.save(
                trainer.engine, recipe.folder, state, trainer.data_state, recipe.checkpoint, trainer.run.dims
            )
            trainer.log(f"checkpoint in {trainer.latest_checkpoint}")
