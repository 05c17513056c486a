"""Generate text with a model and print it token by token.

python launch/generate.py                                         the newest run begins a document
python launch/generate.py runs/tiny --prompt "def main("          an exported folder, a run, or a checkpoint
python launch/generate.py runs/tiny --file book.txt               a prompt of any length
echo "import os" | python launch/generate.py runs/tiny
"""

import argparse
import math
import sys
from typing import Any

import torch
from transformers import TextStreamer

from infini_ds.conversion.locate import load_model, load_tokenizer, locate, newest_run
from infini_ds.distributed.entry_point import run_main
from infini_ds.evaluation.generation import prompt_inputs
from infini_ds.utils.errors import UserError
from infini_ds.utils.logging import setup_logging
from infini_ds.utils.paths import user_path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", nargs="?", type=user_path, help="an exported folder, a run, or a checkpoint (default: the newest run)"
    )
    parser.add_argument("--prompt", action="append", default=[], help="text to continue; may be given more than once")
    parser.add_argument("--file", type=user_path, action="append", default=[], help="file whose text is a prompt")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="(default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 for greedy decoding (default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=0.95, help="for nucleus sampling (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default: %(default)s)")
    parser.add_argument("--memory-off", action="store_true", help="switch the compressive memory off")
    args = parser.parse_args()
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {args.max_new_tokens} must be at least 1")
    if not 0 <= args.temperature < math.inf:  # not even NaN
        raise UserError(f"--temperature {args.temperature} must be a finite number of at least 0")
    if not 0 < args.top_p <= 1:
        raise UserError(f"--top-p {args.top_p} must be above 0 and at most 1")
    setup_logging(stderr=True)  # stdout is for the text
    prompts = read_prompts(args)
    location = locate(newest_run() if args.model is None else args.model)
    tokenizer = load_tokenizer(location)
    model = load_model(location, device="cuda" if torch.cuda.is_available() else "cpu")
    if not all(prompts) and model.config.bos_token_id is None:
        raise UserError(f"{location.path} has no token that begins a document: give --prompt TEXT")
    torch.manual_seed(args.seed)
    sampling: dict[str, Any] = {"do_sample": args.temperature > 0}
    if args.temperature > 0:
        sampling |= {"temperature": args.temperature, "top_p": args.top_p}
    for prompt in prompts:
        model.generate(
            **prompt_inputs(tokenizer, model, prompt),
            max_new_tokens=args.max_new_tokens,
            use_memory=not args.memory_off,
            streamer=TextStreamer(tokenizer, skip_special_tokens=True),  # type: ignore[arg-type]
            **sampling,
        )


def read_prompts(args: argparse.Namespace) -> list[str]:
    """Return the prompts from arguments and files, or else from standard input.

    Without any, at a terminal or with standard input closed, it is the empty text: the model begins a document.

    Raises:
        UserError: a file is missing or not UTF-8 text, or standard input is empty.
    """
    prompts = list(args.prompt)
    for file in args.file:
        try:
            prompts.append(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--file {file} cannot be read as text: {error}") from error
    if prompts:
        return prompts
    if sys.stdin is None or sys.stdin.isatty():
        return [""]
    try:
        prompt = sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"standard input cannot be read as text: {error}") from error
    if not prompt:
        raise UserError("no prompt: standard input is empty; give --prompt TEXT, --file FILE, or text on it")
    return [prompt]


if __name__ == "__main__":
    run_main(main)
