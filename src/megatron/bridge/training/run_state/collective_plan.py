# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What all ranks load: the plan, with what each has on its own machine."""

import logging
from collections.abc import Callable
from typing import Any

from megatron.bridge.checkpoint import iterations
from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.training.run_state.load_plan import LoadPlan, plan_base, plan_load, takes_pretrained
from megatron.bridge.training.run_state.local import find_local
from megatron.bridge.training.run_state.order_of_data import warn_of_other_data
from megatron.bridge.utils.distributed import is_rank_0, raise_on_all_ranks
from megatron.bridge.utils.hf_hub import is_hub_name
from megatron.bridge.utils.hf_hub_ranks import find_on_all_ranks

logger = logging.getLogger(__name__)


def plan_on_all_ranks(cfg: ConfigContainer, context: dict[str, Any], *, load_required: bool = False) -> LoadPlan | None:
    """`plan_load` with what the ranks have on their own machines; an error of one is an error of all.

    Args:
        cfg: A checked configuration.
        context: From `init_checkpointing_context`.
        load_required: Finding nothing to load is an error.
    """
    local = find_local(context)
    _find_pretrained(cfg, lambda: takes_pretrained(cfg, local) and cfg.peft is None)
    with raise_on_all_ranks("planning the load"):
        if is_rank_0() and cfg.checkpoint.load is not None:
            for root in (cfg.checkpoint.load, cfg.checkpoint.non_persistent_root(cfg.checkpoint.load)):
                for path in iterations.leftovers(root):
                    logger.warning("%s is passed over: the process that wrote or removed it was killed", path)
                for path in iterations.newer_than_tracker(root):
                    logger.warning("%s is passed over: %s names an earlier one", path, iterations.TRACKER_FILE)
        plan = plan_load(cfg, local, load_required=load_required)
        if plan is not None and plan.train_state and is_rank_0():
            warn_of_other_data(cfg, plan.run_config, plan.path)
        return plan


def plan_base_on_all_ranks(cfg: ConfigContainer) -> LoadPlan | None:
    """`plan_base`; None without adapters. An error of one rank is an error of all."""
    _find_pretrained(cfg, lambda: cfg.peft is not None)
    with raise_on_all_ranks("planning the load"):
        return None if cfg.peft is None else plan_base(cfg)


def _find_pretrained(cfg: ConfigContainer, is_read: Callable[[], bool]) -> None:
    """Fetch the weights that a run starts from, if they are on the hub, so that a plan finds them. Collective."""
    name = cfg.checkpoint.pretrained_checkpoint
    if name is not None:
        find_on_all_ranks(
            lambda: name if is_hub_name(name) and is_read() else None, option="checkpoint.pretrained_checkpoint"
        )
