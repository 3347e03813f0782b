# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Stop and resume: a run that was interrupted ends with the bits of the run that was not.

`tests/rigs/resume_matrix.py` lists the cells, `tests/rigs/resume.py` says what must hold. `make test` runs a cut of the
matrix, `make test-resume` all of it (--resume-matrix=whole), and `make test-streams` all of it where streams and events
order only what they promise (--streams=late), with some more cells: there each cell resumes once, and must equal the
runs without offload on the ordinary accelerator. Stock Core can't resume any offloaded optimizer (the repairs in
training/cpu_offload say why); without Transformer Engine or Apex it can't resume a plain one either.
"""

import pytest

from tests.rigs import resume_matrix
from tests.rigs.in_streams import order_of, run_in
from tests.rigs.on_ranks import make_pretrained
from tests.rigs.ranks import end_ranks, run_on_ranks
from tests.rigs.resume import apart, resume, run_through, unlike, without_repairs
from tests.rigs.resume_matrix import LAYOUTS, MODELS, ONE_BUCKET, RESHARDED_AT, SAME, SAVES, Cell, Saved


def pytest_generate_tests(metafunc):
    if metafunc.function is not test_resumes:
        return
    cells = resume_matrix.every_cell()
    if metafunc.config.getoption("--resume-matrix") == "cut":
        cells = resume_matrix.cut(cells)
    if metafunc.config.getoption("--streams"):
        cells += resume_matrix.in_streams()
    cells.sort(key=lambda cell: str(cell.saved))  # so that those of one saved run follow each other
    marked = [pytest.param(cell, id=str(cell), marks=pytest.mark.xdist_group(str(cell.saved))) for cell in cells]
    metafunc.parametrize("cell", marked)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("resume")
    written = set()

    def of(kind):
        if kind not in written:
            run_on_ranks(make_pretrained, 2, path / kind, model=MODELS[kind])
            written.add(kind)
        return path

    return of


@pytest.fixture(scope="module")
def order(request):
    """Of adversarial streams; None where tests run on the ordinary accelerator."""
    return order_of(request.config.getoption("--streams"))


@pytest.fixture(scope="module")
def plain_run_of(directory):
    """The directory and the name of the run, on the ordinary accelerator, that a saved run must equal; all are kept."""
    kept = {}

    def of(saved):
        plain = saved.plain
        if plain not in kept:
            path, name = directory(saved.kind), f"{plain} on the ordinary accelerator"
            saves = (RESHARDED_AT,)
            kept[plain] = path, name, run_on_ranks(run_through, _num_ranks(plain), path, name, plain, saves=saves)
        return kept[plain]

    return of


@pytest.fixture(scope="module")
def run_of(directory, order, plain_run_of):
    """The directory and the name of a saved run, and what each rank saw of it; the last one is kept."""
    kept = {}

    def of(saved):
        if saved not in kept:
            kept.clear()
            path = directory(saved.kind)
            saves = SAVES if order is None else (RESHARDED_AT,)
            whole = run_on_ranks(run_in, _num_ranks(saved), order, run_through, path, str(saved), saved, saves=saves)
            if order is not None:
                assert unlike(plain_run_of(saved)[2], whole) == []
            if saved.layout.startswith("DP") and saved.optimizer == "distributed":
                assert all(seen.padded_buckets for seen in whole), "no bucket but the last is padded"
            kept[saved] = path, str(saved), whole
        return kept[saved]

    return of


@pytest.fixture(scope="module")
def plain_resume_of(plain_run_of):
    """What each rank sees of the run that resumes the plain one in another layout; all are kept."""
    kept = {}

    def of(cell):
        resumes = Cell(cell.saved.plain, cell.layout)
        if resumes not in kept:
            path, name, _ = plain_run_of(cell.saved)
            resumed = run_on_ranks(resume, _num_ranks(cell), path, name, resumes, RESHARDED_AT, and_still=False)
            kept[resumes] = [seen for seen, _ in resumed]
        return kept[resumes]

    return of


def _num_ranks(of):
    return LAYOUTS[of.layout][0]


def _check(run, cell, step, order, plain_resume_of):
    path, name, whole = run
    resumed = run_on_ranks(run_in, _num_ranks(cell), order, resume, path, name, cell, step, and_still=order is None)
    if order is not None and cell.layout != cell.saved.layout:
        assert unlike(plain_resume_of(cell), [seen for seen, _ in resumed]) == []
    assert apart(whole, [seen for seen, _ in resumed], step, exact=cell.layout == cell.saved.layout) == []
    assert all(seen.moved for seen, _ in resumed), "the run that resumed trained nothing"
    assert [moved for _, moved in resumed if moved] == [], "a step at learning rate 0 changed weights"


def test_resumes(cell, run_of, plain_resume_of, cell_counts, order):
    run = run_of(cell.saved)
    if cell.refused:
        cell_counts.add(failed=1)
        path, name, _ = run
        messages = run_on_ranks(without_repairs, _num_ranks(cell), (), resume, path, name, cell, RESHARDED_AT)
        for message in messages:
            assert f"holds optimizer state of another layout ({cell.refused}), which can't be resharded" in message
            assert "\n" not in message
        cell_counts.add(failed=-1, refused=1, because=f"dp_reshardable, {cell.refused}")
        return
    for step in SAVES if cell.change == SAME and order is None else (RESHARDED_AT,):
        cell_counts.add(failed=1)
        _check(run, cell, step, order, plain_resume_of)
        cell_counts.add(failed=-1, passed=1)


def test_resumes_in_fresh_processes(run_of, plain_resume_of, order):
    """The ranks of the other tests serve many runs; these have seen none."""
    cell = Cell(Saved(precision="fp16", fraction=0.5, form="dp_reshardable"))
    run = run_of(cell.saved)
    end_ranks(2)
    _check(run, cell, RESHARDED_AT, order, plain_resume_of)


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_stock_core_does_not_resume(run_of, fraction):
    cell = Cell(Saved(fraction=fraction, form="dp_reshardable"))
    path, name, whole = run_of(cell.saved)
    resumed = run_on_ranks(without_repairs, 2, None, resume, path, name, cell, RESHARDED_AT)
    if isinstance(resumed[0], str):
        assert resumed[0].startswith(("KeyError", "AssertionError"))
    else:
        assert apart(whole, [seen for seen, _ in resumed], RESHARDED_AT, exact=True)


OURS = ("reshardable state",)


def test_what_core_wrote_in_one_bucket_is_resumed_elsewhere(directory):
    saved, path = Saved(fraction=0.0), directory("dense")
    whole = run_on_ranks(without_repairs, 2, OURS, run_through, path, "by Core", saved, ddp=ONE_BUCKET)
    (resumed,) = run_on_ranks(resume, 1, path, "by Core", Cell(saved, "DP 1"), RESHARDED_AT)
    assert apart(whole, [resumed[0]], RESHARDED_AT, exact=False) == []


def test_what_core_writes_in_padded_buckets_is_wrong(directory):
    saved, path = Saved(fraction=0.0), directory("dense")
    whole = run_on_ranks(without_repairs, 2, OURS, run_through, path, "by Core, padded", saved)
    resumed = run_on_ranks(resume, 2, path, "by Core, padded", Cell(saved), RESHARDED_AT)
    assert any(text.startswith("loaded: ") for text in apart(whole, [seen for seen, _ in resumed], 3, exact=True))


def test_a_resume_keeps_no_more_memory_than_the_run_did(run_of):
    saved = Saved(fraction=0.5, precision_aware=True)
    path, name, whole = run_of(saved)
    for uninterrupted, (continued, _) in zip(
        whole, run_on_ranks(resume, 2, path, name, Cell(saved), RESHARDED_AT), strict=True
    ):
        of_the_run = uninterrupted.saved[RESHARDED_AT]
        held = [sum(one.held_bytes for one in slices) for slices in (of_the_run, continued.loaded)]
        assert held[0] == held[1] == sum(8 * one.tensors["exp_avg"].numel() for one in continued.loaded)
