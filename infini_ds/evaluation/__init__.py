"""Evaluate models: tasks, one file each in `tasks/`; generated text; the report of a run."""
