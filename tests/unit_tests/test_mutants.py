# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The mutation run, with a tiny repository of its own; its changes; and the real rows, which must fit the code."""

import ast
import dataclasses

import pytest

from tests.mutants.__main__ import MUTANTS, ROOT, StaleRow, main, mutated
from tests.mutants.changes import (
    NoTarget,
    condition,
    definition,
    expression,
    moved,
    returning,
    several,
    value,
    without_call,
    without_element,
    without_operand,
)
from tests.mutants.rows.mutant import Mutant

pytestmark = pytest.mark.any_core

SOURCE = """def add(first, second):
    return first + second


def double(number):
    return 2 * number
"""
TESTS = """
import time
import adding

def test_add():
    assert adding.add(2, 3) == 5

def test_double_weakly():
    assert adding.double(2) == 4

def test_time():
    while adding.add(1, 1) != 2:
        time.sleep(0.1)
"""
ADD = Mutant(
    name="subtracts",
    breaks="sums",
    where="adding:add",
    change=expression("first + second", "first - second"),
    tests=("tests/test_adding.py::test_add",),
)
SQUARES = Mutant(
    name="squares",
    breaks="doubles other than 2",
    where="adding:double",
    change=expression("2", "number"),
    tests=("tests/test_adding.py::test_double_weakly",),
)


@pytest.fixture
def repository(tmp_path):
    for folder, file, text in (("src", "adding.py", SOURCE), ("tests", "test_adding.py", TESTS)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text(text)
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    return tmp_path


def test_a_mutant_that_a_test_notices_is_killed(repository, capsys):
    assert main([], mutants=(ADD,), root=repository) == 0
    output = capsys.readouterr().out
    assert "1 of 1 mutants killed" in output
    header, row = output.splitlines()[:2]
    assert header.split()[:4] == ["mutant", "what", "it", "breaks"]
    assert row.split()[:3] == ["subtracts", "sums", "killed"] and row.endswith("tests/test_adding.py::test_add")
    assert (repository / "src" / "adding.py").read_text() == SOURCE, "only the copy is changed"


def test_a_mutant_that_survives_fails_the_run(repository, capsys):
    assert main(["--jobs", "2"], mutants=(ADD, SQUARES), root=repository) == 1
    output = capsys.readouterr().out
    assert "1 of 2 mutants killed" in output
    assert [row.split()[0] for row in output.splitlines()[1:3]] == ["subtracts", "squares"], "in the table's order"
    assert "survived" in output


@pytest.mark.parametrize(
    ("change", "seconds", "verdict"),
    [
        ({"tests": ("tests/test_adding.py::test_time",)}, 10, "timeout"),
        ({"change": returning("first + third")}, 300, "broken: it doesn't even run"),
    ],
)
def test_what_fails_for_another_reason_is_not_killed(repository, capsys, change, seconds, verdict):
    mutant = dataclasses.replace(ADD, **change)
    assert main(["--timeout-seconds", f"{seconds}"], mutants=(mutant,), root=repository) == 1
    output = capsys.readouterr().out
    assert verdict in output and "0 of 1 mutants killed" in output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"change": without_call("sum")}, "a call of sum is there 0 times, not once"),
        ({"where": "adding:double", "change": expression("3", "4")}, "the expression 3 is there 0 times, not once"),
        ({"change": returning("first +")}, "invalid syntax"),
        ({"where": "adding:subtract"}, "a definition of subtract is there 0 times, not once"),
        ({"where": "adding:add.inner"}, "a definition of inner is there 0 times, not once"),
        ({"where": "gone:add"}, "src/gone.py is not there"),
    ],
)
def test_a_row_that_does_not_fit_the_code_is_an_error(repository, capsys, change, message):
    mutant = dataclasses.replace(ADD, **change)
    assert main([], mutants=(SQUARES, mutant), root=repository) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: mutant 'subtracts': {mutant.where}: {message}")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_words_that_no_row_has_end_before_any_test(repository, capsys):
    (repository / "tests" / "test_adding.py").write_text("raise RuntimeError('no test may run')")
    assert main(["-k", "divides"], mutants=(ADD, SQUARES), root=repository) == 2
    assert capsys.readouterr() == (
        "",
        "error: -k 'divides': none of the 2 mutants has these words in its name: see them with "
        "python -m tests.mutants --list\n",
    )


def test_the_rows_are_listed(capsys):
    assert main(["--list"], mutants=(ADD, SQUARES)) == 0
    assert capsys.readouterr() == ("subtracts: sums\nsquares: doubles other than 2\n", "")


def test_tests_that_fail_without_a_mutant_are_an_error(repository, capsys):
    (repository / "src" / "adding.py").write_text(SOURCE.replace("2 * number", "3 * number"))
    assert main([], mutants=(ADD, dataclasses.replace(SQUARES, change=expression("3", "number"))), root=repository) == 2
    assert "error: the tests don't pass on the code as it is" in capsys.readouterr().err


def changed(source, change, name="f"):
    """What a change makes of a definition in a source."""
    module = ast.parse(source)
    change(definition(module, name))
    return ast.unparse(ast.fix_missing_locations(module))


@pytest.mark.parametrize(
    ("change", "before", "after"),
    [
        (without_call("g"), "x = 1; o.g(x)", "x = 1"),
        (without_call("a.g"), "a.g(1); b.g(2)", "b.g(2)"),
        (without_call("g"), "if x: g()", "if x: pass"),
        (without_call("g"), "raise g(1)", "pass"),
        (without_call("g"), "yield from g(1)", "pass"),
        (without_call("g"), "g()[1:] += 1", "pass"),
        (without_call("g"), "return g(x, 2) + 1", "return x + 1"),
        (without_call("g"), "x = y.g(a=1)", "x = y"),
        (condition("x"), "if y: g()\nif x > 1: h()", "if y: g()\nif False: h()"),
        (condition("x", becomes="True"), "return 1 if o.x else 2", "return 1 if True else 2"),
        (condition("k", "2"), "return {k for k in a if k > 1 if k > 2}", "return {k for k in a if k > 1 if False}"),
        (condition("x", becomes="_ and y"), "while x or z: pass", "while (x or z) and y: pass"),
        (condition("x", around="g"), "if x: h()\nif x:\n if x + y: g()", "if x: h()\nif x:\n if False: g()"),
        (value("x", "2"), "x = 1; y = x", "x = 2; y = x"),
        (value("x", "2"), "self.x: int = 1", "self.x: int = 2"),
        (value("x", "2"), "s['x'] = 1", "s['x'] = 2"),
        (value("x", "2"), "return g(x=1, y=3)", "return g(x=2, y=3)"),
        (value("x", "2"), "return {'x': 1, **y}", "return {'x': 2, **y}"),
        (value("x", "2", of="g"), "x = 1; g(x=1)", "x = 1; g(x=2)"),
        (value(1, "2", of="g"), "x = g(0, 1)", "x = g(0, 2)"),
        (expression("a.b['c']", "d"), 'a.b["c"] = e(\n  a.b[\n"c"])', "a.b['c'] = e(d)"),
        (without_operand("y"), "return x and y.z", "return x"),
        (without_operand("y"), "return x or y or z", "return x or z"),
        (without_operand("1"), "return x + 1", "return x"),
        (without_element("b"), "return [a, *b]", "return [a]"),
        (without_element("b"), "return {'a': 1, **b}", "return {'a': 1}"),
        (returning("x"), "g(); return 2", "return x"),
        (moved("h", before="g"), "g()\nif x: h()", "if x: h()\ng()"),
        (moved("h", before="g"), "if x:\n if y: g()\n h()", "if x:\n h()\n if y: g()"),
        (several(without_call("g"), without_call("h")), "g(); x; h()", "x"),
    ],
)
def test_a_change_finds_its_place_by_the_names_there(change, before, after):
    outside = "def g(x=1): x or y\n"
    source, expected = (
        f"{outside}def f(x=1):\n" + "\n".join(f"    {line}" for line in body.splitlines()) for body in (before, after)
    )
    assert changed(source, change) == ast.unparse(ast.parse(expected))


@pytest.mark.parametrize(
    ("change", "body", "message"),
    [
        (without_call("g"), "g(1); g(2)", "a call of g is there 2 times, not once"),
        (without_call("g"), "x = g()", "a call of g that is a statement or has an argument to stand for it"),
        (condition("x", "y"), "if x: pass", "a condition with x, y is there 0 times, not once"),
        (condition("x", around="g"), "if y: g()\nif x: h()", "a condition with x around g is there 0 times, not once"),
        (value("x", "2"), "x = 1; x = 1", "a value of x is there 2 times, not once"),
        (value(2, "2", of="g"), "g(0, 1)", "a value of 2 of g is there 0 times, not once"),
        (without_operand("x"), "return x * y", "an operand with x is there 0 times, not once"),
        (without_element("x"), "return g(x)", "an element with x is there 0 times, not once"),
        (moved("g", before="h"), "g(); h()", "a call of g behind that of h"),
    ],
)
def test_a_change_that_does_not_find_its_place_says_what_it_looked_for(change, body, message):
    with pytest.raises(NoTarget) as raised:
        changed("def f(x):\n" + "\n".join(f"    {line}" for line in body.splitlines()), change)
    assert str(raised.value) == message


def test_a_definition_is_found_by_its_qualified_name():
    source = """
if True:
    X: int = 1
    def f():
        class A:
            def f(self): return 1
        return A
"""
    assert "return 2" in changed(source, returning("2"), "f.A.f")
    assert "X: int = 2" in changed(source, expression("1", "2"), "X")
    with pytest.raises(NoTarget, match="a function"):
        changed(source, returning("2"), "f.A")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_each_row_fits_the_code(mutant):
    try:
        mutated(mutant, ROOT)
    except StaleRow as error:
        pytest.fail(str(error))
    for test in mutant.tests:
        path, _, name = test.partition("::")
        assert f"def {name.split('[')[0]}(" in (ROOT / path).read_text(encoding="utf-8"), test


def test_names_are_unique():
    names = [mutant.name for mutant in MUTANTS]
    assert len(set(names)) == len(names) > 30
