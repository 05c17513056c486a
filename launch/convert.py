"""Write a model in Hugging Face format.

python launch/convert.py                                             the newest run -> export/ in its folder
python launch/convert.py runs/tiny --out runs/tiny/export            a run's newest checkpoint, or one checkpoint
python launch/convert.py --from-gpt-neo FOLDER --out infini-neo      a GPT-Neo, with a memory that is not trained yet
"""

import argparse
import os

import torch

from infini_ds.conversion.export import export, push_to_hub
from infini_ds.conversion.gpt_neo import GATES, from_gpt_neo
from infini_ds.conversion.locate import locate, newest_run
from infini_ds.distributed.entry_point import run_main
from infini_ds.utils.errors import UserError
from infini_ds.utils.paths import user_path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "source", nargs="?", type=user_path, help="a run or one of its checkpoints (default: the newest run)"
    )
    parser.add_argument(
        "--from-gpt-neo", type=os.path.expanduser, metavar="FOLDER", help="folder or hub name of a GPT-Neo model"
    )
    parser.add_argument("--out", type=user_path, help="folder to write (default: export/ in the run's folder)")
    parser.add_argument("--max-shard-size", default="2GB", help="limit of a safetensors file (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the exported weights (default: float32)")
    parser.add_argument(
        "--sharpen-memory",
        type=float,
        metavar="FACTOR",
        help="multiply the scales of the memory's softmax features, for texts far longer than those of training",
    )
    parser.add_argument("--segment-length", type=int, help="tokens in a segment, with --from-gpt-neo (default: 128)")
    parser.add_argument(
        "--short-conv", type=int, help="width of a short convolution, with --from-gpt-neo (default: 0, none)"
    )
    parser.add_argument(
        "--embed-conv", type=int, help="width of a convolution of embeddings, with --from-gpt-neo (default: 0, none)"
    )
    parser.add_argument("--gates", choices=GATES, help="initial gates, with --from-gpt-neo (default: closed)")
    parser.add_argument("--push-to-hub", metavar="NAME", help="also upload the folder, as user/model")
    parser.add_argument("--private", action="store_true", help="make the uploaded model private")
    args = parser.parse_args()
    if args.source is not None and args.from_gpt_neo is not None:
        raise UserError("give either a run (or a checkpoint), or --from-gpt-neo FOLDER")
    if args.from_gpt_neo:
        if args.out is None:
            raise UserError("--from-gpt-neo needs a folder to write: give --out FOLDER")
        refuse_option(args, "dtype", "without --from-gpt-neo")
        refuse_option(args, "sharpen_memory", "without --from-gpt-neo")
        length = 128 if args.segment_length is None else args.segment_length
        from_gpt_neo(
            args.from_gpt_neo,
            args.out,
            length,
            args.gates or "closed",
            args.max_shard_size,
            args.short_conv or 0,
            args.embed_conv or 0,
        )
    else:
        refuse_option(args, "segment_length", "with --from-gpt-neo")
        refuse_option(args, "gates", "with --from-gpt-neo")
        refuse_option(args, "short_conv", "with --from-gpt-neo")
        refuse_option(args, "embed_conv", "with --from-gpt-neo")
        location = locate(newest_run() if args.source is None else args.source)
        if args.out is None and location.path == location.checkpoint:
            raise UserError(f"{location.path} is one of several checkpoints of its run: give --out FOLDER")
        args.out = args.out or location.path / "export"
        export(location, args.out, args.max_shard_size, getattr(torch, args.dtype or "float32"), args.sharpen_memory)
    print(f"written: {args.out}")
    if args.push_to_hub:
        print(f"uploaded: {push_to_hub(args.out, args.push_to_hub, args.private)}")


def refuse_option(args: argparse.Namespace, name: str, where: str) -> None:
    """Raise a UserError if an option is given that has no effect in this mode."""
    value = getattr(args, name)
    if value is not None:
        raise UserError(f"--{name.replace('_', '-')} {value} has an effect only {where}")


if __name__ == "__main__":
    run_main(main)
