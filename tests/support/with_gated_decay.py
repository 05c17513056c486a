"""Run a script with the memory rule of gated_decay.py registered: python with_gated_decay.py launch/pretrain.py ..."""

import runpy
import sys

import gated_decay  # noqa: F401, registers the rule

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
