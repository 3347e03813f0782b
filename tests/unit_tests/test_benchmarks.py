# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""`make bench`: what fails it, what it writes, and that the committed page is what was measured."""

import pytest

from benchmarks import __main__ as bench
from benchmarks import document, gpu_model, offload_prediction
from benchmarks.document import Benchmark, Measured
from benchmarks.figures import Figure

pytestmark = pytest.mark.any_core

MODULE = '''
"""Measures nothing.

More of it.
"""
import sys, time
from benchmarks.figures import Figure, run
import argparse

def measure(arguments):
    {body}
    return [Figure("a step", "another", ({values}), at_most=1.0)]

if __name__ == "__main__":
    run(measure, argparse.ArgumentParser())
'''


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A function that runs benchmarks, given as values or as code that comes before them."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "made").mkdir()

    def run(timeout_seconds=300, **modules):
        for name, (body, values) in modules.items():
            (tmp_path / "made" / f"{name}.py").write_text(MODULE.format(body=body, values=values))
        chosen = [Benchmark(name, name) for name in modules]
        return bench.measure_all(
            chosen, timeout_seconds=timeout_seconds, pictures=tmp_path, package="made", where="a machine"
        )

    return run


def test_only_a_figure_beyond_its_limit_is_a_regression(measured):
    results, problems = measured(fine=("pass", "1.4, 1.3, 9.0"), slow=("pass", "1.6, 1.7, 0.1"))
    assert problems == ["slow: a step: 1.6 x (0.1 to 1.7), limit 1.5 x"]
    assert results["fine"].figures == (Figure("a step", "another", (1.4, 1.3, 9.0), at_most=1.0),)
    assert (results["slow"].about, results["slow"].where) == ("Measures nothing.", "a machine")


def test_a_benchmark_that_fails_is_named(measured):
    results, problems = measured(broken=("raise ValueError('no luck')", "1.0,"))
    assert results == {}
    assert problems[0].startswith("broken failed: exit status 1") and "no luck" in problems[0]


def test_a_benchmark_that_hangs_is_ended(measured):
    assert measured(1, hangs=("time.sleep(6000)", "1.0,")) == ({}, ["hangs failed: no end after 1 s\n"])


def test_what_is_not_a_number_is_a_regression():
    figure = Figure("a step", "another", (float("nan"),), at_most=1.0)
    assert document.is_missed(figure) and document.regressions((figure,))


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The document and what it follows from, in a directory of their own, with an older measurement."""
    monkeypatch.setattr(document, "ROOT", tmp_path)
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    monkeypatch.setattr(document, "DOCUMENT", tmp_path / "performance.md")
    monkeypatch.setattr(document, "MEASURED", tmp_path / "measured.json")
    old = {name: one_of(f"{name}, the old one", 0.5) for name in ("offload_sync", "start_up")}
    document.write(old)
    document.DOCUMENT.write_text(document.render(old))
    return tmp_path


def one_of(what, value):
    return Measured("Does something.", 12.0, "2026-11-23", "a machine", (Figure(what, "another", (value,), 1.0),))


def outcome(monkeypatch, results, problems, *arguments):
    monkeypatch.setattr(bench, "measure_all", lambda chosen, **options: (results, problems))
    return bench.main(arguments)


def test_a_failure_leaves_what_was_measured_before(files, monkeypatch, capsys):
    assert outcome(monkeypatch, {"start_up": one_of("a new one", 0.7)}, ["offload_sync failed: why"]) == 1
    text = document.DOCUMENT.read_text()
    assert "offload_sync, the old one" in text and "a new one" in text and "start_up, the old one" not in text
    assert "offload_sync failed: why" in capsys.readouterr().err
    assert document.render(document.read()) == text


def test_a_check_writes_nothing(files, monkeypatch):
    before = {path: path.read_bytes() for path in files.iterdir()}
    assert outcome(monkeypatch, {"start_up": one_of("a new one", 0.7)}, [], "--check") == 0
    assert {path: path.read_bytes() for path in files.iterdir()} == before


def test_the_document_says_plainly_what_is_missed():
    missed = Figure("a save", "Core's | bare", (1.2, 1.3, 1.1), at_most=1.05, note="it writes twice")
    measured = {"start_up": Measured("Starts.", 9.0, "2026-11-23", "a machine", (missed,))}
    text = document.render(measured)
    assert "| a save | Core's \\| bare | 1.2 x (1.1 to 1.3) | 1.05 x | **no** |" in text
    assert "- a save: missed by 14%: it writes twice" in text
    assert "**0 of 1 figures reach their aim.** Missed: a save." in text


def test_the_committed_document_is_what_was_measured():
    measured = document.read()
    assert set(measured) <= set(bench.NAMES)
    assert document.DOCUMENT.read_text(encoding="utf-8") == document.render(measured)
    for benchmark in document.BENCHMARKS:
        assert (document.ROOT / "benchmarks" / f"{benchmark.name}.py").exists()
        assert bench.about_of(f"benchmarks.{benchmark.name}")
        is_shown = benchmark.picture and benchmark.name in measured
        assert not is_shown or (document.PICTURES / benchmark.picture).exists()


def test_the_prediction_explains_the_optimizer_steps_that_were_measured_on_a_gpu():
    machine = gpu_model.read_machine()
    shape, text = machine.shape(), (document.ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    for step in machine.measured["steps"]:
        way = gpu_model.COPIES if step["overlap"] else gpu_model.IN_A_ROW
        placement = gpu_model.Placement(step["fraction"], 0.0)
        optimizer = machine.step_seconds(shape, way, placement) - shape.compute_seconds
        assert 1e3 * optimizer == pytest.approx(step["optimizer_ms"], rel=0.06)
        mode = "precision-aware" if step["aware"] else "FP32 shards"
        row = f"| {step['fraction']:g} | {mode} | {'yes' if step['overlap'] else 'no'} | {step['step_ms']} |"
        assert row in text and f" | {step['optimizer_ms']} | " in text
    assert 0.8 < machine.beside_copies < 1


def test_the_fewest_tokens_are_where_the_ratio_falls_below_the_aim():
    assert offload_prediction._fewest_tokens(lambda tokens: 1 + 20_000 / tokens) == 200_000
