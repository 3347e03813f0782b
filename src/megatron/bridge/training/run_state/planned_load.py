# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Read what a load plan says into model, optimizer, schedule and random states. Masters are the caller's concern."""

import logging
from pathlib import Path
from typing import Any

from megatron.core import mpu

from megatron.bridge.checkpoint.model_checkpoint import load_model_state_dict, load_model_weights, read_in_fp32
from megatron.bridge.checkpoint.sharded_state import load_sharded
from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.training.run_state.content import optimizer_sharded_state, sharding_metadata, weights_to_store
from megatron.bridge.training.run_state.load_plan import LoadPlan, Source
from megatron.bridge.training.run_state.local import read_local
from megatron.bridge.training.run_state.optimizer import advice_on
from megatron.bridge.training.run_state.rng import get_rng_state, restore_rng_state
from megatron.bridge.training.run_state.schedule import load_optimizer

logger = logging.getLogger(__name__)


def load_base_weights(cfg: ConfigContainer, plan: LoadPlan, model: list[Any]) -> None:
    """Load the frozen weights under adapters, before the adapters are added. Call on all ranks.

    Args:
        cfg: A checked configuration with `peft`.
        plan: From `plan_base_on_all_ranks`.
        model: This rank's bare chunks.

    Raises:
        FileNotFoundError, ValueError: As for `load_checkpoint`.
    """
    logger.info("loading the weights under the adapters: %s", plan)
    if plan.source is Source.HUGGING_FACE:
        load_hf_weights(model, plan.path)
    else:
        checkpoint = cfg.checkpoint
        load_model_weights(model, plan.path, strict=checkpoint.dist_ckpt_strictness, verify=checkpoint.verify_integrity)


def load_hf_weights(model: list[Any], path: Path) -> None:
    """Load the weights of a Hugging Face directory into this rank's chunks. Call on all ranks."""
    from megatron.bridge.models.conversion.auto_bridge import AutoBridge

    AutoBridge.from_hf_pretrained(str(path)).load_hf_weights(model)


def load_megatron(
    cfg: ConfigContainer,
    plan: LoadPlan,
    model: list[Any],
    optimizer: Any,
    opt_param_scheduler: Any,
    *,
    strict: bool,
    context: dict[str, Any],
) -> dict[str, Any]:
    """Read the planned parts of a Megatron checkpoint and restore them. Call on all ranks.

    Args:
        cfg: A checked configuration.
        plan: What to restore, and where from.
        model: This rank's chunks.
        optimizer: Built on them, or None.
        opt_param_scheduler: Its schedule, or None.
        strict: Every tensor of the model must be in the checkpoint and fit.
        context: From `init_checkpointing_context`.

    Returns:
        What was read.
    """
    metadata = sharding_metadata(cfg, is_local=plan.source is Source.LOCAL)
    metadata.update((key, plan.content_metadata[key]) for key in metadata.keys() & plan.content_metadata.keys())
    weights = weights_to_store(cfg, model, metadata)
    if cfg.checkpoint.load_main_params_from_ckpt and not plan.optimizer and plan.source is not Source.LOCAL:
        read_in_fp32(weights)
    template = dict(weights)
    with_optimizer = plan.optimizer and optimizer is not None
    if with_optimizer:
        template["optimizer"] = optimizer_sharded_state(optimizer, weights, metadata, is_loading=True)
    if plan.rng:
        template["rng_state"] = get_rng_state(cfg.rng.data_parallel_random_init)
    if plan.source is Source.LOCAL:
        loaded = read_local(context, template, path=plan.path)
    else:
        loaded = load_sharded(
            template,
            plan.path,
            strict=cfg.checkpoint.dist_ckpt_strictness,
            parallel_group=mpu.get_data_parallel_group(with_context_parallel=True)
            if cfg.checkpoint.fully_parallel_load
            else None,
            exchange=cfg.checkpoint.ckpt_fully_parallel_load_exchange_algo,
            check_sharding=cfg.checkpoint.ckpt_load_validate_sharding_integrity,
            verify=cfg.checkpoint.verify_integrity,
            advice=advice_on(model),
        )
    is_wanted = {} if cfg.peft is None else {"is_wanted": cfg.peft.adapter_key_filter}
    load_model_state_dict(model, loaded, strict=strict, **is_wanted)
    if with_optimizer:
        load_optimizer(optimizer, opt_param_scheduler if plan.scheduler else None, loaded, plan.path)
    if plan.rng:
        restore_rng_state(loaded["rng_state"], data_parallel_random_init=cfg.rng.data_parallel_random_init)
    return loaded
