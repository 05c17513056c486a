"""Setting up a run: mistakes get a sentence, a complete run says so, output stays plain."""

import subprocess

import pytest
from harness import TINY, launch_pretrain, pretrain, run_script

from infini_ds.checkpoint.manifest import complete_checkpoints
from infini_ds.utils.errors import UserError


def test_a_full_disk_gets_a_sentence(shards, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", full], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        with pytest.raises(UserError, match=r"checkpoint of step 8 could not be written .* MiB are free: free some"):
            pretrain(shards, full, "run")
        assert not complete_checkpoints(full / "run")
    finally:
        subprocess.run(["umount", "--lazy", full], check=True)


def test_a_complete_run_has_nothing_to_do(runs, shards):
    arguments = [f"data.path={shards}", f"output={runs}", "name=one", *TINY, "validation.every=10"]
    assert "nothing to do" in run_script("launch/pretrain.py", *arguments).stdout


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("one", ["batch.rows=8"], ["batch.rows=8", "batch.rows=4", "name="]),
        ("one", ["resume=false"], ["resume=false", "name="]),
        ("one", ["model.config.resid_dropout=0.1"], ["resid_dropout=0.1", "the default"]),
        ("one", ["optimizer.beta2=1.5"], ["optimizer.beta2=1.5"]),
        ("one", ["optimizer.learning_rate=nan"], ["learning_rate=nan"]),
        ("new", ["batch.rows=4000"], ["fewer than the 4000 rows of one step"]),
        ("new", ["model.preset=tinny"], ["model.preset='tinny'", "study-9m"]),
        ("new", ["model.config.hiden_size=4"], ["model.config.hiden_size", "model.config.hidden_size"]),
        ("new", ["model.config.window_size=null"], ["model.config.window_size=null must be an integer"]),
        ("new", ["model.config.num_heads=two"], ["model.config.num_heads=two must be an integer, such as"]),
        ("new", ["model.config.num_heads=5"], ["hidden_size=32", "num_heads=5"]),
        ("new", ["model.config.vocab_size=100"], ["100 embeddings", "512", "--tokenizer"]),
        ("new", ["model.start_from=/nowhere"], ["model.start_from=/nowhere"]),
        ("new", ["model.segment_length=0"], ["segment_length=0"]),
        ("new", ["model.truncate_blocks=0"], ["model.truncate_blocks=0", "at least 1 or null"]),
        ("new", ["model.attention=flash"], ["model.attention=flash", "sdpa"]),
        ("new", ["model.attention=flex_attention"], ["model.attention=flex_attention", "model.attention=sdpa"]),
        ("new", ["data.path=/nowhere"], ["/nowhere", "python -m data_prep"]),
    ],
)
def test_mistakes_get_a_sentence(name, overrides, words, runs, shards):
    with pytest.raises(UserError) as error:
        pretrain(shards, runs, name, *overrides)
    sentence = str(error.value)
    assert "\n" not in sentence and all(word in sentence for word in words), sentence


def test_mistake_under_the_launcher_is_one_sentence(shards, tmp_path):
    done = launch_pretrain(shards, tmp_path, "wrong", "batch.rows=3", ranks=2, code=2)
    text = done.stdout + done.stderr
    assert text.count("batch.rows=3 cannot be divided over 2 ranks") == 1
    assert "Traceback" not in text


def test_output_in_a_log_file_is_plain_and_short(runs):
    lines = (runs / "two" / "output.txt").read_text().splitlines()
    assert sum("training" in line for line in lines) < 20, lines  # one in ten seconds, not one a step
    assert not any("\x1b[" in line or "Warning" in line or "[INFO]" in line for line in lines), lines


def test_help_names_the_command():
    assert "deepspeed launch/pretrain.py" in run_script("launch/pretrain.py", "--help").stdout
