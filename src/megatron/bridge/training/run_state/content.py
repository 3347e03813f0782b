# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The content of a run's checkpoints: which weights, how they are sharded, and all other state.

`checkpointing.py` writes and reads it.
"""

from pathlib import Path
from typing import Any

from megatron.core.num_microbatches_calculator import update_num_microbatches

from megatron.bridge.checkpoint import iterations
from megatron.bridge.checkpoint.model_checkpoint import model_sharded_state_dict, wanted_weights
from megatron.bridge.checkpoint.partial_stacks import split_partial_stacks
from megatron.bridge.checkpoint.safe_pickle import read_blob
from megatron.bridge.peft.base import PEFT
from megatron.bridge.training.config import CheckpointConfig, ConfigContainer
from megatron.bridge.training.run_state.rng import get_rng_state
from megatron.bridge.training.run_state.train_state import TrainState
from megatron.bridge.utils.distributed import raise_on_all_ranks

CHECKPOINT_VERSION = 3.0


def sharding_metadata(cfg: ConfigContainer, *, is_local: bool = False) -> dict[str, Any]:
    """How Core shards the state; saved as `content_metadata`. Local checkpoints never use a reshardable format."""
    fully = cfg.checkpoint.dist_ckpt_optim_fully_reshardable and not is_local
    return _sharding(is_distributed=cfg.ddp.use_distributed_optimizer, fully=fully)


def _sharding(*, is_distributed: bool, fully: bool) -> dict[str, Any]:
    metadata: dict[str, Any] = {"chained_optim_avoid_prefix": True, "singleton_local_shards": False}
    if is_distributed:
        metadata["distrib_optim_sharding_type"] = "fully_reshardable" if fully else "dp_reshardable"
    return metadata


def apply_peft_adapter_filter_to_state_dict(state_dict: dict[str, Any], peft: PEFT) -> dict[str, Any]:
    """A model's sharded state, by chunk key, without frozen weights. Collective.

    Args:
        state_dict: From `model_sharded_state_dict`.
        peft: The adapters; must have been applied to the model.
    """
    return wanted_weights(state_dict, peft.adapter_key_filter)


def weights_to_store(cfg: ConfigContainer, model: list[Any], metadata: dict[str, Any]) -> dict[str, Any]:
    """The part of a model's sharded state that this run saves: the whole model or its adapters. Collective."""
    weights = model_sharded_state_dict(model, metadata)
    return weights if cfg.peft is None else apply_peft_adapter_filter_to_state_dict(weights, cfg.peft)


def optimizer_sharded_state(
    optimizer: Any, weights: dict[str, Any], metadata: dict[str, Any], *, is_loading: bool = False
) -> dict[str, Any]:
    """The optimizer's sharded state, under the names of the trained weights. Collective.

    Args:
        optimizer: Megatron optimizer.
        weights: From `weights_to_store`.
        metadata: From `sharding_metadata`.
        is_loading: Whether the result is a template to load into.
    """
    trained = split_partial_stacks(weights, counts=lambda tensor: tensor.requires_grad)
    return optimizer.sharded_state_dict(trained, is_loading=is_loading, metadata=metadata)


def state_to_save(
    cfg: ConfigContainer,
    model: list[Any],
    optimizer: Any,
    opt_param_scheduler: Any,
    step: int,
    *,
    metadata: dict[str, Any],
) -> dict[str, Any]:
    """The sharded state of a whole checkpoint, except the train state, which has a file of its own.

    Args:
        cfg: A checked configuration, which says what not to save.
        model: This rank's chunks.
        optimizer: Megatron optimizer, or None.
        opt_param_scheduler: Its schedule, or None.
        step: The iteration.
        metadata: From `sharding_metadata`.
    """
    weights = weights_to_store(cfg, model, metadata)
    content: dict[str, Any] = {"checkpoint_version": CHECKPOINT_VERSION, "iteration": step, **weights}
    if cfg.checkpoint.save_optim:
        content |= _optimizer_content(optimizer, opt_param_scheduler, weights, metadata)
    if cfg.checkpoint.save_rng:
        content["rng_state"] = get_rng_state(cfg.rng.data_parallel_random_init)
    return content


def _optimizer_content(
    optimizer: Any, opt_param_scheduler: Any, weights: dict[str, Any], metadata: dict[str, Any], **options: Any
) -> dict[str, Any]:
    if optimizer is None:
        return {}
    content = {"optimizer": optimizer_sharded_state(optimizer, weights, metadata, **options)}
    if opt_param_scheduler is not None:
        content["opt_param_scheduler"] = opt_param_scheduler.state_dict()
    return content


def generate_state_dict(
    ckpt_cfg: CheckpointConfig,
    model: list[Any],
    optimizer: Any,
    opt_param_scheduler: Any,
    rng_state: Any,
    iteration: int | None = None,
    optim_sd_kwargs: dict[str, Any] | None = None,
    model_sd_kwargs: dict[str, Any] | None = None,
    rerun_state: dict[str, Any] | None = None,
    pg_collection: Any = None,
) -> dict[str, Any]:
    """The sharded state of a whole checkpoint, with all weights, as `save_checkpoint(prebuilt_state_dict=)` takes it.

    Args:
        ckpt_cfg: Says what not to save, and in which format the optimizer's state is.
        model: This rank's chunks.
        optimizer: Megatron optimizer, or None.
        opt_param_scheduler: Its schedule, or None.
        rng_state: From `get_rng_state`.
        iteration: The step; None leaves it out.
        optim_sd_kwargs: `is_loading`, whether the result is a template to load into; `metadata`.
        model_sd_kwargs: `metadata`: how Core shards the state.
        rerun_state: Accepted and left out: the rerun state machine is off.
        pg_collection: Accepted: the groups are those of Core's global state.

    Raises:
        ValueError: Another argument for Core's `sharded_state_dict`.
    """
    of_optimizer, of_model = {**(optim_sd_kwargs or {})}, {**(model_sd_kwargs or {})}
    for name in (of_optimizer.keys() - {"is_loading", "metadata"}) | (of_model.keys() - {"metadata"}):
        raise ValueError(
            f"generate_state_dict: {name} is not supported: expected metadata, and the optimizer's is_loading"
        )
    metadata = _sharding(is_distributed=True, fully=ckpt_cfg.dist_ckpt_optim_fully_reshardable)
    metadata |= of_model.get("metadata") or {}
    weights = model_sharded_state_dict(model, metadata)
    content: dict[str, Any] = {"checkpoint_version": CHECKPOINT_VERSION, **weights}
    if iteration is not None:
        content["iteration"] = iteration
    if ckpt_cfg.save_optim:
        metadata = of_optimizer.get("metadata") or metadata
        is_loading = of_optimizer.get("is_loading", False)
        content |= _optimizer_content(optimizer, opt_param_scheduler, weights, metadata, is_loading=is_loading)
    if ckpt_cfg.save_rng:
        content["rng_state"] = rng_state
    return content


def read_train_state(directory: Path) -> dict[str, Any]:
    """Read an iteration's train state on all ranks.

    Raises:
        FileNotFoundError: The checkpoint has no train state: it holds only weights.
    """
    path = directory / iterations.TRAIN_STATE_FILE
    with raise_on_all_ranks(f"reading {path}"):
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing: there is no step to resume from; for the weights alone set "
                "checkpoint.finetune=true, or name the checkpoint in checkpoint.pretrained_checkpoint"
            )
        return read_blob(path)


def restored_train_state(saved: dict[str, Any]) -> TrainState:
    """The checkpoint's train state as a new object, so that no two runs share one."""
    with raise_on_all_ranks("restoring the train state"):
        train_state = TrainState()
        train_state.load_state_dict(saved)
    update_num_microbatches(consumed_samples=train_state.consumed_train_samples, verbose=True)
    return train_state
