# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Set up what a run needs before its model: device, process groups, seeds, micro-batch calculator."""

import logging
from collections.abc import Callable
from typing import Any

from megatron.core.num_microbatches_calculator import (
    destroy_num_microbatches_calculator,
    init_num_microbatches_calculator,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.rerun_state_machine import RerunMode, destroy_rerun_state_machine, initialize_rerun_state_machine

from megatron.bridge.training.config import (
    ConfigContainer,
    DistributedInitConfig,
    GPTModelProvider,
    RerunStateMachineConfig,
    RNGConfig,
)
from megatron.bridge.utils import distributed
from megatron.bridge.utils.arguments import refuse_arguments
from megatron.bridge.utils.core_version import warn_of_an_untested_core
from megatron.bridge.utils.device import choose_device
from megatron.bridge.utils.logging import filter_modules, set_level_of_all, setup_logging
from megatron.bridge.utils.parallel_sizes import parallel_sizes

logger = logging.getLogger(__name__)


def initialize_distributed(cfg: ConfigContainer) -> bool:
    """Enter the configured device and bring up the default process group.

    Returns:
        Whether this call created the process group, and so must destroy it.
    """
    level = logging.INFO if cfg.logger.logging_level is None else cfg.logger.logging_level
    setup_logging(level)
    if cfg.logger.set_level_for_all_loggers:
        set_level_of_all(level)
    filter_modules(cfg.logger.modules_to_filter, warnings=cfg.logger.filter_warnings)
    warn_of_an_untested_core()
    choice = choose_device(cfg.dist.device, cfg.dist.distributed_backend)
    return distributed.init_process_group(choice, cfg.dist.distributed_timeout_minutes)


def initialize_megatron(
    cfg: ConfigContainer,
    allow_no_cuda: bool = False,
    skip_mpu_initialization: bool = False,
    get_embedding_ranks: Callable[..., Any] | None = None,
    get_position_embedding_ranks: Callable[..., Any] | None = None,
    restart_store: Any = None,
) -> ProcessGroupCollection:
    """Build Megatron-Core's process groups, seed all generators and set up the micro-batch calculator.

    Args:
        cfg: A configuration that `runtime_config_update` has resolved and checked.
        allow_no_cuda: Accepted: without a GPU the CPU is used.
        skip_mpu_initialization: Refused.
        get_embedding_ranks: Which ranks of a pipeline hold the embedding, for Core; None: the first and the last.
        get_position_embedding_ranks: Which hold learned positions, for Core; None: the first.
        restart_store: Refused: a restart within the process isn't supported.

    Returns:
        The process groups, by name.

    Raises:
        ValueError: The parallel sizes don't divide the number of processes, or an argument isn't supported.
    """
    initialize_distributed(cfg)
    groups = torch_dist_init(
        cfg.model,
        cfg.dist,
        cfg.rng,
        cfg.train.micro_batch_size,
        cfg.ddp.num_distributed_optimizer_instances,
        get_embedding_ranks,
        get_position_embedding_ranks,
        skip_mpu_initialization,
        restart_store,
    )
    init_rerun_state(cfg.rerun_state_machine)
    derived = cfg.derive(distributed.world_size())
    destroy_num_microbatches_calculator()
    init_num_microbatches_calculator(
        distributed.rank(),
        None,  # no ramp-up
        derived.global_batch_size,
        derived.micro_batch_size,
        derived.data_parallel_size,
    )
    return groups


def torch_dist_init(
    model_config: GPTModelProvider,
    dist_config: DistributedInitConfig,
    rng_config: RNGConfig,
    micro_batch_size: int | None = None,
    num_distributed_optimizer_instances: int = 1,
    get_embedding_ranks: Callable[..., Any] | None = None,
    get_position_embedding_ranks: Callable[..., Any] | None = None,
    skip_mpu_initialization: bool = False,
    restart_store: Any = None,
    use_inprocess_restart: bool = False,
) -> ProcessGroupCollection:
    """Bring up the default process group, if it isn't, and Megatron-Core's; seed all generators.

    Args:
        model_config: Its parallel sizes are the groups'.
        dist_config: Device, backend, timeout.
        rng_config: The seed.
        micro_batch_size: Accepted: nothing is warmed up.
        num_distributed_optimizer_instances: As in `ddp`.
        get_embedding_ranks: As for `initialize_megatron`.
        get_position_embedding_ranks: As for `initialize_megatron`.
        skip_mpu_initialization: Refused.
        restart_store: Refused.
        use_inprocess_restart: Refused.

    Returns:
        The process groups, by name.

    Raises:
        ValueError: The parallel sizes don't divide the number of processes, or an argument isn't supported.
    """
    refuse_arguments(
        skip_mpu_initialization=skip_mpu_initialization,
        restart_store=restart_store,
        use_inprocess_restart=use_inprocess_restart,
    )
    distributed.init_process_group(
        choose_device(dist_config.device, dist_config.distributed_backend), dist_config.distributed_timeout_minutes
    )
    distributed.initialize_model_parallel(
        **parallel_sizes(model_config),
        hierarchical_context_parallel_sizes=model_config.hierarchical_context_parallel_sizes,
        num_distributed_optimizer_instances=num_distributed_optimizer_instances,
        distributed_timeout_minutes=dist_config.distributed_timeout_minutes,
        create_gloo_process_groups=dist_config.use_gloo_process_groups,
        get_embedding_ranks=get_embedding_ranks,
        get_position_embedding_ranks=get_position_embedding_ranks,
    )
    distributed.seed_everything(
        rng_config.seed,
        data_parallel_random_init=rng_config.data_parallel_random_init,
        te_rng_tracker=rng_config.te_rng_tracker,
        inference_rng_tracker=rng_config.inference_rng_tracker,
        force_reset_rng=True,
    )
    return ProcessGroupCollection.use_mpu_process_groups()


def init_rerun_state(rerun_state_machine_config: RerunStateMachineConfig) -> None:
    """Set up Core's rerun state machine, which the optimizer asks whether to step: switched off, it always agrees.

    Raises:
        ValueError: `rerun_mode` asks for another mode.
    """
    mode = getattr(rerun_state_machine_config, "rerun_mode", "disabled")
    if mode != "disabled":
        raise ValueError(f"rerun_state_machine.rerun_mode={mode} is not supported: set it to disabled")
    destroy_rerun_state_machine()
    initialize_rerun_state_machine(mode=RerunMode.DISABLED)


def set_jit_fusion_options(model_config: GPTModelProvider, micro_batch_size: int) -> None:
    """Nothing to set: torch compiles fused functions when they are first called.

    Args:
        model_config: The model.
        micro_batch_size: Rows of a micro-batch.
    """
    logger.debug("fused functions are compiled when they are first called")


def destroy_global_state() -> None:
    """Take down what `initialize_megatron` set up, so that another run can follow in this process."""
    destroy_num_microbatches_calculator()
    destroy_rerun_state_machine()
    distributed.destroy_model_parallel()
