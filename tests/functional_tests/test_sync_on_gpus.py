# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The sync's matrix on CUDA: pinned memory, real streams, NCCL. One GPU, and two where there are two.

The reference is the run whose weights were in place when its optimizer was built, bit-exact. Against the run without
offload there is a tolerance (`sync_matrix.ADAMS_APART`).
"""

import itertools

import pytest
import torch
from megatron.core.dist_checkpointing.tensor_aware_state_dict import HAVE_NVRX

from tests.rigs.ranks import run_on_ranks
from tests.rigs.sync import Cell, Model, Rig, config, offload_options, start
from tests.rigs.sync_matrix import WAYS, run_cells

pytestmark = pytest.mark.gpu
OFFLOADS = list(itertools.product((False, True), (0.5, 1.0), (False, True)))


def _check(cell, written_model, world_size):
    ways = [way for way in WAYS if HAVE_NVRX or way != "local checkpoint"]
    if cell.model.kind == "experts":
        ways.remove("Hugging Face directory")
    for verdicts in run_on_ranks(run_cells, world_size, written_model(cell.model, world_size), [cell], ways):
        assert set(verdicts[str(cell)].values()) == {"passed"}, verdicts


@pytest.mark.parametrize("precision", ["bf16", "fp16", "bf16+fp32"])
@pytest.mark.parametrize(("precision_aware", "fraction", "overlap"), OFFLOADS)
def test_every_way_in_on_one_gpu(written_model, precision, precision_aware, fraction, overlap):
    _check(Cell(Model(precision), precision_aware, fraction, overlap), written_model, 1)


@pytest.mark.parametrize(("kind", "layout"), [("dense", "TP1"), ("dense", "TP2"), ("experts", "TP1"), ("dense", "PP2")])
@pytest.mark.parametrize(("precision_aware", "fraction", "overlap"), OFFLOADS)
def test_every_way_in_on_two_gpus(written_model, kind, layout, precision_aware, fraction, overlap):
    _check(Cell(Model("bf16", kind, layout), precision_aware, fraction, overlap), written_model, 2)


def _memory_of_a_sync(directory, cell):
    """(bytes a sync takes beyond what lay on the device, the largest parameter's bytes, are all copies pinned)."""
    from megatron.bridge.training.checkpointing import sync_hybrid_optimizer_param_copies

    cfg = config(directory, cell.model, offload=offload_options(cell), checkpoint={})
    run = start(cfg, Rig(directory, cell.model).whole)
    clones = [
        clone
        for child in run.optimizer.chained_optimizers
        for clone in child.optimizer.gpu_params_map_cpu_copy.values()
    ]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    assert sync_hybrid_optimizer_param_copies(run.optimizer)
    extra = torch.cuda.max_memory_allocated() - before
    largest = max(param.numel() * 4 for chunk in run.model for param in chunk.parameters())
    return extra, largest, all(clone.is_pinned() for clone in clones)


def test_a_sync_takes_no_more_than_one_parameters_memory(tmp_path):
    for extra, largest, pinned in run_on_ranks(_memory_of_a_sync, 1, tmp_path, Cell(Model())):
        assert extra <= largest
        assert pinned, "the FP32 clones of this mode lie in pinned memory"
