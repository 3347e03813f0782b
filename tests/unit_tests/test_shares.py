# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""All shares of the tests together are all of them, and of two each meets every value of every parameter."""

import argparse

import pytest

from tests.rigs import quick
from tests.rigs.shares import left_to_others, share

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
IN_ALL = {"test_quick[1]", "test_quick[2]", "test_of_no_core[1]", "test_of_no_core[2]", "test_one_case"}


@pytest.fixture(scope="module")
def items(tmp_path_factory, request):
    path = tmp_path_factory.mktemp("tests") / "test_some.py"
    path.write_text(TESTS, encoding="utf-8")
    module = pytest.Module.from_parent(request.session, path=path)
    return list(module.collect())


def _run_by(items, text):
    left = {item.name for item in left_to_others(items, share(text))}
    return {item.name for item in items} - left


def test_shares_divide_the_cases_of_long_tests(items):
    first, second = _run_by(items, "1/2"), _run_by(items, "2/2")
    assert first | second == {item.name for item in items}
    assert first & second == IN_ALL
    assert first - IN_ALL == {
        *("test_product[bf16-TP-2]", "test_product[fp16-PP-2]"),
        *("test_grouped[a1]", "test_grouped[a2]", "test_grouped[c1]"),
    }


def test_more_shares_leave_nothing_out_and_run_nothing_twice(items):
    runs = [_run_by(items, f"{at}/3") - IN_ALL for at in (1, 2, 3)]
    assert set.union(*runs) | IN_ALL == {item.name for item in items}
    assert sum(map(len, runs)) == len(set.union(*runs))


def test_long_tests_outside_the_paths_that_were_named_are_left_out(items):
    names = {item.name for item in items}
    directory = items[0].path.parent
    assert quick.slow_elsewhere(items, [directory / "others", directory]) == []
    left = {item.name for item in quick.slow_elsewhere(items, [directory / "others"])}
    assert names - left == {"test_quick[1]", "test_quick[2]"}


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "1/x", ""])
def test_what_is_no_share_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected a share such as 1/2 or 3/4"):
        share(text)
