# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Settle `optimizer_offload_fraction="auto"`: once, before the optimizer is built, the same on all ranks.

What was settled replaces "auto" in the configuration, so each checkpoint records it, and a resume takes it from there.
Another placement would also load, but on a GPU it would round differently from then on.
"""

import logging
from typing import Any

import torch

from megatron.bridge.models.activation_memory import stage_bytes
from megatron.bridge.offload_engine.ceilings import ASSUMED, Ceilings, measure_ceilings
from megatron.bridge.offload_engine.host_threads import plan_host_threads
from megatron.bridge.offload_engine.placement import EVERY_PLACEMENT, Choice, choose
from megatron.bridge.offload_engine.prediction import FP32, Demand, Placement, predict_seconds
from megatron.bridge.offload_engine.state_formats import formats_asked_for
from megatron.bridge.training.config import ConfigContainer, DerivedConfig
from megatron.bridge.training.config.optimizer import AUTO
from megatron.bridge.training.run_state.load_plan import LoadPlan
from megatron.bridge.utils.device import free_memory_bytes, is_simulated
from megatron.bridge.utils.distributed import all_gathered

logger = logging.getLogger(__name__)

GIB = 1 << 30
RESERVE_BYTES = 2 * GIB
"""Of the free device memory, for fragmentation and buffers of communication."""


def settle_placement(
    cfg: ConfigContainer, model: list[Any], derived: DerivedConfig, plan: LoadPlan | None
) -> Choice | None:
    """Choose where the optimizer's state lives, and write it into the configuration. Collective.

    Args:
        cfg: Its optimizer's fractions are set.
        model: This rank's chunks, wrapped in DDP.
        derived: Says how many micro-batches are in flight.
        plan: What will be loaded; a resume keeps the placement of the run that saved, where that still fits.

    Returns:
        The choice; None if the configuration leaves none.
    """
    options = cfg.optimizer
    if options.optimizer_offload_fraction != AUTO:
        return None
    ceilings = ASSUMED if is_simulated() else measure_ceilings(plan_host_threads(options.optimizer_cpu_num_threads))
    ranks = all_gathered((_demand(cfg, model, derived), _recorded(plan)))
    demands, recorded = [demand for demand, _ in ranks], ranks[0][1]
    may_stream = not options.overlap_cpu_optimizer_step  # a rule refuses both
    choice = choose(ceilings, demands, [one for one in EVERY_PLACEMENT if may_stream or not one.streamed])
    why = "as is fastest within the memory"
    if recorded is not None and (may_stream or not recorded.streamed):
        slack = RESERVE_BYTES if options.optimizer_device_memory_gib is None else 0  # what is free differs by start
        kept = choose(ceilings, demands, [recorded], slack_bytes=slack)
        if kept.fits:
            choice, why = kept, "as the run that saved"
        else:
            why += f" (the run that saved had {recorded}, which doesn't fit here)"
    options.optimizer_offload_fraction = choice.placement.fraction
    options.optimizer_streamed_fraction = choice.placement.streamed
    _log(choice, why, ceilings, demands)
    return choice


def _demand(cfg: ConfigContainer, model: list[Any], derived: DerivedConfig) -> Demand:
    """What this rank's optimizer is, and the memory that the rest leaves it."""
    options = cfg.optimizer
    buffers = [buffer for chunk in model for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    peak = sum(
        stage_bytes(
            cfg.model,
            model,
            micro_batch_size=derived.micro_batch_size,
            num_micro_batches=derived.num_microbatches,
        )
    )
    there = sum(param.nbytes for chunk in model for param in chunk.parameters())
    there += sum(buffer.grad_data.nbytes for buffer in buffers)
    free = free_memory_bytes()
    if options.optimizer_device_memory_gib is not None:
        left = options.optimizer_device_memory_gib * GIB - there - peak
    else:
        left = float("inf") if free is None else float(free - RESERVE_BYTES - peak)
    return Demand(
        elements=sum(buffer.grad_data.numel() // buffer.data_parallel_world_size for buffer in buffers),
        free_bytes=left,
        is_precision_aware=options.use_precision_aware_optimizer,
        gradients_are_fp32=all(buffer.grad_dtype == torch.float32 for buffer in buffers),
        overlaps=options.overlap_cpu_optimizer_d2h_h2d or options.overlap_cpu_optimizer_step,
        num_hybrids=1 + any(chunk.expert_parallel_buffers for chunk in model),
        gradient_bytes=formats_asked_for(options).gradient.itemsize,
        weight_bytes=2 if options.overlap_cpu_optimizer_step and options.use_precision_aware_optimizer else FP32,
    )


def _recorded(plan: LoadPlan | None) -> Placement | None:
    """The placement of the run that is resumed; None if there is none, or it didn't offload."""
    saved = (plan.run_config.get("optimizer") or {}) if plan is not None and plan.optimizer else {}
    fraction, streamed = saved.get("optimizer_offload_fraction"), saved.get("optimizer_streamed_fraction", 0.0)
    if not saved.get("optimizer_cpu_offload") or not isinstance(fraction, int | float):
        return None
    return Placement(float(fraction), float(streamed))


def _log(choice: Choice, why: str, ceilings: Ceilings, demands: list[Demand]) -> None:
    def predicted(fraction: float) -> str:
        placement = Placement(fraction, 0.0)
        return f"{1000 * max(predict_seconds(ceilings, demand, placement) for demand in demands):.0f} ms"

    logger.info(
        "optimizer placement: %s, %s; predicted %.0f ms for the optimizer in a step (nothing offloaded %s, all stepped "
        "on by the host %s), %.2f GiB of the device for its state; %s: %s",
        choice.placement,
        why,
        1000 * choice.seconds,
        predicted(0.0),
        predicted(1.0),
        choice.device_bytes / GIB,
        "assumed, since the accelerator is simulated" if is_simulated() else "measured",
        ceilings,
    )
    if not choice.fits:
        worst = min(demand.free_bytes for demand in demands)
        logger.warning(
            "optimizer placement: a rank has %.2f GiB left for %.2f GiB of optimizer state, by the estimate of its "
            "activations: the run may need more memory than there is; use more ranks, smaller micro-batches or "
            "optimizer.use_precision_aware_optimizer=true",
            max(worst, 0) / GIB,
            choice.device_bytes / GIB,
        )
