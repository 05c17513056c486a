"""Synthetic examples that only a memory can answer: facts, filler, a question. For training text and for evaluation.

    task = parse_task("pairs,pairs=4,distance=512")
    example = task.example(seed=0, index=7, tokenize=str.split)
    example.text, example.tokens[: example.answers[0].begin]

An example depends on its task, seed and index alone, and is the same on every machine.
"""
