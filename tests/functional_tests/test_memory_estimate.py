# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The memory estimate against what two ranks really hold after a step, on the device and on the host."""

import gc

import pytest
import torch

from megatron.bridge.models.layer_specs import default_layer_spec
from megatron.bridge.offload_engine.overlap.connect import gradients_cross_early, wait_for_overlapped_step
from megatron.bridge.planning.memory import plan_memory
from megatron.bridge.planning.theoretical_memory import (
    estimate_here,
    estimate_training_memory,
    format_training_memory_estimate,
)
from tests.rigs.gathered_attention import gathered_layer_spec
from tests.rigs.ranks import run_on_ranks
from tests.rigs.tiny import tiny_config

SIZES = {
    "num_layers": 4,
    "hidden_size": 128,
    "ffn_hidden_size": 384,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "vocab_size": 512,
}
EXPERTS = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 96, "expert_model_parallel_size": 2}

BF16_ON_HOST = dict.fromkeys(("exp_avg_dtype", "exp_avg_sq_dtype", "main_grads_dtype"), torch.bfloat16)
BF16_ON_HOST["adam_beta2"] = 0.98
BF16_ON_HOST["optimizer_split_masters"] = True
OVERLAPPED = {"overlap_cpu_optimizer_d2h_h2d": True, "overlap_cpu_optimizer_step": True}
IN_16_BITS = {
    "model": {"calculate_per_token_loss": False},
    "ddp": {"grad_reduce_in_fp32": False},
    "bf16_gradients": True,
}


def _offload(fraction, **options):
    return {"optimizer": {"optimizer_cpu_offload": True, "optimizer_offload_fraction": fraction, **options}}


CASES = {
    "no offload": {},
    "nothing offloaded": _offload(0.0),
    "half": _offload(0.5),
    "all": _offload(1.0),
    "half, precision-aware, overlapped": _offload(0.5, use_precision_aware_optimizer=True, **OVERLAPPED),
    "all, most of it streamed": _offload(1.0, optimizer_streamed_fraction=0.6),
    "all, precision-aware": _offload(1.0, use_precision_aware_optimizer=True),
    "all, BF16 on the host": _offload(1.0, use_precision_aware_optimizer=True, **BF16_ON_HOST),
    "gradients in 16 bits": {"ddp": {"grad_reduce_in_fp32": False}, "bf16_gradients": True},
    "half, gradients cross early in 16 bits": _offload(0.5, **OVERLAPPED) | IN_16_BITS,
    "gradients that are divided in 16 bits cross in the step": _offload(1.0, **OVERLAPPED)
    | IN_16_BITS
    | {"model": {"calculate_per_token_loss": True}},
    "not distributed": {"optimizer": {"use_distributed_optimizer": False}, "ddp": {"use_distributed_optimizer": False}},
    "TP 2": {"model": {"tensor_model_parallel_size": 2, "sequence_parallel": True}, **_offload(0.5)},
    "CP 2": {"model": {"context_parallel_size": 2, "transformer_layer_spec": gathered_layer_spec}, **_offload(0.5)},
    "PP 2": {"model": {"pipeline_model_parallel_size": 2}, **_offload(0.5)},
    "EP 2": {"model": EXPERTS, **_offload(0.5)},
    "LoRA": {"lora": True, **_offload(0.5)},
}


def _config(case):
    from megatron.bridge.peft.lora import LoRA
    from megatron.bridge.training.config.mixed_precision import get_mixed_precision_config

    case = dict(CASES[case])
    lora, in_16_bits = case.pop("lora", False), case.pop("bf16_gradients", False)
    cfg = tiny_config("unused", **{**case, "model": {**SIZES, **case.get("model", {})}})
    cfg.tokenizer.vocab_size = SIZES["vocab_size"]
    cfg.checkpoint.save = None
    if in_16_bits:
        cfg.mixed_precision = get_mixed_precision_config("bf16_mixed")
        cfg.mixed_precision.grad_reduce_in_fp32 = False
    if lora:
        cfg.peft, cfg.checkpoint.pretrained_checkpoint = LoRA(dim=8), "."
    return cfg


def _held_after_a_step(case):
    """Bytes of all tensors that a run made and still holds after a step: on the device, and on the host."""
    from megatron.bridge.training.config import runtime_config_update
    from megatron.bridge.training.initialize import destroy_global_state, initialize_megatron
    from megatron.bridge.training.optim import setup_optimizer
    from megatron.bridge.training.setup import set_schedule_functions

    cfg = _config(case)
    gc.collect()
    before = _tensors()
    known = {tensor.untyped_storage()._cdata for tensor in before}
    runtime_config_update(cfg)
    groups = initialize_megatron(cfg)
    adapt = None if cfg.peft is None else lambda chunks: cfg.peft(chunks, training=True)
    model = cfg.model.provide_distributed_model(ddp_config=cfg.ddp, pg_collection=groups, pre_wrap_hook=adapt)
    optimizer, _ = setup_optimizer(cfg.optimizer, cfg.scheduler, model, cfg.dist.use_gloo_process_groups)
    set_schedule_functions(model, optimizer, cfg)
    for chunk in model:
        for param in chunk.parameters():
            if param.requires_grad:
                param.main_grad.fill_(1e-3)
    with gradients_cross_early(optimizer):
        for chunk in model:
            chunk.finish_grad_sync()
        optimizer.step()
    wait_for_overlapped_step(optimizer)
    gc.collect()
    held, given_back = {}, _given_back(optimizer)
    for tensor in _tensors():
        storage = tensor.untyped_storage()
        if storage._cdata not in known and storage.data_ptr() not in given_back:
            is_on_device, num_bytes = held.get(storage._cdata, (True, 0))
            held[storage._cdata] = (is_on_device and tensor.is_cuda, storage.nbytes())
    sides = [sum(size for on_device, size in held.values() if on_device == side) for side in (True, False)]
    destroy_global_state()
    return sides


def _given_back(optimizer):
    """Where the FP32 masters lie that are split now."""
    hybrids = [getattr(one, "optimizer", None) for one in getattr(optimizer, "chained_optimizers", [])]
    buckets = [bucket for hybrid in hybrids for bucket in vars(hybrid or object).get("_buckets", ())]
    split = [bucket for bucket in buckets if bucket.split_masters is not None and bucket.split_masters.is_split]
    return {master.data_ptr() for bucket in split for master in bucket.masters}


def _tensors():
    return [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]


@pytest.mark.parametrize("case", CASES)
def test_the_estimate_is_what_ranks_hold(case):
    for rank, (on_device, on_host) in enumerate(run_on_ranks(_held_after_a_step, 2, case)):
        state = plan_memory(_config(case), world_size=2, rank=rank, budget_bytes=1 << 60).as_configured.state
        estimated_device = state.weights + state.gradients + state.masters + state.moments
        estimated_host = state.host_masters + state.host_moments + state.host_gradients
        assert estimated_device == pytest.approx(on_device, rel=0.03), "device"
        assert estimated_host == pytest.approx(on_host, rel=0.03, abs=1 << 14), "host"


def test_a_fraction_that_the_run_will_settle_is_estimated_as_the_smallest_that_fits():
    roomy = plan_memory(_config("half"), world_size=2, budget_bytes=1 << 60)
    needed = (roomy.without_offload.device_bytes + roomy.all_offloaded.device_bytes) // 2
    auto = _config("half")
    auto.optimizer.optimizer_offload_fraction = "auto"
    plan = plan_memory(auto, world_size=2, budget_bytes=needed)
    assert plan.all_offloaded.device_bytes < plan.as_configured.device_bytes <= needed
    auto.optimizer.optimizer_device_memory_gib = 1000.0
    assert plan_memory(auto, world_size=2, budget_bytes=1).as_configured.state.host_moments == 0


def _estimated_within_a_run(case):
    """As a script does that has its ranks and its own hooks already, in which nothing is planned."""
    from megatron.bridge.planning.theoretical_memory import estimate_training_memory

    cfg = _config(case)
    cfg.model.register_pre_wrap_hook(lambda chunks: chunks)
    cfg.model.grad_scale_func = lambda loss: loss
    found = estimate_training_memory(cfg, world_size=2)
    assert cfg.model.grad_scale_func is not None and torch.distributed.get_world_size() == 1
    return found


def test_an_estimate_within_a_run_is_that_of_the_rank_that_needs_most():
    [estimate] = run_on_ranks(_estimated_within_a_run, 1, "PP 2")
    expected = plan_memory(_config("PP 2"), world_size=2, budget_bytes=1 << 60)
    assert (estimate.rank, estimate.world_size, estimate.layout) == (expected.rank, 2, expected.layout)
    assert estimate.memory == expected.as_configured
    parts = estimate.weight_and_optimizer_bytes + estimate.activation_bytes
    assert parts == estimate.total_bytes == expected.as_configured.device_bytes
    shown = format_training_memory_estimate(estimate).splitlines()
    assert shown[0].startswith(f"rank {expected.rank} of 2 (") and len(shown) == 8  # no logits
    assert shown[-2].split() == ["sum", "on", "the", "device", f"{estimate.total_bytes / 2**20:.2f}", "MiB"]


def test_a_plan_of_shared_rows_needs_no_attention_that_shares_them():
    cfg = _config("CP 2")
    shared = plan_memory(cfg, world_size=2, budget_bytes=1 << 60)
    cfg.model.transformer_layer_spec = default_layer_spec
    assert plan_memory(cfg, world_size=2, budget_bytes=1 << 60) == shared
    assert shared.layout == "TP 1, PP 1, CP 2, DP 1"


def test_micro_batches_of_a_step_count_in_the_estimate():
    request = {"world_size": 2, "rank": 0, "num_microbatches": None}
    two, one = (estimate_here(_config("PP 2"), request | {"num_microbatches": count}) for count in (None, 1))
    assert two.activation_bytes == pytest.approx(2 * one.activation_bytes, rel=0.01)
    assert two.weight_and_optimizer_bytes == one.weight_and_optimizer_bytes


def test_a_run_of_epochs_is_estimated_without_its_data():
    request = {"world_size": 2, "rank": 0, "num_microbatches": None}
    cfg = _config("PP 2")
    cfg.train.train_iters, cfg.train.num_epochs = None, 1
    cfg.scheduler.lr_decay_iters, cfg.scheduler.lr_warmup_iters = None, 5
    assert estimate_here(cfg, request) == estimate_here(_config("PP 2"), request)


def test_a_model_that_only_this_process_knows_is_refused():
    cfg = _config("PP 2")
    cfg.model.init_method = lambda weight: weight
    with pytest.raises(ValueError, match="can't be estimated in another process: .*lambda.*; give the model functions"):
        estimate_training_memory(cfg)
