# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""DeepSeek-V2-Lite, and what a row of V3's table is made of, too."""

from typing import Any

from megatron.bridge.recipes.table import Family, Layout, ModelSize

WHOLE_QUERIES = ("linear_q_proj", "linear_kv_up_proj", "linear_proj")
"""What adapters are put beside. Transformer Engine's layers that project down can't have any."""
LATENT_QUERIES = ("linear_q_up_proj", *WHOLE_QUERIES[1:])
"""The same where queries are projected down, too."""


def latent_shape(
    layers: int, hidden: int, ffn: int, heads: int, *, vocabulary: int, length: int, **others: Any
) -> dict[str, Any]:
    """Sizes of a decoder with latent attention, its heads of DeepSeek's widths."""
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "ffn_hidden_size": ffn,
        "num_attention_heads": heads,
        "num_query_groups": heads,
        "kv_channels": 128,
        "vocab_size": vocabulary,
        "seq_length": length,
        "layernorm_epsilon": 1e-6,
        **others,
    }


def layered_experts(
    layers: int, experts: int, ffn: int, *, shared: int, dense: int, topk: int, scale: float
) -> dict[str, Any]:
    """Experts after the first `dense` layers, and the loss that balances them."""
    return {
        "num_moe_experts": experts,
        "moe_ffn_hidden_size": ffn,
        "moe_shared_expert_intermediate_size": shared * ffn,
        "moe_layer_freq": [int(layer >= dense) for layer in range(layers)],
        "moe_router_topk": topk,
        "moe_router_topk_scaling_factor": scale,
        "moe_aux_loss_coeff": 0.001,
    }


def latent_yarn(factor: float, *, weight: float, beta_fast: float = 32.0) -> dict[str, Any]:
    """YaRN, with one weight for positions and scores."""
    return {
        "rope_type": "yarn",
        "rotary_scaling_factor": factor,
        "beta_fast": beta_fast,
        "mscale": weight,
        "mscale_all_dim": weight,
    }


FAMILY = Family(
    provider="megatron.bridge.models.deepseek_v2.DeepSeekV2ModelProvider",
    sizes={
        "deepseek_v2_lite": ModelSize(
            hf_name="deepseek-ai/DeepSeek-V2-Lite",
            parameters=15_706_484_224,
            fields={
                **latent_shape(27, 2048, 10944, 16, vocabulary=102400, length=163840, q_lora_rank=None),
                **layered_experts(27, 64, 1408, shared=2, dense=1, topk=6, scale=1.0),
                **latent_yarn(40.0, weight=0.707),
            },
            full=Layout(gpus=8, ep=8),
            adapted=WHOLE_QUERIES,
        ),
    },
)
RECIPES = FAMILY.recipes(__name__)
globals().update(RECIPES)
