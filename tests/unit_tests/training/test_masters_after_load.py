# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Whose masters a load rebuilds, when, and in which order: by each way to load, with an optimizer that takes notes."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron.bridge.training import checkpointing, optim
from megatron.bridge.training.run_state.load_plan import LoadPlan, Source

LOADED = {"model": {"weight": torch.zeros(1)}, "train_state": {}}


class Chain:
    """Two optimizers over one weight each: one whose masters only the sync rebuilds, one that only Core does."""

    def __init__(self):
        self.calls = []

    def reload_model_params(self, state_dict=None):
        self.calls.append(("reload", state_dict))


@pytest.fixture
def calls_of_a_load(monkeypatch):
    def load(source=Source.MEGATRON, *, restored=False, offload=True, bf16=True, main_params=False, hand_over=False):
        chain = Chain()
        plan = LoadPlan(Path("there"), source, optimizer=restored, scheduler=False, rng=False, train_state=False)
        planned = [] if hand_over else [plan]
        monkeypatch.setattr(checkpointing, "plan_on_all_ranks", lambda cfg, context: planned.pop())
        monkeypatch.setattr(checkpointing, "_load_hf_weights", lambda *_: chain.calls.append(("weights", "HF")))
        monkeypatch.setattr(
            checkpointing, "_load_megatron", lambda *_, **__: chain.calls.append(("weights", "Megatron")) or LOADED
        )
        monkeypatch.setattr(
            checkpointing,
            "sync_hybrid_optimizer_param_copies",
            lambda optimizer, state_dict: optimizer.calls.append(("sync", state_dict)),
        )
        monkeypatch.setattr(
            checkpointing,
            "check_hybrid_optimizer_param_copies",
            lambda optimizer, *, exact: optimizer.calls.append(("check", exact)),
        )
        cfg = SimpleNamespace(
            model=SimpleNamespace(fp16=False, bf16=bf16),
            optimizer=SimpleNamespace(optimizer_cpu_offload=offload),
            checkpoint=SimpleNamespace(load_main_params_from_ckpt=main_params),
        )
        train_state = SimpleNamespace(step=0, floating_point_operations_so_far=0)
        state = SimpleNamespace(cfg=cfg, train_state=train_state, background_save=None)
        handed_over = {"plan": plan} if hand_over else {}
        checkpointing.load_checkpoint(state, [], chain, None, checkpointing_context={}, **handed_over)
        assert planned == []
        return chain.calls

    return load


@pytest.mark.parametrize(("source", "weights"), [(Source.MEGATRON, "Megatron"), (Source.HUGGING_FACE, "HF")])
def test_weights_alone_are_followed_by_the_reload_and_then_the_sync(calls_of_a_load, source, weights):
    assert calls_of_a_load(source) == [("weights", weights), ("reload", None), ("sync", None), ("check", True)]


def test_a_restored_optimizer_is_only_checked(calls_of_a_load):
    assert calls_of_a_load(restored=True) == [("weights", "Megatron"), ("check", False)]
    assert calls_of_a_load(restored=True, main_params=True) == [("weights", "Megatron"), ("check", False)]


def test_fp32_weights_are_handed_to_both(calls_of_a_load):
    assert calls_of_a_load(main_params=True)[1:] == [("reload", LOADED), ("sync", LOADED), ("check", False)]


def test_fp32_weights_need_the_sync_alone(calls_of_a_load):
    """Core reloads masters of 16-bit weights; the copies of FP32 ones on the host are the sync's."""
    assert calls_of_a_load(bf16=False)[1:] == [("sync", None), ("check", True)]


@pytest.mark.parametrize("restored", [False, True])
def test_without_offload_there_is_nothing_to_sync(calls_of_a_load, restored):
    assert calls_of_a_load(offload=False, restored=restored)[1:] == [("reload", None)] * (not restored)


def test_a_plan_that_is_handed_over_is_not_made_again(calls_of_a_load):
    assert calls_of_a_load(restored=True, hand_over=True) == calls_of_a_load(restored=True)


def test_the_sync_is_defined_beside_the_load():
    for function in (checkpointing.load_checkpoint, checkpointing.sync_hybrid_optimizer_param_copies):
        assert function.__module__ == "megatron.bridge.training.checkpointing"
    assert checkpointing.sync_hybrid_optimizer_param_copies(None) == checkpointing.HybridParamSync()
    assert optim.sync_hybrid_device_optimizer_fp32_master_copies(None) is False
