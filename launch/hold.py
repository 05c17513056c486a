"""Start a launcher so that signals to stop reach the ranks and not the launcher, which then waits for them.

python launch/hold.py deepspeed --num_gpus 8 launch/pretrain.py --config RECIPE
python launch/hold.py torchrun --nproc-per-node 8 launch/pretrain.py --config RECIPE

By themselves `deepspeed` and `torchrun` die of SIGTERM, SIGUSR1 and Ctrl-C, or kill ranks that take longer than 30
seconds to save.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from infini_ds.training.holding import run_held

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print(__doc__.strip())
        sys.exit(0 if sys.argv[1:] == ["--help"] else 2)
    try:
        sys.exit(run_held(sys.argv[1:]))
    except FileNotFoundError:
        print(f"error: there is no command {sys.argv[1]}: is the environment active that has it?", file=sys.stderr)
        sys.exit(2)
