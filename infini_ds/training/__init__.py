"""Training: recipe, DeepSpeed engine, the loop, checkpoints and resume, what is logged."""
