# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What DeepSeek-V2 and V3 have in common: the weights of latent attention and of shared experts."""

from collections.abc import Mapping
from typing import Any

from megatron.bridge.models.biased_router import shared_expert_mappings
from megatron.bridge.models.conversion.mapping import replicated, split_columns, split_rows, split_rows_or_whole
from megatron.bridge.models.decoder import (
    HF_LAYER,
    LAYER,
    NORM_MAPPINGS,
    VOCABULARY_MAPPINGS,
    expert_mappings,
    mlp_mappings,
)


def loss_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The loss that balances the experts' load, as DeepSeek's own files give it; transformers has none."""
    return {
        "moe_router_load_balancing_type": "seq_aux_loss" if hf.get("seq_aux", True) else "aux_loss",
        "moe_aux_loss_coeff": hf.get("aux_loss_alpha") or 0.0,
    }


_ATTENTION, _HF_ATTENTION = f"{LAYER}self_attention.", f"{HF_LAYER}self_attn."
_LATENT_MAPPINGS = (
    split_rows(f"{_ATTENTION}linear_q_proj.weight", f"{_HF_ATTENTION}q_proj.weight"),
    split_rows_or_whole(
        f"{_ATTENTION}linear_q_down_proj.weight",
        f"{_HF_ATTENTION}q_a_proj.weight",
        rows=("q_lora_rank",),
    ),
    split_rows(f"{_ATTENTION}linear_q_up_proj.weight", f"{_HF_ATTENTION}q_b_proj.weight"),
    split_rows_or_whole(
        f"{_ATTENTION}linear_kv_down_proj.weight",
        f"{_HF_ATTENTION}kv_a_proj_with_mqa.weight",
        rows=("kv_lora_rank", "qk_pos_emb_head_dim"),
    ),
    split_rows(f"{_ATTENTION}linear_kv_up_proj.weight", f"{_HF_ATTENTION}kv_b_proj.weight"),
    split_columns(f"{_ATTENTION}linear_proj.weight", f"{_HF_ATTENTION}o_proj.weight"),
    # Core's local layers keep the norms by themselves, Transformer Engine's inside the projection that follows.
    replicated(f"{_ATTENTION}q_layernorm.weight", f"{_HF_ATTENTION}q_a_layernorm.weight"),
    replicated(f"{_ATTENTION}linear_q_up_proj.layer_norm_weight", f"{_HF_ATTENTION}q_a_layernorm.weight"),
    replicated(f"{_ATTENTION}kv_layernorm.weight", f"{_HF_ATTENTION}kv_a_layernorm.weight"),
    replicated(f"{_ATTENTION}linear_kv_up_proj.layer_norm_weight", f"{_HF_ATTENTION}kv_a_layernorm.weight"),
)
DEEPSEEK_MAPPINGS = (
    *VOCABULARY_MAPPINGS,
    *NORM_MAPPINGS,
    *_LATENT_MAPPINGS,
    *mlp_mappings("weight"),  # of the first layers
    *expert_mappings("mlp", gate="gate_proj", up="up_proj", down="down_proj"),
    *shared_expert_mappings("mlp.shared_experts"),
)
