# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The mutation run, with a tiny repository of its own; and the real rows, which must fit the code."""

import dataclasses

import pytest

from tests.mutants.__main__ import MUTANTS, ROOT, StaleRow, main, mutated
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
    file="src/adding.py",
    text="first + second",
    replacement="first - second",
    tests=("tests/test_adding.py::test_add",),
)
SQUARES = Mutant(
    name="squares",
    breaks="doubles other than 2",
    file="src/adding.py",
    text="2 * number",
    replacement="number * number",
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
        ({"replacement": "first + third"}, 300, "broken: it doesn't even run"),
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
        ({"text": "first * second"}, "mutant 'subtracts': its text occurs 0 times in src/adding.py, not once"),
        ({"text": "number"}, "mutant 'subtracts': its text occurs 2 times in src/adding.py, not once"),
        ({"file": "src/gone.py"}, "mutant 'subtracts': its text occurs 0 times in src/gone.py, not once"),
        ({"replacement": "first +"}, "mutant 'subtracts': src/adding.py would not compile"),
    ],
)
def test_a_row_that_does_not_fit_the_code_is_an_error(repository, capsys, change, message):
    assert main([], mutants=(SQUARES, dataclasses.replace(ADD, **change)), root=repository) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {message}") and captured.err.count("\n") == 1
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
    assert main([], mutants=(ADD, dataclasses.replace(SQUARES, text="3 * number")), root=repository) == 2
    assert "error: the tests don't pass on the code as it is" in capsys.readouterr().err


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
