"""`~` in the path options of the scripts, which a shell leaves in `--out=~/folder`."""

import pytest
from harness import ROOT, call_script

from infini_ds.utils.paths import user_path


def test_user_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert [str(user_path(text)) for text in ("~", "~/a", "a~", "/a")] == ["/home/me", "/home/me/a", "a~", "/a"]


def test_no_script_takes_a_path_as_it_is():
    for file in [*(ROOT / "launch").glob("*.py"), *(ROOT / "infini_ds/evaluation/tasks").glob("*.py")]:
        assert "type=Path" not in file.read_text(), file


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        ("checkpoint", ["verify", "~/empty"], "{home}/empty is neither a checkpoint"),
        ("convert", ["~/empty", "--out=x"], "{home}/empty is neither an exported folder"),
        ("convert", ["--from-gpt-neo=~/empty", "--out=x"], "{home}/empty"),
        ("evaluate", ["~/empty"], "{home}/empty is neither an exported folder"),
        ("generate", ["~/empty", "--prompt=x"], "{home}/empty is neither an exported folder"),
        ("report", ["~/empty"], "{home}/empty is not a run"),
        ("ask", ["~/empty"], "{home}/empty is neither an exported folder"),
        ("pretrain", ["--config=~/wrong.yaml"], "unknown key stepz in ~/wrong.yaml"),
        ("plan", ["--config=~/wrong.yaml"], "unknown key stepz in ~/wrong.yaml"),
        ("doctor", ["--config=~/wrong.yaml"], "unknown key stepz in ~/wrong.yaml"),
        ("quickstart", ["--config=~/wrong.yaml"], "unknown key stepz in ~/wrong.yaml"),
        ("study", ["~/wrong.yaml", "--list"], "unknown key stepz in {home}/wrong.yaml"),
    ],
)
def test_scripts_find_the_home_folder(script, arguments, words, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "empty").mkdir()
    (tmp_path / "wrong.yaml").write_text("stepz: 3\n")
    done = call_script(f"launch/{script}.py", *arguments, code=2)
    assert words.format(home=tmp_path) in done.stderr and "Traceback" not in done.stderr
