"""What `make pretrain` runs, on shards that are there already: training, export, report; and once more."""

from harness import STEPS, run_script


def test_quickstart_from_shards_to_report_and_again(shards, tmp_path):
    choices = [f"data.path={shards}", f"output={tmp_path}", "name=quick", "model.config.hidden_size=32", *STEPS]
    command = ["launch/quickstart.py", "--config", "launch/recipes/tiny-cpu.yaml", *choices, "steps=6", "batch.rows=4"]
    first = run_script(*command).stdout
    for words in ("=== training", "=== export", "validation loss", "with the memory off", "--- try next"):
        assert words in first, words
    assert "text to shards" not in first  # these are not the default's
    for name in ("report.md", "loss_by_position.png", "export/model.safetensors", "checkpoints/step-000006"):
        assert (tmp_path / "quick" / name).exists(), name

    again = run_script(*command).stdout
    assert "nothing to do" in again and "validation loss" in again

    failed = run_script(*command, "batch.rows=8", code=2)
    assert "batch.rows=8" in failed.stderr and "mend what it says" in failed.stderr
    assert "=== export" not in failed.stdout and "Traceback" not in failed.stderr
