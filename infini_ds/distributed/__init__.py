"""The distributed environment, collectives, signals and the connectivity check."""
