# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The sync in every configuration and for every way that weights come in, on Core's own classes, two ranks.

`tests/sync_matrix.py` says what must hold. A cell that Core can't build is refused by name before anything is built;
both kinds are counted at the end of the test run.
"""

import itertools

import pytest
from megatron.core.dist_checkpointing.tensor_aware_state_dict import HAVE_NVRX

from tests.ranks import run_on_ranks
from tests.sync_matrix import LAYOUTS, WAYS, Cell, Model, config, offload_options, run_cell

CELLS = [
    Cell(Model(precision, kind, layout), precision_aware, fraction, overlap)
    for layout, kind, precision, precision_aware, fraction, overlap in itertools.product(
        ("TP1", "TP2"),
        ("dense", "experts"),
        ("bf16", "fp16", "bf16+fp32"),
        (False, True),
        (0.0, 0.5, 1.0),
        (False, True),
    )
]
CELLS += [
    Cell(Model("bf16", "dense", layout), precision_aware, 0.5, True)
    for layout in LAYOUTS
    if layout not in ("TP1", "TP2")
    for precision_aware in (False, True)
]


def _refusal(directory, cell):
    """Why the configuration is refused; empty where it isn't."""
    try:
        config(directory, cell.model, offload=offload_options(cell), checkpoint={})
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_every_way_in(cell, written_model, cell_counts, tmp_path):
    ways = list(WAYS)
    refusal = run_on_ranks(_refusal, 2, tmp_path, cell)[0]
    if refusal:
        assert cell.precision_aware and refusal.startswith("optimizer.use_precision_aware_optimizer=true"), refusal
        cell_counts.add(refused=len(ways), because="precision-aware without Transformer Engine (Core 0.16.1)")
        return
    if not HAVE_NVRX:
        ways.remove("local checkpoint")
        cell_counts.add(refused=1, because="local checkpoints without nvidia-resiliency-ext")
    if cell.model.kind == "experts":
        ways.remove("Hugging Face directory")
        cell_counts.add(refused=1, because="a Hugging Face directory of a model with experts (no such family)")
    per_rank = run_on_ranks(run_cell, 2, written_model(cell.model, 2), cell, ways)
    wrong = {way: verdict for verdicts in per_rank for way, verdict in verdicts.items() if verdict != "passed"}
    cell_counts.add(passed=len(ways) - len(wrong), failed=len(wrong))
    assert wrong == {}
