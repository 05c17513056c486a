"""The check of transformers' version, in the code that an export carries."""

import logging
import subprocess
import sys

import pytest

from infini_ds.model.versions import check_transformers


@pytest.fixture
def warnings_of(caplog):
    """Check a version and return what was logged."""

    def check(version: str) -> list[str]:
        logger = logging.getLogger("transformers")
        propagate, logger.propagate = logger.propagate, True
        with caplog.at_level(logging.WARNING):
            check_transformers(version)
        logger.propagate = propagate
        return [record.getMessage() for record in caplog.records]

    return check


@pytest.mark.parametrize("version", ["4.57.0", "4.57.6", "5.0.0", "5.24.0", "5.24.3", "5.3.0.dev0"])
def test_tested_versions_say_nothing(warnings_of, version):
    assert warnings_of(version) == []


@pytest.mark.parametrize("version", ["4.56.2", "4.9.0", "3.5.1"])
def test_an_older_one_is_one_sentence(version):
    with pytest.raises(ImportError) as error:
        check_transformers(version)
    assert str(error.value) == (
        f"transformers {version} is too old for Infini-GPT-Neo, which needs 4.57 or newer: "
        "pip install 'transformers==5.24.*'"
    )


@pytest.mark.parametrize("version", ["5.25.0", "6.0.0", "10.1"])
def test_a_newer_one_is_a_warning(warnings_of, version):
    (warning,) = warnings_of(version)
    assert f"transformers {version} is newer than all versions" in warning and "4.57 to 5.24" in warning


def test_the_installed_one_is_checked_on_import():
    code = "import transformers; transformers.__version__ = '4.40.0'; import infini_ds.model"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stderr.splitlines()[-1].startswith("ImportError: transformers 4.40.0 is too old for Infini-GPT-Neo")
