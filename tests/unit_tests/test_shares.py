# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Both shares of the tests together are all of them, and each meets every value of every parameter."""

import pytest

from tests.rigs.shares import SHARES, left_to_the_other

TESTS = """
import pytest
from tests.rigs.ranks import run_on_ranks

@pytest.mark.parametrize(("layout", "ranks"), [("TP", 2), ("PP", 2)])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_product(layout, ranks, precision): run_on_ranks

@pytest.mark.parametrize("case", [
    pytest.param(name, marks=pytest.mark.xdist_group(name[0])) for name in ("a1", "a2", "b1", "b2", "c1")
])
def test_grouped(case): run_on_ranks

@pytest.mark.parametrize("case", [1, 2])
def test_quick(case): pass

@pytest.mark.any_core
@pytest.mark.parametrize("case", [1, 2])
def test_of_no_core(case): run_on_ranks

def test_one_case(): run_on_ranks
"""
IN_BOTH = {"test_quick[1]", "test_quick[2]", "test_of_no_core[1]", "test_of_no_core[2]", "test_one_case"}


@pytest.fixture
def items(tmp_path, request):
    path = tmp_path / "test_some.py"
    path.write_text(TESTS, encoding="utf-8")
    module = pytest.Module.from_parent(request.session, path=path)
    return list(module.collect())


def test_shares_divide_the_cases_of_long_tests(items):
    first, second = (
        {item.name for item in items} - {item.name for item in left_to_the_other(items, s)} for s in SHARES
    )
    assert first | second == {item.name for item in items}
    assert first & second == IN_BOTH
    assert first - IN_BOTH == {
        *("test_product[bf16-TP-2]", "test_product[fp16-PP-2]"),
        *("test_grouped[a1]", "test_grouped[a2]", "test_grouped[c1]"),
    }
