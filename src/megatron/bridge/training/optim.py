# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Build the optimizer and its schedule."""

import logging
from typing import Any

import megatron.core.optimizer as core_optimizer
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron.bridge.core_repairs.install import install_repairs, repaired_construction
from megatron.bridge.offload_engine.failures import end_all_ranks_together
from megatron.bridge.offload_engine.host_threads import plan_host_threads, step_with
from megatron.bridge.offload_engine.overlap.connect import overlap_steps
from megatron.bridge.offload_engine.overlap.early_gradients import detach
from megatron.bridge.offload_engine.split_step import SplitStep, split_masters_of
from megatron.bridge.offload_engine.state_formats import formats_asked_for, formats_of, keep_state_in
from megatron.bridge.offload_engine.streamed_step import StreamedStep, stream_buckets
from megatron.bridge.training.config import (
    DerivedConfig,
    OptimizerConfig,
    OptimizerConfigOverrideProvider,
    OptimizerConfigOverrideProviderContext,
    SchedulerConfig,
)
from megatron.bridge.training.config.derived import weight_decay_ends
from megatron.bridge.training.config.optimizer import AUTO
from megatron.bridge.training.config.scheduler import SCHEDULE_LENGTHS
from megatron.bridge.training.cpu_offload.param_copies import find_hybrid_optimizers, rebuild_param_copies

logger = logging.getLogger(__name__)


def setup_optimizer(
    optimizer_config: OptimizerConfig,
    scheduler_config: SchedulerConfig,
    model: list[Any],
    use_gloo_process_groups: bool = False,
    pg_collection: ProcessGroupCollection | None = None,
    optimizer_config_override_provider: OptimizerConfigOverrideProvider | None = None,
    *,
    derived: DerivedConfig | None = None,
) -> tuple[Any, OptimizerParamScheduler]:
    """Build Megatron-Core's optimizer for a model, repair its known defects, and build the schedule.

    Args:
        optimizer_config: A finalized configuration.
        scheduler_config: The schedule.
        model: This rank's chunks, wrapped in DDP.
        use_gloo_process_groups: Let the distributed optimizer gather over gloo.
        pg_collection: Process groups; None uses Core's global ones.
        optimizer_config_override_provider: Options for single parameters; None gives Core's usual ones.
        derived: Says how long the schedule is. None: as `runtime_config_update` has shown it in `scheduler_config`.

    Returns:
        The optimizer and its parameter scheduler.

    Raises:
        ValueError: Nothing says how long the schedule is, or the offload fraction is still "auto".
    """
    if optimizer_config.optimizer_offload_fraction == AUTO:
        raise ValueError(
            f"setup_optimizer: optimizer.optimizer_offload_fraction is {AUTO!r}, which only `finetune` and `pretrain` "
            "settle: expected a number; set 0 to 1"
        )
    detach([chunk for chunk in model if isinstance(chunk, DistributedDataParallel)])
    lengths = derived or _shown_lengths(scheduler_config)
    provider = optimizer_config_override_provider or OptimizerConfigOverrideProvider()
    with repaired_construction(optimizer_config, model):
        optimizer = get_megatron_optimizer(
            optimizer_config,
            model,
            config_overrides=provider.build_config_overrides(
                OptimizerConfigOverrideProviderContext(
                    scheduler_config=scheduler_config, optimizer_config=optimizer_config, model=model
                )
            ),
            use_gloo_process_groups=use_gloo_process_groups,
            pg_collection=pg_collection,
        )
    _drop_stub_optimizers(optimizer)
    install_repairs(optimizer)
    if optimizer_config.optimizer_cpu_offload:
        for hybrid in find_hybrid_optimizers(optimizer):
            keep_state_in(hybrid.optimizer, formats_asked_for(optimizer_config))
            if optimizer_config.optimizer_split_masters:
                split_masters_of(hybrid.optimizer)
        if optimizer_config.optimizer_streamed_fraction:
            for found in find_hybrid_optimizers(optimizer):
                stream_buckets(found.optimizer, optimizer_config.optimizer_streamed_fraction)
        _prepare_steps_on_the_host(optimizer, optimizer_config, model)
    logger.info("optimizer: %s", describe_optimizer(optimizer_config, optimizer))
    return optimizer, build_scheduler(optimizer, optimizer_config, scheduler_config, lengths)


def _drop_stub_optimizers(optimizer: Any) -> None:
    """Remove stub optimizers from a chain: Core can step them, but can neither save nor load them.

    Core builds a chain of one optimizer for the experts' weights and one for all others. If only experts are trained,
    the latter is a stub on every rank.
    """
    chain = getattr(optimizer, "chained_optimizers", [])
    steps = [one for one in chain if not one.is_stub_optimizer]
    if steps:
        optimizer.chained_optimizers = steps


def _shown_lengths(scheduler: SchedulerConfig) -> SchedulerConfig:
    """A scheduler configuration that shows the schedule's lengths.

    Raises:
        ValueError: It doesn't.
    """
    if scheduler.lr_decay_steps is None:
        raise ValueError(
            f"setup_optimizer: scheduler.{SCHEDULE_LENGTHS[0]} is None: expected a number of samples; call "
            "runtime_config_update(cfg) first, or pass derived=cfg.derive()"
        )
    return scheduler


def _prepare_steps_on_the_host(optimizer: Any, config: OptimizerConfig, model: list[Any]) -> None:
    """Let the offloaded optimizer step with this rank's share of the cores, overlapped if asked for, and let its errors
    end all ranks. Collective.
    """
    threads = plan_host_threads(config.optimizer_cpu_num_threads)
    if threads is not None:
        logger.info("the host's optimizer steps with %d threads (%s)", threads.count, threads.reason)
    hybrids = find_hybrid_optimizers(optimizer)
    if config.overlap_cpu_optimizer_step:
        if hybrids:
            overlap_steps(optimizer, hybrids, model, threads)
        return
    if threads is not None:
        for hybrid in hybrids:
            step_with(hybrid.optimizer, threads)
    end_all_ranks_together(optimizer, [hybrid.optimizer for hybrid in hybrids])


def build_scheduler(
    optimizer: Any,
    optimizer_config: OptimizerConfig,
    scheduler_config: SchedulerConfig,
    lengths: DerivedConfig | SchedulerConfig,
) -> OptimizerParamScheduler:
    """Build the schedule of learning rate and weight decay. It counts in samples; `lengths` gives its lengths."""
    scheduler = scheduler_config
    start_weight_decay, end_weight_decay = weight_decay_ends(optimizer_config, scheduler)
    sizes = {name: getattr(lengths, name) for name in SCHEDULE_LENGTHS}
    if getattr(lengths, "skip_train", False):  # it won't be followed, but Core takes none without a falling part
        sizes["lr_decay_steps"] = max(sizes["lr_decay_steps"], sizes["lr_warmup_steps"] + 1)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=scheduler.lr_warmup_init,
        max_lr=optimizer_config.lr,
        min_lr=optimizer_config.min_lr or 0.0,
        lr_decay_style=scheduler.lr_decay_style,
        start_wd=start_weight_decay,
        end_wd=end_weight_decay,
        wd_incr_style=scheduler.weight_decay_incr_style,
        use_checkpoint_opt_param_scheduler=scheduler.use_checkpoint_opt_param_scheduler,
        override_opt_param_scheduler=scheduler.override_opt_param_scheduler,
        lr_wsd_decay_style=scheduler.lr_wsd_decay_style,
        **sizes,
    )


def describe_optimizer(config: OptimizerConfig, optimizer: Any) -> str:
    """One line for the log: which optimizer runs where, and why."""
    if core_optimizer.USING_PYTORCH_OPTIMIZER:
        kernel = "torch's own kernels (neither Transformer Engine nor Apex is installed)"
    else:
        kernel = f"{core_optimizer.Adam.__module__.split('.')[0]}'s fused kernels"
    what = f"{config.optimizer}, {kernel}"
    hybrids = [found.optimizer for found in find_hybrid_optimizers(optimizer)]
    if hybrids:
        offloaded = sum(param.numel() for hybrid in hybrids for param in hybrid.gpu_params_map_cpu_copy)
        total = sum(param.numel() for hybrid in hybrids for group in hybrid.param_groups for param in group["params"])
        mode = "precision-aware" if config.use_precision_aware_optimizer else "FP32 shards on the device"
        what += f"; offloaded to the CPU: {offloaded / max(total, 1):.0%} of this rank's {total:,} parameters ({mode})"
        streaming = [bucket for one in hybrids if isinstance(one, StreamedStep) for bucket in one.streamed_buckets]
        if streaming:
            streamed = sum(param.numel() for bucket in streaming for param in bucket.params)
            what += f", {streamed / max(offloaded, 1):.0%} of them streamed through the device"
        kept = ["masters as 16-bit rests"] if isinstance(hybrids[0], SplitStep) else []
        kept += [] if formats_of(hybrids[0]).are_fp32 else [str(formats_of(hybrids[0]))]
        what += f"; on the host, {', '.join(kept)}" if kept else ""
    return what


def sync_hybrid_device_optimizer_fp32_master_copies(optimizer: MegatronOptimizer | None) -> bool:
    """Megatron Bridge's public name for `training.checkpointing.sync_hybrid_optimizer_param_copies`.

    Returns:
        Whether anything was refreshed.
    """
    return bool(rebuild_param_copies(optimizer))
