"""The recipe's sections and their loader, what a recipe resolves to, DeepSpeed's JSON, learning-rate schedules."""
