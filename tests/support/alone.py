"""Run a Python program where transformers is installed and this project is not, offline."""

import subprocess
import sys
from pathlib import Path

from harness import environment

# As if the project were not installed: neither on the path, nor by the finder of an editable installation.
ALONE = """
import importlib.util
import sys
from pathlib import Path

sys.path = [path for path in sys.path if not Path(path or ".", "infini_ds").exists()]
sys.meta_path = [finder for finder in sys.meta_path if not getattr(finder, "__module__", "").startswith("__editable__")]
for name in ("infini_ds", "data_prep"):
    assert importlib.util.find_spec(name) is None, name
for name in ("infini_ds", "data_prep", "deepspeed", "streaming", "datasets", "omegaconf"):
    sys.modules[name] = None  # an import of it fails
"""


def run_alone(program: str, *arguments, cwd: Path, cache: Path) -> str:
    """Run a program with an empty cache of transformers and no terminal; return what it wrote to both streams."""
    variables = {"PYTHONPATH": "", "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ALONE + program, *map(str, arguments)],
        cwd=cwd,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=240,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr
