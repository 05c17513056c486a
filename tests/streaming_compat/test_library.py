"""The import of streaming."""

import subprocess
import sys

from harness import ROOT, environment


def test_streaming_needs_torchvision_and_the_library_does_not():
    """torchvision is missing in both; the second import is the first one's process, so the failure leaves nothing."""
    code = """
import sys
sys.modules["torchvision"] = None
try:
    import streaming
except ImportError as error:
    assert "torchvision" in str(error), error
else:
    raise AssertionError("plain streaming no longer needs torchvision")
from infini_ds.streaming_compat.library import StreamingDataset
assert not vars(sys.modules["streaming.vision"]).get("StreamingVisionDataset")
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_library_is_imported_without_warnings():
    command = [sys.executable, "-W", "always", "-c", "import infini_ds.streaming_compat.library"]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
