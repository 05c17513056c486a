"""Checkpoints: the manifest, the checkpoint manager, universal checkpoints."""
