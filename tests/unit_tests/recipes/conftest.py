# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""NeMo-Run in tests: experiments in a folder of their own, and nothing to read from this process's input."""

import os
import sys
import tempfile

import pytest

_EXPERIMENTS = tempfile.TemporaryDirectory(prefix="experiments_", ignore_cleanup_errors=True)
os.environ.setdefault("NEMORUN_HOME", _EXPERIMENTS.name)  # read once, by the import


@pytest.fixture(autouse=True)
def empty_input(monkeypatch):
    """NeMo-Run's commands read it, which pytest forbids."""
    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        yield
