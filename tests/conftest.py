# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Counts of matrix cells, printed at the end of a test run."""

from collections import Counter

import pytest

_COUNTS: dict[str, "CellCounts"] = {}


class CellCounts:
    """How many cells of a matrix passed, were refused by name, and failed."""

    def __init__(self) -> None:
        self.passed = self.failed = 0
        self.refused: Counter[str] = Counter()

    def add(self, *, passed: int = 0, failed: int = 0, refused: int = 0, because: str = "") -> None:
        self.passed += passed
        self.failed += failed
        if refused:
            self.refused[because] += refused


@pytest.fixture(scope="module")
def cell_counts(request):
    """The counts of this module's matrix."""
    return _COUNTS.setdefault(request.module.__name__.rpartition(".")[2], CellCounts())


def pytest_terminal_summary(terminalreporter):
    import megatron.core

    for name, counts in _COUNTS.items():
        terminalreporter.section(f"{name} on megatron-core {megatron.core.__version__}")
        refused = sum(counts.refused.values())
        terminalreporter.line(f"cells: {counts.passed} passed, {refused} refused by name, {counts.failed} failed")
        for because, number in counts.refused.items():
            terminalreporter.line(f"  refused: {number} x {because}")
