# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Rules on what Core's experts and routers refuse too, but only in the first forward pass, or do without a word."""

import logging

from megatron.bridge.training.config.derived import eval_settings
from megatron.bridge.training.config.sections import RunSections

logger = logging.getLogger(__name__)


def check_experts_train_with_sequence_parallelism(cfg: RunSections, world_size: int) -> None:
    """Core trains experts on tensor-parallel ranks only if these share the sequence; evaluation may do without."""
    model, size = cfg.model, cfg.model.tensor_model_parallel_size
    _, _, skips_training = eval_settings(cfg)
    if model.num_moe_experts and size > 1 and not model.sequence_parallel and not skips_training:
        raise ValueError(
            f"model.sequence_parallel=false with model.tensor_model_parallel_size={size} and "
            f"model.num_moe_experts={model.num_moe_experts}: Core trains experts on tensor-parallel ranks with "
            "sequence parallelism only; set model.sequence_parallel=true"
        )


def check_router_suits_its_balancing(cfg: RunSections, world_size: int) -> None:
    """Sinkhorn's router and the one that balances by quantiles have no loss; they are no part of a list of losses."""
    model = cfg.model
    if not model.num_moe_experts:
        return
    kinds, weights = model.moe_router_load_balancing_type, model.moe_aux_loss_coeff
    for kind in ("sinkhorn", "quantile_balancing"):
        if kind == kinds and weights:
            raise ValueError(
                f"model.moe_router_load_balancing_type={kind} with model.moe_aux_loss_coeff={weights}: it balances "
                "without a loss; set model.moe_aux_loss_coeff=0"
            )
        if isinstance(kinds, list) and kind in kinds:
            raise ValueError(
                f"model.moe_router_load_balancing_type={kinds}: {kind} is a way to route, and Core leaves it out of a "
                f"list of losses without a word; set it alone, with model.moe_aux_loss_coeff=0, or remove it"
            )


def check_weights_on_experts_inputs_are_whole(cfg: RunSections, world_size: int) -> None:
    """Only the weight of a token's one expert can be put on its input in place of the output."""
    model = cfg.model
    if model.num_moe_experts and model.moe_apply_probs_on_input and model.moe_router_topk != 1:
        raise ValueError(
            f"model.moe_apply_probs_on_input=true with model.moe_router_topk={model.moe_router_topk}: it takes one "
            "expert for each token; set model.moe_apply_probs_on_input=false"
        )


def check_tokens_have_enough_experts(cfg: RunSections, world_size: int) -> None:
    """A token goes to different experts, out of groups that have as many."""
    model = cfg.model
    if not model.num_moe_experts:
        return
    if not 1 <= model.moe_router_topk <= model.num_moe_experts:
        raise ValueError(
            f"model.moe_router_topk={model.moe_router_topk} with model.num_moe_experts={model.num_moe_experts}: a "
            "token goes to that many different experts; set a number from 1 to the number of experts"
        )
    groups, taken = model.moe_router_num_groups, model.moe_router_group_topk
    if groups and not taken:
        logger.warning(
            "model.moe_router_num_groups=%s has no effect: without model.moe_router_group_topk a token takes experts "
            "of all groups",
            groups,
        )
        return
    if groups and model.num_moe_experts % groups:
        raise ValueError(
            f"model.moe_router_num_groups={groups} doesn't divide model.num_moe_experts={model.num_moe_experts}: "
            "groups have equally many experts; change model.moe_router_num_groups"
        )
    if groups and model.num_moe_experts // groups * taken < model.moe_router_topk:
        raise ValueError(
            f"model.moe_router_topk={model.moe_router_topk} with {taken} of {groups} groups of "
            f"{model.num_moe_experts // groups} experts: there are not as many in them; raise "
            "model.moe_router_group_topk, or lower model.moe_router_topk"
        )


def check_padded_experts_fit_the_tokens(cfg: RunSections, world_size: int) -> None:
    """An expert can't be padded to more tokens than there are."""
    model = cfg.model
    factor = model.moe_expert_capacity_factor
    if not model.num_moe_experts or not model.moe_pad_expert_input_to_capacity or factor is None:
        return
    most = model.num_moe_experts / model.moe_router_topk
    if factor > most:
        raise ValueError(
            f"model.moe_expert_capacity_factor={factor} with model.moe_pad_expert_input_to_capacity=true gives each "
            f"expert room for more than all tokens, which Core can't pad; lower it to {most:g} or less"
        )


EXPERT_RULES = (
    check_experts_train_with_sequence_parallelism,
    check_router_suits_its_balancing,
    check_tokens_have_enough_experts,
    check_weights_on_experts_inputs_are_whole,
    check_padded_experts_fit_the_tokens,
)
"""Rules on models with experts."""
