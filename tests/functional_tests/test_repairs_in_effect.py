# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Which repairs are in effect with which optimizer, on which Core; that one steps aside where Core is right."""

import contextlib
import math
import re
from pathlib import Path
from types import SimpleNamespace

import megatron.core.optimizer as core_optimizer
import pytest
import torch
from megatron.core import __version__ as core_version
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, Float16OptimizerWithFloat16Params, FP32Optimizer

from megatron.bridge.core_repairs.install import REPAIRS
from megatron.bridge.core_repairs.repair import ToBuild
from megatron.bridge.utils.replaced import replaced
from tests.functional_tests.test_device_step import as_with_transformer_engine
from tests.rigs.on_ranks import build_training
from tests.rigs.ranks import run_on_ranks
from tests.rigs.tiny import fp32_norm_layer_spec, tiny_config

OFFLOAD = {
    "optimizer_cpu_offload": True,
    "optimizer_offload_fraction": 0.5,
    "overlap_cpu_optimizer_d2h_h2d": True,
}
PRECISION_AWARE = {**OFFLOAD, "use_precision_aware_optimizer": True}
PLAIN = {"use_distributed_optimizer": False}
FP32_NORMS = {"transformer_layer_spec": fp32_norm_layer_spec}
RUNS = {
    "no offload": ({}, {}, False),
    "offload": (OFFLOAD, {}, False),
    "precision-aware": (PRECISION_AWARE, {}, False),
    "FP32 weights": (PRECISION_AWARE, FP32_NORMS, False),
    "fused Adam": (OFFLOAD, {}, True),
    "FP32": ({}, {}, False),
    "FP32, plain": (PLAIN, {}, False),
    "plain": (PLAIN, {}, False),
}
"""Options of the optimizer and of the model, and whether Core finds an optimizer as Transformer Engine's is."""

ALL = ("load template", "exact resume", "adam kernel", "reshardable state", "finite gradients")
HYBRID = ("no dummy step", "master lookup", "plain param groups", "flat step", "lazy hybrid init")
IN_EFFECT = {
    "no offload": {*ALL},
    "offload": {*ALL, *HYBRID, "state device", "duplicate master", "flat shards"},
    "precision-aware": {*ALL, *HYBRID, "state device", "gradient wait"},
    "FP32 weights": {
        *ALL,
        *HYBRID,
        "state device",
        "gradient wait",
        "native FP32 parameters",
        "native FP32 gradients",
        "group order",
    },
    "fused Adam": {*ALL, *HYBRID, "duplicate master", "step counter", "flat shards"},
    "FP32": {*ALL, "native FP32 parameters", "group order"},
    "FP32, plain": {"plain FP32 state", "finite gradients"},
    "plain": {"plain state", "finite gradients"},
}
TESTED_CORES = ("0.16.1", "0.17.1", "0.18.2", "0.19.2")
"""The same in all: no defect of 0.16.1 is gone in 0.19.2. A Core that is not among them may have fixed some."""


@contextlib.contextmanager
def _built(directory, run):
    optimizer, model, fused = RUNS[run]
    with as_with_transformer_engine() if fused else contextlib.nullcontext():
        cfg = tiny_config(directory, optimizer=optimizer, model=model, ddp=optimizer if optimizer == PLAIN else {})
        cfg.mixed_precision = None if run.partition(",")[0] == "FP32" else cfg.mixed_precision
        chunks, built, _ = build_training(cfg)
        yield cfg, chunks, built


def _in_effect(directory, run):
    with _built(directory, run) as (_, _, chain):
        parts = (chain, *chain.chained_optimizers, chain.optimizer)
        return {name for part in parts for name in getattr(type(part), "repairs", ())}


@pytest.mark.parametrize("run", RUNS)
def test_which_repairs_are_in_effect(tmp_path, run):
    if not core_optimizer.USING_PYTORCH_OPTIMIZER:
        pytest.skip("the table is of a machine without Transformer Engine and Apex")
    for names in run_on_ranks(_in_effect, 2, tmp_path, run):
        if core_version.partition("+")[0] in TESTED_CORES:
            assert names == IN_EFFECT[run]
        else:
            assert names <= IN_EFFECT[run], "none is newly needed"


ON_SOME_RANKS = {"empty shard": "a rank that trains nothing", "empty bucket": "a shard of padding"}
"""What the documentation says of repairs that none of these runs needs."""


def test_the_documentation_lists_them():
    text = (Path(__file__).parents[2] / "docs" / "training" / "cpu-offload.md").read_text(encoding="utf-8")
    section = re.search(r"^## Repairs$(.*?)^## ", text, re.MULTILINE | re.DOTALL).group(1)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if "| " in line]
    assert rows.pop(0) == ["repair", "without it", "public threads", "Core", "in effect with", "file"]
    documented = {name: (threads, core, runs, file) for name, _, threads, core, runs, file in rows}
    expected = {
        repair.name: (
            ", ".join(repair.threads) or "none known",
            repair.core_versions,
            ", ".join(run for run in RUNS if repair.name in IN_EFFECT[run]) or ON_SOME_RANKS[repair.name],
            f"`{repair.is_needed.__module__.rpartition('.')[2]}.py`",
        )
        for repair in REPAIRS
    }
    assert documented == expected


# Core's methods as they may be once they are right, as far as a repair looks at them.


def _nothing(self, *_): ...


def _takes_it_back(self):
    return [group["step"] for group in self.gpu_optimizer.param_groups]


def _fp32_first(groups, buffers):
    params = sorted(groups[0]["params"], key=lambda param: param.dtype != torch.float32)
    return {param: (0, place) for place, param in enumerate(params)}, None


def _masters_apart(self, model_param):
    return {"param": model_param, "master_param": None, "without": "master_param"}


def _fused_in_both(config, model_chunks, param_groups):
    options = dict(fused=True)
    return options if config.optimizer_cpu_offload else {**options, "params": param_groups, "fused": True}


def _looks_at_the_norm(self):
    grad_norm = self.get_grad_norm()
    return math.isfinite(grad_norm)


def _waits(self, closure=None):
    self._set_sub_optimizer_grads()
    torch.cuda.current_stream().wait_stream(self._d2h_stream)
    self.gpu_optimizer.step(closure)


FIXED = {
    "load template": ("no offload", DistributedOptimizer, "state_dict", _nothing),
    "no dummy step": ("offload", HybridDeviceOptimizer, "dummy_step", _nothing),
    "master lookup": ("offload", HybridDeviceOptimizer, "_update_fp32_params_by_new_state", _nothing),
    "state device": ("offload", HybridDeviceOptimizer, "_move_new_state_to_right_device", _nothing),
    "step counter": ("fused Adam", HybridDeviceOptimizer, "_sync_sub_optimizers_state_to_hdo", _takes_it_back),
    "gradient wait": ("precision-aware", HybridDeviceOptimizer, "step", _waits),
    "duplicate master": ("offload", DistributedOptimizer, "_get_main_param_and_optimizer_states", _masters_apart),
    "native FP32 parameters": (
        "FP32 weights",
        DistributedOptimizer,
        "_build_model_and_main_param_groups",
        _nothing,
    ),
    "native FP32 gradients": ("FP32 weights", HybridDeviceOptimizer, "_set_sub_optimizer_grads", _nothing),
    "group order": (
        "FP32 weights",
        DistributedOptimizer,
        "_build_optimizer_group_ranges",
        staticmethod(_fp32_first),
    ),
    "reshardable state": ("no offload", DistributedOptimizer, "sharded_param_state_fully_reshardable", _nothing),
    "adam kernel": ("no offload", core_optimizer, "_get_megatron_optimizer_based_on_param_groups", _fused_in_both),
    "flat step": ("offload", HybridDeviceOptimizer, "_get_sub_optimizer_param_groups", _nothing),
    "flat shards": ("offload", DistributedOptimizer, "_build_model_and_main_param_groups", _nothing),
    "lazy hybrid init": ("offload", DistributedOptimizer, "__init__", _nothing),
    "plain FP32 state": ("FP32, plain", FP32Optimizer, "sharded_state_dict", _nothing),
    "plain state": ("plain", Float16OptimizerWithFloat16Params, "sharded_state_dict", _nothing),
    "finite gradients": ("no offload", ChainedOptimizer, "step", _looks_at_the_norm),
}
"""By repair: a run that needs it, and the method of Core's that it looks at, fixed."""


def _is_asked_for(directory, name):
    """Whether a repair is needed with Core as it is, and with Core fixed."""
    run, core_class, attribute, fixed = FIXED[name]
    (repair,) = (repair for repair in REPAIRS if repair.name == name)
    with _built(directory, run) as (cfg, chunks, chain):
        (asked,) = (
            part for part in (chain, chain.chained_optimizers[0], chain.optimizer) if isinstance(part, repair.target)
        )
        asked = ToBuild(cfg.optimizer, chunks) if repair.while_building else asked
        as_it_is = repair.is_needed(asked)
        with replaced(core_class, **{attribute: fixed}):
            return as_it_is, repair.is_needed(asked)


@pytest.mark.parametrize("name", FIXED)
def test_a_repair_steps_aside_where_core_is_right(tmp_path, name):
    for as_it_is, fixed in run_on_ranks(_is_asked_for, 2, tmp_path, name):
        assert (as_it_is, fixed) == (True, False)


def _two_at_once(directory):
    """Repairs that look at more than one thing: whether they are needed as Core is, and with Core fixed."""
    with _built(directory, "offload") as (_, _, chain):
        (distributed_optimizer,) = chain.chained_optimizers
        by_name = {repair.name: repair for repair in REPAIRS}
        plain, exact = by_name["plain param groups"], by_name["exact resume"]
        answers = [plain.is_needed(distributed_optimizer), exact.is_needed(distributed_optimizer)]
        distributed_optimizer.optimizer.defaults = {"lr": 0.1}
        fixed = {
            "sharded_param_state_dp_reshardable": _nothing,
            "load_parameter_state_from_dp_reshardable": _syncs,
        }
        with replaced(DistributedOptimizer, **fixed):
            return answers, [plain.is_needed(distributed_optimizer), exact.is_needed(distributed_optimizer)]


def _syncs(self, state_dict):
    self.optimizer._sync_hdo_state_to_sub_optimizers()


def test_those_that_look_at_two_things_step_aside_too(tmp_path):
    for as_it_is, fixed in run_on_ranks(_two_at_once, 2, tmp_path):
        assert as_it_is == [True, True] and fixed == [False, False]


def test_the_one_for_a_bucket_of_padding_steps_aside_too(monkeypatch):
    (repair,) = (repair for repair in REPAIRS if repair.name == "empty bucket")
    bucket = SimpleNamespace(numel_unpadded=8, grad_data=torch.zeros(16))
    optimizer = SimpleNamespace(
        data_parallel_group=SimpleNamespace(size=lambda: 2, rank=lambda: 1),
        gbuf_ranges=[{torch.bfloat16: [{"param_map": {}}]}],
        buffers=[SimpleNamespace(buckets=[bucket])],
    )
    assert repair.is_needed(optimizer)
    monkeypatch.setattr(DistributedOptimizer, "sharded_param_state_dp_reshardable", _nothing)
    assert not repair.is_needed(optimizer)


def test_each_repair_is_seen_to_step_aside():
    assert {repair.name for repair in REPAIRS} == {
        *FIXED,
        "plain param groups",
        "exact resume",
        "empty bucket",
        "empty shard",  # asks for the optimizer's state alone: tests/functional_tests/test_frozen_weights.py
    }
