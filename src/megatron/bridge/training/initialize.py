# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Set up what a run needs before its model: device, process groups, seeds, micro-batch calculator."""

import logging

from megatron.core.num_microbatches_calculator import (
    destroy_num_microbatches_calculator,
    init_num_microbatches_calculator,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.rerun_state_machine import RerunMode, destroy_rerun_state_machine, initialize_rerun_state_machine

from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.utils import distributed
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


def initialize_megatron(cfg: ConfigContainer) -> ProcessGroupCollection:
    """Build Megatron-Core's process groups, seed all generators and set up the micro-batch calculator.

    Args:
        cfg: A configuration that `runtime_config_update` has resolved and checked.

    Returns:
        The process groups, by name.

    Raises:
        ValueError: The parallel sizes don't divide the number of processes.
    """
    initialize_distributed(cfg)
    distributed.initialize_model_parallel(
        **parallel_sizes(cfg.model),
        num_distributed_optimizer_instances=cfg.ddp.num_distributed_optimizer_instances,
        distributed_timeout_minutes=cfg.dist.distributed_timeout_minutes,
        create_gloo_process_groups=cfg.dist.use_gloo_process_groups,
    )
    distributed.seed_everything(
        cfg.rng.seed,
        data_parallel_random_init=cfg.rng.data_parallel_random_init,
        te_rng_tracker=cfg.rng.te_rng_tracker,
        inference_rng_tracker=cfg.rng.inference_rng_tracker,
        force_reset_rng=True,
    )
    # Core's optimizer asks the rerun state machine whether to step. Disabled, it always agrees.
    destroy_rerun_state_machine()
    initialize_rerun_state_machine(mode=RerunMode.DISABLED)
    derived = cfg.derive(distributed.world_size())
    destroy_num_microbatches_calculator()
    init_num_microbatches_calculator(
        distributed.rank(),
        None,  # no ramp-up
        derived.global_batch_size,
        derived.micro_batch_size,
        derived.data_parallel_size,
    )
    return ProcessGroupCollection.use_mpu_process_groups()


def destroy_global_state() -> None:
    """Take down what `initialize_megatron` set up, so that another run can follow in this process."""
    destroy_num_microbatches_calculator()
    destroy_rerun_state_machine()
    distributed.destroy_model_parallel()
