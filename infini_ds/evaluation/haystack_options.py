"""The text in which tasks hide their facts: any source of `data_prep`, in the tokens of the evaluated model."""

import argparse

from data_prep.documents import ReadOptions
from data_prep.sources import find_source, read_documents
from data_prep.synthetic.haystack import Haystack
from infini_ds.evaluation.model_loading import EvaluatedModel
from infini_ds.utils.errors import UserError

DEFAULT_HAYSTACK = "stdlib"  # every machine has it
LEAST_TOKENS = 1 << 20  # that are read, so that examples differ; more if texts are longer


def add_haystack_argument(parser: argparse._ArgumentGroup) -> None:
    """Add `--haystack`, which all tasks that hide facts in text share."""
    parser.add_argument(
        "--haystack",
        default=DEFAULT_HAYSTACK,
        metavar="SOURCE",
        help="text in which facts are hidden, here and in babi: a source of data_prep, such as text:BOOKS "
        "(default: %(default)s, the help topics and the code of Python)",
    )


def read_haystack(model: EvaluatedModel, source: str, tokens: int) -> Haystack:
    """Return text for examples of up to `tokens` tokens.

    Raises:
        UserError: the source is unknown or empty, or the model's tokenizer does not know its words.
    """
    find_source("--haystack", source)
    options = ReadOptions("--haystack", source, "text", "train", None, "replace", None)
    tokenizer = model.tokenizer

    def tokenize(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))

    haystack = Haystack.read(read_documents(options), tokenize, max(LEAST_TOKENS, 2 * tokens))
    unknown = tokenizer.unk_token_id
    if not haystack.length:
        raise UserError(f"--haystack {source} holds no text: name another source, such as text:FOLDER")
    if unknown is not None and sum(sentence.count(unknown) for sentence in haystack.sentences) > haystack.length / 2:
        raise UserError(
            f"--haystack {source}: the tokenizer of {model.path} does not know most of its words: name text of the "
            "kind that the model was trained on"
        )
    return haystack
