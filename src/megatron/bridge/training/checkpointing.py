# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Save and load checkpoints, and the sync that makes a load right under CPU offload.

The rule is that masters follow what was loaded. If optimizer state was loaded, they are restored bit-exact. If only
weights were loaded, they are rebuilt from the weights. What the load did decides (`LoadPlan.optimizer`), not a flag.
"""

import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule

from megatron.bridge.checkpoint.iterations import checkpoint_exists
from megatron.bridge.training.callbacks import CallbackContext, CallbackManager
from megatron.bridge.training.config import CheckpointConfig, ConfigContainer
from megatron.bridge.training.cpu_offload.overlapped_steps import wait_for_weights
from megatron.bridge.training.cpu_offload.param_copies import (
    HybridParamSync,
    check_hybrid_optimizer_param_copies,
    rebuild_param_copies,
)
from megatron.bridge.training.monitoring.finite_steps import check_weights_are_finite
from megatron.bridge.training.run_state.adapters import check_adapted_layers
from megatron.bridge.training.run_state.checkpoint_files import (
    CheckpointType,
    cleanup_old_non_persistent_checkpoint,
    delete_extra_state,
    find_checkpoint_rank_0,
    get_checkpoint_version,
    load_fsdp_dtensor_checkpoint,
    maybe_load_dataloader_state,
    maybe_save_dataloader_state,
    preprocess_fsdp_dtensor_state_dict,
    read_metadata,
    save_fsdp_dtensor_checkpoint,
    save_tokenizer_assets,
    schedule_async_save,
    set_checkpoint_version,
)
from megatron.bridge.training.run_state.collective_plan import plan_base_on_all_ranks, plan_on_all_ranks
from megatron.bridge.training.run_state.content import (
    apply_peft_adapter_filter_to_state_dict,
    generate_state_dict,
    read_train_state,
    restored_train_state,
    sharding_metadata,
    state_to_save,
)
from megatron.bridge.training.run_state.iteration_save import (
    finish_background_save,
    is_empty_async_queue,
    maybe_finalize_async_save,
    remove_abandoned,
    save_iteration,
)
from megatron.bridge.training.run_state.load_plan import LoadPlan, Source
from megatron.bridge.training.run_state.local import (
    open_local_checkpoints,
    read_local_train_state,
    save_local,
)
from megatron.bridge.training.run_state.managers import (
    CheckpointLoadContext,
    CheckpointManager,
    CheckpointSaveContext,
    custom_manager_class,
)
from megatron.bridge.training.run_state.planned_load import load_hf_weights, load_megatron
from megatron.bridge.training.run_state.rng import get_rng_state
from megatron.bridge.training.state import GlobalState
from megatron.bridge.utils.arguments import refuse_arguments, refuse_other_groups
from megatron.bridge.utils.distributed import barrier, raise_on_all_ranks

__all__ = [
    "CheckpointLoadContext",
    "CheckpointManager",
    "CheckpointSaveContext",
    "CheckpointType",
    "DefaultCheckpointManager",
    "HybridParamSync",
    "apply_peft_adapter_filter_to_state_dict",
    "check_hybrid_optimizer_param_copies",
    "checkpoint_exists",
    "cleanup_old_non_persistent_checkpoint",
    "create_checkpoint_manager",
    "delete_extra_state",
    "find_checkpoint_rank_0",
    "finish_background_save",
    "generate_state_dict",
    "get_checkpoint_version",
    "get_rng_state",
    "init_checkpointing_context",
    "is_empty_async_queue",
    "load_checkpoint",
    "load_fsdp_dtensor_checkpoint",
    "maybe_finalize_async_save",
    "maybe_load_dataloader_state",
    "maybe_save_dataloader_state",
    "plan_base_on_all_ranks",
    "plan_on_all_ranks",
    "preprocess_fsdp_dtensor_state_dict",
    "read_metadata",
    "save_checkpoint",
    "save_fsdp_dtensor_checkpoint",
    "save_tokenizer_assets",
    "schedule_async_save",
    "set_checkpoint_version",
    "sync_hybrid_optimizer_param_copies",
]

logger = logging.getLogger(__name__)


def init_checkpointing_context(cfg: CheckpointConfig | ConfigContainer) -> dict[str, Any]:
    """What the saves and loads of a run share: its local checkpoints, if it has any. Call on all ranks.

    Args:
        cfg: The checkpoint's section, or the whole configuration.

    Raises:
        ValueError: `checkpoint.non_persistent_local_ckpt_dir` can't be written.
    """
    return open_local_checkpoints(cfg.checkpoint if isinstance(cfg, ConfigContainer) else cfg)


def save_checkpoint(
    state: GlobalState,
    model: list[MegatronModule],
    optimizer: MegatronOptimizer | None,
    opt_param_scheduler: OptimizerParamScheduler | None,
    num_floating_point_operations_so_far: float = 0,
    checkpointing_context: dict[str, Any] | None = None,
    pipeline_rank: int | None = None,
    tensor_rank: int | None = None,
    non_persistent_ckpt: bool = False,
    train_data_iterator: Any = None,
    preprocess_common_state_dict_fn: Callable | None = None,
    prebuilt_state_dict: dict[str, Any] | None = None,
    pg_collection: ProcessGroupCollection | None = None,
    callback_manager: CallbackManager | None = None,
    module_name: str | None = None,
) -> Path:
    """Write a checkpoint of the current step with all ranks. It is valid only once it is complete on disk.

    With `checkpoint.async_save` this returns as soon as the state is copied, and `finish_background_save` completes the
    save. An earlier save that is still being written is completed first, so there is never more than one.

    Args:
        state: The run; its train state has the step.
        model: This rank's chunks.
        optimizer: Megatron optimizer, or None.
        opt_param_scheduler: Its schedule, or None.
        num_floating_point_operations_so_far: Written into the train state.
        checkpointing_context: From `init_checkpointing_context`; None makes one.
        pipeline_rank: Refused, as `tensor_rank`: all ranks write one checkpoint.
        tensor_rank: Refused.
        non_persistent_ckpt: Write a checkpoint that the next one replaces (`checkpoint.non_persistent_ckpt_type`).
        train_data_iterator: Accepted: which samples come next follows from those consumed.
        preprocess_common_state_dict_fn: Refused: what ranks share is compared as it is.
        prebuilt_state_dict: From `generate_state_dict`, to be written in place of one made here.
        pg_collection: Process groups; those of Core's global state alone are supported.
        callback_manager: Its `on_checkpoint_save` is called once the checkpoint is complete, unless it is written in
            the background or non-persistent.
        module_name: Refused: a run has one model.

    Returns:
        The iteration's directory; for a local checkpoint this rank's file.

    Raises:
        ValueError: `checkpoint.save` is not set or can't be written, or an argument isn't supported.
        FloatingPointError: A weight is NaN or infinite. Nothing is written or removed.
        OSError: This rank can't write. The other ranks raise a RuntimeError with the same text.
    """
    refuse_arguments(
        pipeline_rank=pipeline_rank,
        tensor_rank=tensor_rank,
        preprocess_common_state_dict_fn=preprocess_common_state_dict_fn,
        module_name=module_name,
    )
    refuse_other_groups(pg_collection)
    finish_background_save(state, wait=True)
    cfg = state.cfg
    wait_for_weights(cfg, model, optimizer)
    check_weights_are_finite(model, state.train_state.step)
    context = init_checkpointing_context(cfg) if checkpointing_context is None else checkpointing_context
    state.train_state.floating_point_operations_so_far = num_floating_point_operations_so_far
    step = state.train_state.step
    is_local = non_persistent_ckpt and cfg.checkpoint.non_persistent_ckpt_type == "local"
    metadata = sharding_metadata(cfg, is_local=is_local)
    content = prebuilt_state_dict or state_to_save(cfg, model, optimizer, opt_param_scheduler, step, metadata=metadata)
    if is_local:
        return save_local(
            context,
            content,
            step,
            algorithm=cfg.checkpoint.non_persistent_local_ckpt_algo,
            run_config=cfg.to_dict(),
            train_state=state.train_state.state_dict(),
        )
    between = cfg.checkpoint.non_persistent_root(cfg.checkpoint.save)
    if non_persistent_ckpt:
        return save_iteration(state, content, between, option="checkpoint.non_persistent_global_ckpt_dir", keep=1)
    directory = save_iteration(
        state,
        content,
        cfg.checkpoint.save,
        option="checkpoint.save",
        keep=cfg.checkpoint.most_recent_k or 0,
        afterwards=partial(remove_abandoned, cfg, context, step),
    )
    if callback_manager is not None and state.background_save is None:
        callback_manager.fire("on_checkpoint_save", CallbackContext(state, model, optimizer, opt_param_scheduler))
    return directory


class DefaultCheckpointManager:
    """Saves and loads with `save_checkpoint` and `load_checkpoint`."""

    def __init__(self, checkpoint_config: CheckpointConfig) -> None:
        """Call on all ranks.

        Args:
            checkpoint_config: The run's.
        """
        self.checkpoint_config = checkpoint_config
        self.checkpointing_context = init_checkpointing_context(checkpoint_config)

    def save(self, ctx: CheckpointSaveContext) -> Path:
        """Save the current step; as `save_checkpoint`."""
        return save_checkpoint(
            ctx.state,
            ctx.model,
            ctx.optimizer,
            ctx.opt_param_scheduler,
            ctx.num_floating_point_operations_so_far,
            self.checkpointing_context,
            non_persistent_ckpt=ctx.non_persistent_ckpt,
            train_data_iterator=ctx.train_data_iterator,
        )

    def load(self, ctx: CheckpointLoadContext) -> tuple[int, float]:
        """Load what the configuration asks for; as `load_checkpoint`."""
        return load_checkpoint(
            ctx.state,
            ctx.model,
            ctx.optimizer,
            ctx.opt_param_scheduler,
            ctx.strict,
            self.checkpointing_context,
            ctx.skip_load_to_model_and_opt,
            plan=ctx.plan,
        )

    def finalize_async_saves(self, state: GlobalState, blocking: bool = False, terminate: bool = False) -> None:
        """Complete the save in the background, if all ranks have written; as `maybe_finalize_async_save`."""
        maybe_finalize_async_save(state, self.checkpoint_config, blocking, terminate)


def create_checkpoint_manager(checkpoint_config: CheckpointConfig) -> CheckpointManager:
    """The manager that `checkpoint.custom_manager_class` names, else the default one. Call on all ranks.

    Raises:
        ValueError: There is no such class, or it isn't a manager.
    """
    name = checkpoint_config.custom_manager_class
    return (
        DefaultCheckpointManager(checkpoint_config) if name is None else custom_manager_class(name)(checkpoint_config)
    )


def load_checkpoint(
    state: GlobalState,
    model: list[MegatronModule],
    optimizer: MegatronOptimizer | None,
    opt_param_scheduler: OptimizerParamScheduler | None,
    strict: bool = True,
    checkpointing_context: dict[str, Any] | None = None,
    skip_load_to_model_and_opt: bool = False,
    pg_collection: ProcessGroupCollection | None = None,
    module_name: str | None = None,
    *,
    plan: LoadPlan | None = None,
) -> tuple[int, float]:
    """Load what the configuration asks for, with all ranks, and make the optimizer's masters follow it.

    Args:
        state: The run; a resume replaces its train state.
        model: This rank's chunks.
        optimizer: Megatron optimizer built on them, or None.
        opt_param_scheduler: Its schedule, or None.
        strict: Every tensor of the model must be in the checkpoint and fit.
        checkpointing_context: From `init_checkpointing_context`; None makes one.
        skip_load_to_model_and_opt: Restore the train state alone.
        pg_collection: Process groups; those of Core's global state alone are supported.
        module_name: Refused: a run has one model.
        plan: From `plan_on_all_ranks`, with the same context; None makes one.

    Returns:
        The step and the floating point operations so far; (0, 0) for pretrained weights or nothing to load.

    Raises:
        FileNotFoundError: The configuration names a checkpoint, and there is none.
        ValueError: The checkpoint is incomplete or of another model, or an argument isn't supported.
        RuntimeError: The offloaded optimizer's masters don't match what was loaded.
    """
    refuse_arguments(module_name=module_name)
    refuse_other_groups(pg_collection)
    finish_background_save(state, wait=True)
    wait_for_weights(state.cfg, model, optimizer)
    context = init_checkpointing_context(state.cfg) if checkpointing_context is None else checkpointing_context
    plan = plan_on_all_ranks(state.cfg, context) if plan is None else plan
    if plan is None:
        return 0, 0
    if plan.adapters_only:
        with raise_on_all_ranks("comparing the checkpoint's adapters with the model's"):
            check_adapted_layers(state.cfg, plan.run_config, plan.path)
    started = time.monotonic()
    loaded: dict[str, Any] = {}
    if skip_load_to_model_and_opt:
        optimizer = None
        logger.info("%s: restoring %s", plan.path, "the step alone" if plan.train_state else "nothing")
        if plan.source is Source.LOCAL:
            loaded = {"train_state": read_local_train_state(context, plan.path)}
    elif plan.source is Source.HUGGING_FACE:
        logger.info("loading %s", plan)
        load_hf_weights(model, plan.path)
    else:
        logger.info("loading %s", plan)
        loaded = load_megatron(state.cfg, plan, model, optimizer, opt_param_scheduler, strict=strict, context=context)
    if optimizer is not None:
        bring_masters_in_line(state.cfg, optimizer, restored=plan.optimizer, loaded=loaded)
    if plan.train_state:
        state.train_state = restored_train_state(
            loaded["train_state"] if plan.source is Source.LOCAL else read_train_state(plan.path)
        )
    barrier()
    logger.info("loaded in %.1f s", time.monotonic() - started)
    return state.train_state.step, state.train_state.floating_point_operations_so_far


def sync_hybrid_optimizer_param_copies(
    optimizer: MegatronOptimizer | None, state_dict: Mapping[str, object] | None = None
) -> HybridParamSync:
    """Rebuild every parameter copy that an offloaded optimizer steps on from the model's weights.

    Call it after a load that brought weights but no optimizer state, and after `optimizer.reload_model_params()`,
    which rebuilds the masters of an optimizer that isn't offloaded. Never call it after a load that restored the
    optimizer: its FP32 masters hold bits that the 16-bit weights have lost. Moments, step counters and the loss scale
    don't change, so it can also be called in the middle of a run. It is idempotent and runs no collective.

    Args:
        optimizer: A Megatron optimizer, a chain of them at any depth, a `MimoOptimizer`, or None.
        state_dict: The loaded model state (`{"model": …}`, or `model0`, `model1`, … per chunk; tensors of this rank's
            model-parallel shapes, of any dtype, on any device). The copies then get its values instead of the weights'
            16-bit ones.

    Returns:
        What was refreshed; false if no optimizer is hybrid.

    Raises:
        RuntimeError: Core's internals are not the ones that this function knows. Names the attribute or the parameter.
    """
    return rebuild_param_copies(optimizer, state_dict)


def bring_masters_in_line(
    cfg: ConfigContainer, optimizer: MegatronOptimizer, *, restored: bool, loaded: dict[str, Any]
) -> None:
    """Rebuild the masters from the loaded weights, unless the optimizer's own state was restored.

    Args:
        cfg: A checked configuration.
        optimizer: Over the loaded model.
        restored: Whether the load restored the optimizer's state.
        loaded: What was read; of use with `checkpoint.load_main_params_from_ckpt`.

    Raises:
        RuntimeError: Copies of an offloaded optimizer are not the loaded weights, here or on another rank.
    """
    main_params = loaded if cfg.checkpoint.load_main_params_from_ckpt and not restored else None
    with raise_on_all_ranks("bringing the optimizer's masters in line"):
        if not restored and (cfg.model.fp16 or cfg.model.bf16):
            optimizer.reload_model_params(state_dict=main_params)
        if cfg.optimizer.optimizer_cpu_offload:
            if not restored:  # after the reload, which doesn't refresh offloaded copies
                sync_hybrid_optimizer_param_copies(optimizer, main_params)
            check_hybrid_optimizer_param_copies(optimizer, exact=not restored and main_params is None)
