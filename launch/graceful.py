"""Start a launcher so that the signals to stop reach its ranks and not itself, and wait for them.

python launch/graceful.py deepspeed --num_gpus 8 launch/pretrain.py --config RECIPE
python launch/graceful.py torchrun --nproc-per-node 8 launch/pretrain.py --config RECIPE

By themselves `deepspeed` and `torchrun` die of SIGTERM, SIGUSR1 and Ctrl-C, or kill ranks that take longer than 30
seconds to save.
"""

import sys

from infini_ds.distributed.signal_relay import run_graceful

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print(__doc__.strip())
        sys.exit(0 if sys.argv[1:] == ["--help"] else 2)
    try:
        sys.exit(run_graceful(sys.argv[1:]))
    except FileNotFoundError:
        print(f"error: {sys.argv[1]}: no such command: activate the environment that has it", file=sys.stderr)
        sys.exit(2)
