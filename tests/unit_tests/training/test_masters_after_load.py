# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Whose masters follow a load, and what has the last word on them, by the values in mocked optimizers."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from megatron.bridge.training import checkpointing, optim
from megatron.bridge.training.checkpointing import CheckpointLoadContext, bring_masters_in_line
from megatron.bridge.training.setup import load_and_check
from tests.unit_tests.training.cpu_offload.test_param_copies import WEIGHT, chained, mocked_optimizer

OWNED = WEIGHT[1:3].float()
IN_FP32 = {"model": {"weight": WEIGHT.float() + 0.001}}
"""What a checkpoint may hold of the weight: bits that the 16-bit one has lost."""


class Load:
    """A chain of which one member is offloaded, after a load; its reload leaves other values where the sync writes."""

    def __init__(self, *, restored=False, offload=True, bf16=True, main_params=False, copies=0.0):
        offloaded, self.master, self.clone = mocked_optimizer()
        self.reloaded_from = []
        chain = chained(offloaded)
        chain.reload_model_params.side_effect = self.reload
        self.master.copy_(OWNED + copies)
        self.clone.copy_(OWNED + copies)
        cfg = SimpleNamespace(
            model=SimpleNamespace(fp16=False, bf16=bf16),
            optimizer=SimpleNamespace(optimizer_cpu_offload=offload),
            checkpoint=SimpleNamespace(load_main_params_from_ckpt=main_params),
        )
        bring_masters_in_line(cfg, chain, restored=restored, loaded=IN_FP32)

    def reload(self, state_dict=None):
        self.reloaded_from.append(state_dict)
        self.master.fill_(9.0)
        self.clone.fill_(9.0)

    def holds(self, values):
        return torch.equal(self.master, values) and torch.equal(self.clone, values)


def test_weights_alone_are_followed_by_the_reload_and_then_the_sync():
    load = Load(copies=5.0)
    assert load.reloaded_from == [None] and load.holds(OWNED)


@pytest.mark.parametrize("main_params", [False, True])
def test_a_restored_optimizer_is_only_checked(main_params):
    load = Load(restored=True, main_params=main_params, copies=0.002)  # it rounds to the weight
    assert load.reloaded_from == [] and load.holds(OWNED + 0.002)
    with pytest.raises(RuntimeError, match="is not the loaded weight"):
        Load(restored=True, main_params=main_params, copies=5.0)


def test_fp32_weights_are_handed_to_both():
    load = Load(main_params=True)
    assert load.reloaded_from == [IN_FP32] and load.holds(OWNED + 0.001)


def test_fp32_weights_need_the_sync_alone():
    """Core reloads masters of 16-bit weights; the copies of FP32 ones on the host are the sync's."""
    load = Load(bf16=False, copies=5.0)
    assert load.reloaded_from == [] and load.holds(OWNED)


@pytest.mark.parametrize("restored", [False, True])
def test_without_offload_there_is_nothing_to_sync(restored):
    load = Load(offload=False, restored=restored, copies=5.0)
    assert load.reloaded_from == [None] * (not restored)
    assert load.holds(OWNED + 5.0 if restored else torch.full((2,), 9.0))


@pytest.mark.parametrize("loaded", [OWNED, OWNED + 0.002, OWNED + 5.0], ids=["weights", "masters", "weights alone"])
def test_masters_that_do_not_follow_another_managers_load_are_found(loaded):
    optimizer, *copies = mocked_optimizer()

    class Manager:
        def load(self, context):
            for copy in copies:
                copy.copy_(loaded)

    context = CheckpointLoadContext(SimpleNamespace(), [], chained(optimizer))
    follow = (loaded.to(WEIGHT.dtype) == WEIGHT[1:3]).all()
    with contextlib.nullcontext() if follow else pytest.raises(RuntimeError, match="call sync_hybrid_optimizer_param"):
        load_and_check(Manager(), context)


@pytest.mark.parametrize("loaded", [OWNED, OWNED + 0.002, OWNED + 5.0], ids=["weights", "masters", "weights alone"])
def test_without_offload_too(loaded):
    optimizer, master, _ = mocked_optimizer()
    optimizer.optimizer = torch.optim.AdamW([master])
    layer = torch.nn.Module()
    layer.norm = torch.nn.Module()
    layer.norm.weight = torch.nn.Parameter(WEIGHT)
    optimizer.model_float16_groups = [[layer.norm.weight]]
    manager_class = type("Manager", (), {"load": lambda self, context: master.copy_(loaded)})
    context = CheckpointLoadContext(SimpleNamespace(), [layer], chained(optimizer))
    follow = (loaded.to(WEIGHT.dtype) == WEIGHT[1:3]).all()
    message = r"master of norm.weight is not the loaded weight \(7, not 2\)"
    with contextlib.nullcontext() if follow else pytest.raises(RuntimeError, match=message):
        load_and_check(manager_class(), context)


def test_the_sync_is_defined_beside_the_load():
    for function in (checkpointing.load_checkpoint, checkpointing.sync_hybrid_optimizer_param_copies):
        assert function.__module__ == "megatron.bridge.training.checkpointing"
    assert checkpointing.sync_hybrid_optimizer_param_copies(None) == checkpointing.HybridParamSync()
    assert optim.sync_hybrid_device_optimizer_fp32_master_copies(None) is False
