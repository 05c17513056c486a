"""Checkpoints: manifest, checkpoint manager, universal checkpoints."""
