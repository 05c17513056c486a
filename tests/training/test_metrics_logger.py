"""The metrics of a run: what metrics.jsonl and TensorBoard hold, and warnings of the memory's diagnostics."""

from harness import pretrain
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from infini_ds.metrics.metric_writers import read_metrics


def test_metrics_hold_what_is_promised(runs):
    lines = read_metrics(runs / "one")
    last = [line for line in lines if "train/loss" in line][-1]
    for name in ("train/gradient_norm", "train/learning_rate", "speed/tokens_per_s", "speed/mfu", "speed/memory_gib"):
        assert last[name] > 0, name
    assert 0 <= last["data/wait_share"] < 1
    assert last["train/tokens"] == 20 * 4 * 256
    for layer in range(2):
        assert last[f"memory/M_norm/layer_{layer}"] > 0 and last[f"memory/z_norm/layer_{layer}"] > 0
        for head in range(2):
            assert abs(last[f"gate/layer_{layer}/head_{head}"] - 0.5) > 1e-3  # gates move from the start
    assert [line["step"] for line in lines if "validation/loss" in line] == [0, 10, 20]
    assert all(line["validation/gain_standard_error"] > 0 for line in lines if "validation/loss" in line)
    events = EventAccumulator(str(runs / "one"))
    events.Reload()
    tags = events.Tags()
    assert {"validation/loss", "validation/loss_memory_off", "speed/mfu", "gate/layer_0/head_0"} <= set(tags["scalars"])
    assert "gate" in tags["histograms"]


def test_metrics_are_logged_every_so_many_steps_and_at_the_last(shards, tmp_path):
    pretrain(shards, tmp_path, "rare", "steps=5", "log_every=3", "schedule.warmup_steps=0")
    lines = read_metrics(tmp_path / "rare")
    assert [line["step"] for line in lines] == [3, 5]
    assert [line["train/tokens"] for line in lines] == [3 * 4 * 256, 5 * 4 * 256]


def test_a_problem_of_the_memory_is_warned_of_once(shards, tmp_path, capsys):
    pretrain(shards, tmp_path, "saturated", "optimizer.gate_learning_rate=2", "steps=10")
    output = capsys.readouterr().out
    assert output.count("of the gates are within 0.01 of 0 or 1, where they hardly learn: lower") == 1
