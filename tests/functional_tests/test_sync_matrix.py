# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The sync in every configuration and for every way that weights come in, on Core's own classes, two ranks.

`tests/rigs/sync_matrix.py` says what must hold. Half of the cells run unless --sync-matrix=whole is given (`make
test-sync`): every other one, and on newer Cores the others. `make test-streams` runs all of them, and some more, where
streams and events order only what they promise (--streams=late). A cell that Core can't build is refused by name before
anything is built; both kinds are counted at the end of the test run.
"""

import itertools
import re
from importlib.metadata import version

import pytest
from megatron.core.dist_checkpointing.tensor_aware_state_dict import HAVE_NVRX

from tests.rigs.covering import covering, pairs_of
from tests.rigs.in_streams import order_of
from tests.rigs.ranks import run_on_ranks
from tests.rigs.sync import LAYOUTS, Cell, Model
from tests.rigs.sync_matrix import WAYS, load_mixed_chain, run_cells
from tests.rigs.tiny import tiny_config

AXES = (
    ("TP1", "TP2"),
    ("dense", "experts"),
    ("bf16", "fp16", "bf16+fp32"),
    (False, True),
    (0.0, 0.5, 1.0),
    (False, True),
)


CELLS = [
    Cell(Model(precision, kind, layout), precision_aware, fraction, overlap)
    for layout, kind, precision, precision_aware, fraction, overlap in itertools.product(*AXES)
]
PLACES = list(itertools.product(*(range(len(axis)) for axis in AXES)))
HALVES = [[cell for cell, places in zip(CELLS, PLACES, strict=True) if sum(places) % 2 == half] for half in (0, 1)]
"""Every other cell, whatever axis one goes along."""
OTHER_CELLS = [
    Cell(Model("bf16", "dense", layout), precision_aware, 0.5, True)
    for layout in LAYOUTS
    if layout not in ("TP1", "TP2")
    for precision_aware in (False, True)
]
OTHER_CELLS += [
    Cell(Model("bf16", "dense"), precision_aware=False, fraction=1.0, overlap=True, streamed=0.5),
    Cell(Model("bf16", "experts"), precision_aware=True, fraction=1.0, overlap=True, overlapped_step=True),
]


def _in_streams():
    """What the other cells lack of how a step overlaps: each value meets each other that it may meet."""
    product = [
        Cell(Model(*model), aware, fraction, overlap=copies or steps, overlapped_step=steps, streamed=part, in_bf16=low)
        for model, aware, fraction, (copies, steps), part, low in itertools.product(
            itertools.product(("bf16", "fp16", "bf16+fp32"), ("dense", "experts"), ("TP1", "TP2"), (False, True)),
            (False, True),
            (0.5, 1.0),
            ((False, False), (True, False), (False, True)),
            (0.0, 0.5, 1.0),
            (False, True),
        )
        if not (steps and part) and (not low or (aware and not part))
    ]
    return covering(
        product, lambda cell: pairs_of({**vars(cell), **vars(cell.model), "model": ""}), besides=CELLS + OTHER_CELLS
    )


def pytest_generate_tests(metafunc):
    if metafunc.function is test_every_way_in:
        is_whole = metafunc.config.getoption("--sync-matrix") == "whole"
        is_oldest = version("megatron-core").startswith("0.16.")
        cells = (CELLS if is_whole else HALVES[0 if is_oldest else 1]) + OTHER_CELLS
        cells += _in_streams() if metafunc.config.getoption("--streams") else []
        marked = [pytest.param(cell, id=str(cell), marks=pytest.mark.xdist_group(str(cell.model))) for cell in cells]
        metafunc.parametrize("cell", marked)


@pytest.fixture(scope="module")
def verdicts_of(request, written_model):
    """What came of each way of a cell. The chosen cells of one model run together: it is built once."""
    order = order_of(request.config.getoption("--streams"))
    chosen = [
        item.callspec.params["cell"] for item in request.session.items if item.originalname == "test_every_way_in"
    ]
    found = {}
    timeout_seconds = 3000 if order is None else 30000

    def of(cell, ways):
        if str(cell) not in found:
            alike = [one for one in chosen if one.model == cell.model]
            directory = written_model(cell.model, 2)
            per_rank = run_on_ranks(run_cells, 2, directory, alike, ways, order, timeout_seconds=timeout_seconds)
            for one in alike:
                verdicts = [verdict for each in per_rank for verdict in each[str(one)].items()]
                found[str(one)] = {way: verdict for way, verdict in verdicts if verdict != "passed"}
        return found[str(cell)]

    return of


@pytest.mark.timeout(36000)
def test_every_way_in(cell, verdicts_of, cell_counts):
    ways = list(WAYS)
    if not HAVE_NVRX:
        ways.remove("local checkpoint")
        cell_counts.add(refused=1, because="local checkpoints without nvidia-resiliency-ext")
    wrong = verdicts_of(cell, ways)
    cell_counts.add(passed=len(ways) - len(wrong), failed=len(wrong))
    assert wrong == {}


@pytest.mark.parametrize(
    ("precision_aware", "offloaded"), [(False, 0), (True, 1)], ids=["experts_on_the_device", "experts_offloaded"]
)
def test_masters_follow_the_weights_in_a_chain_that_is_offloaded_in_part(written_model, precision_aware, offloaded):
    """Core's reload rebuilds the masters of the member without offload, and the sync those of the other."""
    cell = Cell(Model(kind="experts"), precision_aware=precision_aware)
    for copies, stale, drift in run_on_ranks(load_mixed_chain, 2, written_model(cell.model, 2), cell, offloaded):
        assert copies > 5 and stale == 0
        assert drift == {}


REFUSED = {
    "without the distributed optimizer (its masters are tensors that the hybrid optimizer doesn't know)": (
        {"optimizer": {"use_distributed_optimizer": False}, "ddp": {"use_distributed_optimizer": False}},
        "optimizer.optimizer_cpu_offload=true without the distributed optimizer",
    ),
    "weights kept in FP8 without delayed scaling (no 16-bit weight to copy)": (
        {"model": {"fp8": "e4m3", "fp8_recipe": "blockwise", "fp8_param": True}},
        "optimizer.optimizer_cpu_offload=true with weights kept in FP8",
    ),
    "Megatron-FSDP (its shards are its own)": (
        {"ddp": {"use_megatron_fsdp": True}},
        "optimizer.optimizer_cpu_offload=true with ddp.use_megatron_fsdp=true",
    ),
    "an optimizer that Core's hybrid one lacks": (
        {"optimizer": {"optimizer": "muon"}},
        "optimizer.optimizer=muon with optimizer.optimizer_cpu_offload=true",
    ),
}


@pytest.mark.parametrize("because", REFUSED)
def test_what_core_cannot_do_is_refused(because, cell_counts, tmp_path):
    sections, message = REFUSED[because]
    optimizer = {"optimizer_cpu_offload": True, **sections.get("optimizer", {})}
    cfg = tiny_config(tmp_path, **{**sections, "optimizer": optimizer})
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        cfg.validate(1)
    cell_counts.add(refused=1, because=because)
