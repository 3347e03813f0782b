# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Which gradients change after their reduction over data-parallel ranks, and so can't cross to the host right after it.

Core's `finalize_model_grads` reduces all gradients, then sums or averages some over tensor or pipeline ranks, and at
last divides all by the number of tokens. The division is one factor, which the host can repeat; the sums are not.
"""

import functools
import inspect
import re
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.utils import get_model_config, unwrap_model

_KNOWN = {
    "_allreduce_conditional_embedding_grads",
    "_allreduce_router_grads",
    "_allreduce_non_tensor_model_parallel_grads",
    "_allreduce_replicated_grads_over_gtp_remat_group",
    "_allreduce_word_embedding_grads",
    "_allreduce_position_embedding_grads",
    "_update_router_expert_bias",
    "_update_router_qb_beta",
}
"""What Core 0.16.1 to 0.19.2 calls there. The last two change no gradient."""


def reason_to_wait(chunk: Any) -> str | None:
    """Why all gradients of a chunk must be taken after `finalize_model_grads_func`; None if only some must."""
    config = get_model_config(chunk)
    function = getattr(config, "finalize_model_grads_func", None)
    while isinstance(function, functools.partial):
        function = function.func
    if function is not finalize_model_grads:
        return "model.config.finalize_model_grads_func isn't Megatron-Core's"
    if unknown := _unknown_changes():
        return f"this megatron-core's finalize_model_grads calls {unknown}"
    if getattr(config, "gtp_weight_remat_size", 1) > 1 or getattr(config, "expert_gtp_weight_remat_size", 1) > 1:
        return "weights are sharded by generalized tensor parallelism"
    return None


@functools.cache
def _unknown_changes() -> str:
    try:
        source = inspect.getsource(finalize_model_grads)
    except OSError:
        return "what can't be read"
    return ", ".join(sorted(set(re.findall(r"\b(_\w+)\(", source)) - _KNOWN))


def changed_after_reduction(chunk: Any) -> set[torch.Tensor]:
    """The parameters of a chunk whose gradients change after their reduction, by more than a factor for all.

    It may name some that don't.
    """
    module, config = unwrap_model(chunk), get_model_config(chunk)
    has_tensor_ranks = parallel_state.get_tensor_model_parallel_world_size() > 1
    has_pipeline_ranks = parallel_state.get_pipeline_model_parallel_world_size() > 1
    shares_embeddings = getattr(module, "share_embeddings_and_output_weights", True) or bool(
        getattr(config, "mtp_num_layers", None)
    )
    found = set()
    for name, param in module.named_parameters():
        of_tensor_ranks = (
            getattr(param, "average_gradients_across_tp_domain", False)
            or getattr(param, "sequence_parallel", False)
            or "q_layernorm" in name
            or "k_layernorm" in name
        )
        of_pipeline_ranks = (
            getattr(param, "pipeline_parallel", False)
            or getattr(param, "flextron_router_pp_sync", False)
            or "position_embeddings" in name
            or (shares_embeddings and ("word_embeddings" in name or "output_layer" in name))
        )
        is_kept_twice = getattr(param, "main_grad_copy_in_grad_buffer", None) is not None
        has_norm_of_its_own = getattr(param, "grad_norm_group", None) is not None
        if (has_tensor_ranks and of_tensor_ranks) or (has_pipeline_ranks and of_pipeline_ranks):
            found.add(param)
        elif is_kept_twice or has_norm_of_its_own:
            found.add(param)
    return found
