"""Ask a model what only its memory can know: a story with facts, much filler, then your questions.

python launch/ask.py runs/recall/export                             a story to ask about, line by line; ? for help
python launch/ask.py runs/recall/export --segments 1000             with more filler between facts and question
python launch/ask.py runs/recall/export --facts "Anna bear Bob cat" --ask Anna --ask Bob

The story is read once. Each question is asked with the memory on, off, and with that of another story in its place.
"""

import argparse
import sys

import torch

from infini_ds.conversion.locate import newest_run
from infini_ds.distributed.entry_point import run_main
from infini_ds.evaluation.asking import Conversation, StoryReader, check_segments, default_facts, format_answers
from infini_ds.evaluation.model_loading import load_evaluated_model
from infini_ds.evaluation.recall_story import known_facts, learned_facts, parse_facts
from infini_ds.evaluation.task import add_integer
from infini_ds.utils.errors import UserError
from infini_ds.utils.logging import setup_logging
from infini_ds.utils.paths import user_path

HELP = "a name asks for its thing; a name and a thing each are new facts; a number is a new distance in segments"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", nargs="?", type=user_path, help="an export, a run, or a checkpoint (default: the newest run)")
    add("--facts", help='a name and a thing each, such as "Anna bear Bob cat" (default: drawn at random)')
    add("--ask", action="append", default=[], metavar="NAME", help="ask for this name; may be given more than once")
    add_integer(parser, "--segments", 0, 64, "segments of filler between facts and question")
    add_integer(parser, "--pairs", 1, 4, "facts that are drawn")
    add_integer(parser, "--seed", 0, 0, "of facts and filler")
    args = parser.parse_args()
    check_segments("--segments", args.segments)
    setup_logging(stderr=True)
    path = args.model or newest_run()
    model = load_evaluated_model(str(path), torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    learned = known_facts(learned_facts(path), model.tokenizer, path)
    drawn = args.facts is None
    facts = default_facts(learned, args.pairs, args.seed) if drawn else parse_facts("--facts", args.facts, learned)
    talk = Conversation(StoryReader(model, learned, args.seed), facts, args.segments)
    print(talk.begin(), end="\n\n")
    for key in args.ask:
        print(format_answers(talk.reader.ask(key, "--ask")), end="\n\n")
    if not args.ask:
        converse(talk)


def converse(talk: Conversation) -> None:
    """Answer line by line, until the user ends it."""
    at_terminal = sys.stdin is not None and sys.stdin.isatty()
    if at_terminal:
        print(f"Ask for {', '.join(talk.reader.story.keys)}, or ? for help; an empty line ends it.")
    while True:
        try:
            line = input("> " if at_terminal else "").strip()
        except EOFError:
            return
        if not line or line in ("quit", "exit"):
            return
        try:
            print(HELP if line == "?" else talk.reply(line), end="\n\n", flush=True)
        except UserError as error:
            print(error, end="\n\n", flush=True)


if __name__ == "__main__":
    run_main(main)
