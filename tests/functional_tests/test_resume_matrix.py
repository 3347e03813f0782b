# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Stop and resume: a run that was interrupted ends with the bits of the run that was not.

`tests/resume_matrix.py` says what must hold. `make test` runs a cut of the matrix, `make test-resume` all of it
(--resume-matrix=whole). Stock Core can't do this for any offloaded optimizer (the repairs in training/cpu_offload say
why); without Transformer Engine or Apex it can't for a plain one either. Two tests show that the oracle sees it.
"""

import pytest

from tests import resume_matrix
from tests.on_ranks import make_pretrained
from tests.ranks import end_ranks, run_on_ranks
from tests.resume_matrix import CHANGES, MODELS, RESHARDED_AT, SAME, SAVES, Cell, Saved


def pytest_generate_tests(metafunc):
    if metafunc.function is test_resumes:
        cells = resume_matrix.every_cell()
        if metafunc.config.getoption("--resume-matrix") == "cut":
            cells = resume_matrix.cut(cells)
        cells.sort(key=lambda cell: str(cell.saved))
        marked = [pytest.param(cell, id=str(cell), marks=pytest.mark.xdist_group(str(cell.saved))) for cell in cells]
        metafunc.parametrize("cell", marked)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def run_of(directory):
    """The name of a saved run, and what each rank saw of it; the last one is kept."""
    kept = {}

    def of(saved):
        if not (directory / saved.kind).exists():
            run_on_ranks(make_pretrained, 2, directory / saved.kind, model=MODELS[saved.kind])
        if saved not in kept:
            kept.clear()
            kept[saved] = str(saved), run_on_ranks(resume_matrix.run_through, 2, directory, str(saved), saved)
            assert all(seen.padded_buckets for seen in kept[saved][1]), "no bucket but the last is padded"
        return kept[saved]

    return of


def _check(directory, run, whole, cell, step):
    change = CHANGES[cell.change]
    on_ranks = run_on_ranks(resume_matrix.resume, change.ranks, directory, run, cell, step)
    assert resume_matrix.apart(whole, [seen for seen, _ in on_ranks], step, exact=change.is_exact) == []
    assert all(seen.moved for seen, _ in on_ranks), "the run that went on trained nothing"
    assert [moved for _, moved in on_ranks if moved] == [], "a step at learning rate 0 changed weights"


def test_resumes(directory, cell, run_of, cell_counts):
    run, whole = run_of(cell.saved)
    if cell.refused:
        cell_counts.add(failed=1)
        (message, *others) = run_on_ranks(resume_matrix.refusal, 2, directory, run, cell, RESHARDED_AT)
        expected = f"holds optimizer state of another layout ({cell.refused}), which can't be resharded: use the"
        assert expected in message and "\n" not in message
        assert all(message in other for other in others)
        cell_counts.add(failed=-1, refused=1, because=f"dp_reshardable: {cell.refused}")
        return
    for step in SAVES if cell.change == SAME else (RESHARDED_AT,):
        cell_counts.add(failed=1)
        _check(directory, run, whole, cell, step)
        cell_counts.add(failed=-1, passed=1)


def test_resumes_in_fresh_processes(directory, run_of):
    """The ranks of the other tests serve many runs; these have seen none."""
    cell = Cell(Saved(precision="fp16", fraction=0.5, form="dp_reshardable"))
    run, whole = run_of(cell.saved)
    end_ranks(2)
    _check(directory, run, whole, cell, RESHARDED_AT)
