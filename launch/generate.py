"""Generate text with a model and print it token by token.

python launch/generate.py                                         the newest run begins a document
python launch/generate.py runs/tiny --prompt "def main("          an exported folder, a run, or a checkpoint
python launch/generate.py runs/tiny --file book.txt               a prompt of any length
echo "import os" | python launch/generate.py runs/tiny
python launch/generate.py runs/tiny --remember book.txt --memory book.memory           reads a book once
python launch/generate.py runs/tiny --memory book.memory --prompt "Then she said"      continues it, as often as wanted
"""

import argparse
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer

from infini_ds.conversion.locate import load_model, load_tokenizer, locate, newest_run
from infini_ds.distributed.entry_point import run_main
from infini_ds.evaluation.generation import prompt_inputs, read_into_cache
from infini_ds.model import InfiniCache, InfiniGPTNeoForCausalLM
from infini_ds.utils.errors import UserError
from infini_ds.utils.logging import setup_logging
from infini_ds.utils.paths import user_path
from infini_ds.utils.progress import ProgressBar


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
    parser.add_argument(
        "--remember", type=user_path, metavar="FILE", help="text to read into a memory, which --memory FILE names"
    )
    parser.add_argument(
        "--memory",
        type=user_path,
        metavar="FILE",
        help="the memory of a text that was read: written with --remember, and otherwise what prompts continue",
    )
    args = parser.parse_args()
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {args.max_new_tokens} must be at least 1")
    if not 0 <= args.temperature < math.inf:  # not even NaN
        raise UserError(f"--temperature {args.temperature} must be a finite number of at least 0")
    if not 0 < args.top_p <= 1:
        raise UserError(f"--top-p {args.top_p} must be above 0 and at most 1")
    if not -(2**63) <= args.seed < 2**64:  # what PyTorch takes
        raise UserError(f"--seed {args.seed} must be an integer of 64 bits")
    check_memory_options(args)
    setup_logging(stderr=True)  # stdout is for the text
    prompts = [] if args.remember and not (args.prompt or args.file) else read_prompts(args)
    location = locate(newest_run() if args.model is None else args.model)
    tokenizer = load_tokenizer(location)
    model = load_model(location, device="cuda" if torch.cuda.is_available() else "cpu")
    memory = None
    if args.remember:
        memory = remember(model, tokenizer, args.remember, args.memory)
    elif args.memory:
        memory = load_memory(model, args.memory)
    if memory is not None and not all(prompts):
        raise UserError(f"--memory {args.memory} needs text that continues it: give --prompt TEXT or --file FILE")
    if not all(prompts) and model.config.bos_token_id is None:
        raise UserError(f"{location.path} has no token that begins a document: give --prompt TEXT")
    inputs = [prompt_inputs(tokenizer, model, prompt, begins=memory is None) for prompt in prompts]
    if memory is not None:
        check_prompts(inputs, memory, args.memory)
    torch.manual_seed(args.seed)
    sampling: dict[str, Any] = {"do_sample": args.temperature > 0}
    if args.temperature > 0:
        sampling |= {"temperature": args.temperature, "top_p": args.top_p}
    for prompt in inputs:
        # Each prompt continues the text itself, and not the answer to the prompt before it.
        continued: dict[str, Any] = {} if memory is None else {"past_key_values": memory.copy()}
        model.generate(
            **prompt,
            **continued,
            max_new_tokens=args.max_new_tokens,
            use_memory=not args.memory_off,
            streamer=TextStreamer(tokenizer, skip_special_tokens=True),  # type: ignore[arg-type]
            **sampling,
        )


def check_memory_options(args: argparse.Namespace) -> None:
    """Raise a UserError for options of the memory that do not fit together."""
    if args.remember and not args.memory:
        raise UserError(f"--remember {args.remember} needs --memory FILE, the file to write what was read to")
    if args.remember and args.memory_off:
        raise UserError(
            f"--memory-off: --remember {args.remember} reads a text into the memory; leave one of them away"
        )
    if args.remember and args.memory.exists():
        raise UserError(
            f"--memory {args.memory} exists: leave --remember away to continue it, or name a file that does not exist"
        )
    if args.remember and not args.memory.parent.is_dir():
        raise UserError(f"--memory {args.memory}: there is no folder {args.memory.parent}; name a file in one")
    if args.remember:
        try:  # before a long text is read
            tempfile.TemporaryFile(dir=args.memory.parent).close()
        except OSError as error:
            raise cannot_write(args.memory, error) from error
    if args.memory and not args.remember and not args.memory.is_file():
        raise UserError(f"--memory {args.memory}: no such file; write it with --remember TEXT --memory {args.memory}")


def remember(
    model: InfiniGPTNeoForCausalLM, tokenizer: PreTrainedTokenizerBase, text: Path, memory: Path
) -> InfiniCache:
    """Read a file of text into a cache, save it, and return it.

    Raises:
        UserError: the text cannot be read, or the memory cannot be written.
    """
    ids = prompt_inputs(tokenizer, model, read_text("--remember", text))["input_ids"]
    if not ids.numel():
        raise UserError(f"--remember {text} is empty: name a file with text")
    with ProgressBar("reading", ids.shape[1]) as progress:
        cache = read_into_cache(model, ids, after_piece=lambda tokens: progress.advance(by=tokens))
    try:
        cache.save(memory, model)
    except OSError as error:
        raise cannot_write(memory, error) from error
    size = memory.stat().st_size
    print(f"{memory}: the memory of {ids.shape[1]:,} tokens of {text}, {size:,} bytes", file=sys.stderr)
    return cache


def cannot_write(memory: Path, error: OSError) -> UserError:
    return UserError(f"--memory {memory} cannot be written ({error.strerror}): name another file")


def load_memory(model: InfiniGPTNeoForCausalLM, file: Path) -> InfiniCache:
    """Return the cache in a file. Raises a UserError if it is not one of this model."""
    try:
        return InfiniCache.load(file, model)
    except (ValueError, OSError) as error:
        raise UserError(f"--memory {error}") from error


def check_prompts(inputs: list[dict[str, Any]], memory: InfiniCache, file: Path) -> None:
    """Raise a UserError for a prompt that `generate()` can take for the remembered text itself, changed or complete."""
    for prompt in inputs:
        try:
            memory.copy().begin_generation(prompt["input_ids"])
        except ValueError as error:
            reason = str(error).partition(": ")[0]
            raise UserError(
                f"--memory {file}: {reason}; give with --prompt or --file only what follows that text"
            ) from error


def read_text(option: str, file: Path) -> str:
    """Return the text of a file. Raises a UserError if it is missing or not UTF-8 text."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option} {file} cannot be read as text: {error}") from error


def read_prompts(args: argparse.Namespace) -> list[str]:
    """Return the prompts from arguments and files, or else from standard input.

    Without any, at a terminal or with standard input closed, it is the empty text: the model begins a document.

    Raises:
        UserError: a file is missing or not UTF-8 text, or standard input is empty.
    """
    prompts = list(args.prompt)
    prompts += [read_text("--file", file) for file in args.file]
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
