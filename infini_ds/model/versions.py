"""Check the version of transformers before any other file of the model uses it; an export carries this file too."""

import re

import transformers
from transformers.utils import logging

OLDEST = (4, 57)
NEWEST_TESTED = (5, 24)

logger = logging.get_logger(__name__)


def check_transformers(installed: str) -> None:
    """Raise an ImportError if this version of transformers is too old, and log a warning if it is newer than tested."""
    version = tuple(int(number) for number in re.findall(r"\d+", installed)[:2])
    oldest, newest = (".".join(map(str, limit)) for limit in (OLDEST, NEWEST_TESTED))
    if version < OLDEST:
        raise ImportError(
            f"transformers {installed} is too old for Infini-GPT-Neo, which needs {oldest} or newer: "
            f"pip install 'transformers=={newest}.*'"
        )
    if version > NEWEST_TESTED:
        logger.warning(
            f"transformers {installed} is newer than all versions that this code of Infini-GPT-Neo was tested with "
            f"({oldest} to {newest}): if something fails, try pip install 'transformers=={newest}.*'"
        )


check_transformers(transformers.__version__)
