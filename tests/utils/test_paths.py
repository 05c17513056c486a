"""Paths that libraries cannot use."""

import pytest
import torch

from infini_ds.utils.errors import UserError
from infini_ds.utils.paths import can_compile_cpp, check_can_compile_cpp


def test_pytorch_in_a_folder_with_a_space_compiles_nothing(monkeypatch):
    monkeypatch.setattr(torch, "__file__", "/home/a user/.venv/torch/__init__.py")
    assert not can_compile_cpp()
    with pytest.raises(UserError, match=r"model\.compile=true compiles C.*the space in /home/a user/\.venv/torch:"):
        check_can_compile_cpp("model.compile=true")


def test_pytorch_in_a_folder_without_a_space_compiles(monkeypatch):
    monkeypatch.setattr(torch, "__file__", "/home/user/\u00e9/torch/__init__.py")
    check_can_compile_cpp("model.compile=true")
