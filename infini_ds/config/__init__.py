"""Recipes: typed sections, the loader, DeepSpeed's JSON, learning-rate schedules."""
