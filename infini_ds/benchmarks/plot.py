"""Plot speed and memory of a training step against the length of a row, with one line for each contender."""

from collections.abc import Sequence
from pathlib import Path

from infini_ds.benchmarks.contenders import is_infini
from infini_ds.benchmarks.results import Case, OutOfMemory, TrainingSpeed
from infini_ds.evaluation.plots import plt, save_figure


def plot_speed_and_memory(cases: Sequence[Case[TrainingSpeed]], file: Path) -> None:
    figure, (speed, memory) = plt.subplots(1, 2, figsize=(11, 4.5))
    contenders = list(dict.fromkeys(case.contender for case in cases))
    for contender in contenders:
        points = [
            (case.tokens, case.result)
            for case in cases
            if case.contender == contender and not isinstance(case.result, OutOfMemory)
        ]
        lengths = [tokens for tokens, _ in points]
        style = {"marker": "o", "markersize": 4, "linestyle": "-" if is_infini(contender) else "--"}
        speed.plot(lengths, [result.tokens_per_s for _, result in points], label=contender, **style)
        memory.plot(lengths, [result.peak_memory / 2**20 for _, result in points], **style)
    for axes, label in ((speed, "tokens/s"), (memory, "peak memory above the model (MiB)")):
        axes.set(yscale="log", xlabel="tokens in a row", ylabel=label)
        axes.set_xscale("log", base=2)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_minor_formatter(plt.LogFormatter(minor_thresholds=(2, 0.5)))
    figure.legend(loc="lower center", ncols=len(contenders), fontsize=9)
    figure.suptitle("A training step", fontsize=12)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    save_figure(figure, file)
