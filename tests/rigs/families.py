# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The tiny models that stand for each family, the layouts that they are converted at, and the table of both."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron.bridge.utils.parallel_sizes import PARALLEL_SIZES
from tests.unit_tests.models.tiny_llama import LLAMA3_ROPE, SMALL


@dataclass(frozen=True)
class TinyModel:
    """One model of a family, small in every size and odd where the family allows it."""

    architecture: str
    shows: str
    """What of the family it shows."""
    options: dict[str, Any] = field(default_factory=dict)
    """Fields of its Hugging Face configuration that differ from `tiny_llama.SMALL`."""

    has_biased_experts: bool = False
    """Whether its experts have biases, with which Core doesn't share an expert's matrices among ranks."""

    is_stacked: bool = False
    """Whether its files have one tensor for all experts of a layer, as the published ones; transformers reads both."""

    is_on_one_stage: bool = False
    """Whether its layers need more of others than the output of the one before, so that stages can't share them."""

    layouts: tuple[str, ...] | None = None
    """Where it is converted; None: at every layout that it fits. Others of the family show the rest."""

    @property
    def has_experts(self) -> bool:
        return bool(self.options.get("num_experts_per_tok") or self.options.get("top_k_experts"))


_EXPERTS = {"num_experts_per_tok": 2, "head_dim": 8}
_ODD = {"vocab_size": 101}
_TIED = {"tie_word_embeddings": True}
_BIASED = {
    "moe_intermediate_size": 20,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.7,
    "first_k_dense_replace": 1,
}
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
_YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
_GROWING = {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.5}
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 4.0}
_SANDWICH = {"num_hidden_layers": 4, "sliding_window": 7, "query_pre_attn_scalar": 20, "pad_token_id": None}
_TWO_SIZES = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 7,
    "head_dim": 8,
    "hidden_size_per_layer_input": 0,
    "pad_token_id": None,
}
_WITH_CONTEXT = {
    **_TWO_SIZES,
    "global_head_dim": 12,
    "hidden_size_per_layer_input": 6,
    "vocab_size_per_layer_input": 96,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
}
_DELTA_NET = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 10,
    "linear_conv_kernel_dim": 3,
    "eos_token_id": None,
}
_DENSE_HYBRID = {
    "layer_types": ["attention"] * 4,
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "shared_intermediate_size": 40,
    "mamba_n_heads": 4,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.4,
    "logits_scaling": 1.3,
}
_QWEN_EXPERTS = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24}
_QWEN_VISION = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}
_LINEAR_FIRST = ["linear_attention", "linear_attention", "full_attention", "linear_attention"]
MODELS = {
    "gemma3": TinyModel(
        "Gemma3ForCausalLM",
        "sliding layers, two rotary bases, norms around attention and MLP, one query group",
        {**_SANDWICH, **_ODD, "head_dim": 16, "num_key_value_heads": 1, "sliding_window_pattern": 3},
    ),
    "gemma3_images": TinyModel(
        "Gemma3ForConditionalGeneration",
        "the language model out of one that takes images, linear rotary scaling of the full layers",
        {
            "text_config": {
                **SMALL,
                **_SANDWICH,
                "head_dim": 8,
                "sliding_window_pattern": 2,
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
                    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 9000.0},
                },
            },
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_attention_heads": 2,
                "num_hidden_layers": 1,
                "patch_size": 4,
                "image_size": 16,
                "vision_use_head": False,
            },
            "mm_tokens_per_image": 16,
        },
    ),
    "gemma4": TinyModel(
        "Gemma4ForCausalLM",
        "as before, heads of two sizes, keys that are values too, normalised values, capped logits, scaled layers",
        {
            **_TWO_SIZES,
            **_ODD,
            "global_head_dim": 12,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma4_e2b": TinyModel(
        "Gemma4ForCausalLM",
        "as before, inputs of each layer's own, keys and values of layers before, wider MLPs, one query group",
        {
            **_ODD,
            **_WITH_CONTEXT,
            "num_hidden_layers": 6,
            "layer_types": ["full_attention", *["sliding_attention"] * 3, *["full_attention"] * 2],
            "num_kv_shared_layers": 3,
            "num_key_value_heads": 1,
            "initializer_range": 0.1,  # less rounding, of which transformers' own has 2e-4 in FP32 otherwise
            "vocab_size_per_layer_input": _ODD["vocab_size"],
            "final_logit_softcapping": 3.0,
        },
        is_on_one_stage=True,
    ),
    "gemma4_experts": TinyModel(
        "Gemma4ForCausalLM",
        "experts beside an MLP and in one tensor a layer, a router with scales, heads of two sizes, capped logits",
        {
            **_TWO_SIZES,
            **_ODD,
            "global_head_dim": 12,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 16,
            "final_logit_softcapping": 3.0,
        },
        layouts=("one process", "TP2", "TP2 SP", "PP2", "EP2", "TP2 EP2 ETP1"),
    ),
    "gemma4_images": TinyModel(
        "Gemma4ForConditionalGeneration",
        "the language model out of one that takes images, inputs of each layer's own",
        {
            "text_config": {**SMALL, **_TWO_SIZES, **_WITH_CONTEXT, "global_head_dim": 16, "pad_token_id": 0},
            "vision_config": {
                "model_type": "gemma4_vision",
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "num_hidden_layers": 1,
            },
        },
        is_on_one_stage=True,
        layouts=("one process", "TP2"),
    ),
    "deepseek_v2": TinyModel(
        "DeepseekV2ForCausalLM",
        "latent attention with whole queries, groups of experts ranked by their best one, YaRN",
        {
            **_LATENT,
            **_BIASED,
            "q_lora_rank": None,
            "topk_method": "group_limited_greedy",
            "n_routed_experts": 8,
            "num_experts_per_tok": 4,
            "rope_parameters": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        },
    ),
    "deepseek_v3": TinyModel(
        "DeepseekV3ForCausalLM",
        "latent attention, biased router, groups of experts ranked by their best two, YaRN that scales scores too",
        {
            **_LATENT,
            **_BIASED,
            **_ODD,
            "q_lora_rank": 24,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "rms_norm_eps": 1e-2,
            "rope_parameters": {**_YARN, "mscale": 0.9, "mscale_all_dim": 0.5},
        },
    ),
    "glm4_moe": TinyModel(
        "Glm4MoeForCausalLM",
        "half of each head turns, biased router with groups, two shared experts, a dense first layer",
        {
            **_BIASED,
            **_ODD,
            "head_dim": 16,
            "n_routed_experts": 8,
            "num_experts_per_tok": 4,
            "use_qk_norm": True,
            "attention_bias": True,
        },
    ),
    "glm": TinyModel(
        "GlmForCausalLM",
        "neighbouring channels turn in half of each head, gate and up in one tensor, biases on query, key and value",
        {**_ODD, "head_dim": 16, "pad_token_id": None},
        layouts=("TP2",),
    ),
    "glm4": TinyModel(
        "Glm4ForCausalLM",
        "as before, with norms around attention and MLP",
        {**_ODD, "head_dim": 16, "pad_token_id": None, "num_key_value_heads": 1},
        layouts=("TP2 SP", "PP2"),
    ),
    "gpt_oss": TinyModel(
        "GptOssForCausalLM",
        "sinks, sliding layers, experts with biases and a clamped gate in one tensor a layer, YaRN",
        {
            **_EXPERTS,
            **_ODD,
            "num_local_experts": 4,
            "sliding_window": 7,
            "swiglu_limit": 1.5,
            "pad_token_id": None,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "truncate": False,
            },
        },
        has_biased_experts=True,
    ),
    "granite": TinyModel(
        "GraniteForCausalLM",
        "multipliers of embeddings, residuals, scores and logits, tied embeddings, biases",
        {
            **_ODD,
            **_TIED,
            "attention_bias": True,
            "mlp_bias": True,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.4,
            "logits_scaling": 1.3,
        },
        layouts=("TP2 SP", "PP2 VP2"),
    ),
    "granite4": TinyModel(
        "GraniteMoeHybridForCausalLM",
        "as before, without biases, gate and up in one tensor",
        {**_ODD, **_TIED, **_DENSE_HYBRID, "position_embedding_type": "rope"},
        layouts=("TP2 SP",),
    ),
    "granite4_nope": TinyModel(
        "GraniteMoeHybridForCausalLM",
        "no rotary positions, one query group",
        {**_DENSE_HYBRID, "position_embedding_type": None, "num_key_value_heads": 1},
        layouts=("PP2",),
    ),
    "llama": TinyModel("LlamaForCausalLM", "untied embeddings"),
    "llama3": TinyModel("LlamaForCausalLM", "llama3 rotary scaling", {**_ODD, "rope_parameters": LLAMA3_ROPE}),
    "mistral": TinyModel("MistralForCausalLM", "sliding window, wide heads", {"sliding_window": 8, "head_dim": 16}),
    "ministral3": TinyModel(
        "Ministral3ForCausalLM",
        "queries that grow beyond the original length, YaRN, tied embeddings, wide heads, one query group",
        {
            **_ODD,
            **_TIED,
            "pad_token_id": None,
            "head_dim": 16,
            "num_key_value_heads": 1,
            "rope_parameters": {**_YARN, **_GROWING, "original_max_position_embeddings": 8},
        },
        layouts=("TP2 SP", "PP2 VP2"),
    ),
    "ministral3_images": TinyModel(
        "Mistral3ForConditionalGeneration",
        "the language model out of one that takes images, a window",
        {
            "tie_word_embeddings": False,
            "text_config": {
                **SMALL,
                "model_type": "ministral3",
                "head_dim": 8,
                "sliding_window": 9,
                "pad_token_id": None,
                "rope_parameters": {**_YARN, **_GROWING},
            },
            "vision_config": {
                "model_type": "pixtral",
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_attention_heads": 2,
                "head_dim": 8,
                "num_hidden_layers": 1,
                "patch_size": 4,
                "image_size": 16,
            },
        },
        layouts=("one process",),
    ),
    "phi3": TinyModel(
        "Phi3ForCausalLM",
        "fused projections, LongRoPE beyond the original length, three quarters of each head turn, a window",
        {
            **_ODD,
            "pad_token_id": None,
            "sliding_window": 9,
            "original_max_position_embeddings": 16,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 500.0,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.25, 1.5],
                "long_factor": [1.5, 3.0, 7.0],
            },
        },
        layouts=("one process", "TP2 SP", "PP2"),
    ),
    "olmo2": TinyModel(
        "Olmo2ForCausalLM",
        "norms after attention and MLP alone, queries and keys normalised over all heads, tied embeddings",
        {**_ODD, **_TIED, "pad_token_id": None, "eos_token_id": None},
        layouts=("one process", "TP2 SP", "PP2"),
    ),
    "olmo3": TinyModel(
        "Olmo3ForCausalLM",
        "as before, with a window and unscaled positions in some layers, YaRN in the others",
        {
            "pad_token_id": None,
            "eos_token_id": None,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": _YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            },
        },
        layouts=("TP2", "PP2 VP2"),
    ),
    "llama_dynamic": TinyModel(
        "LlamaForCausalLM",
        "dynamic rotary scaling",
        {**_TIED, "max_position_embeddings": 20, "rope_parameters": _DYNAMIC},
        layouts=("TP2 SP", "PP2"),
    ),
    "qwen2": TinyModel("Qwen2ForCausalLM", "biases on query, key and value", {**_ODD, **_TIED}),
    "qwen2_window": TinyModel(
        "Qwen2ForCausalLM",
        "sliding window in some layers",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3": TinyModel("Qwen3ForCausalLM", "query and key norms, one query group", {"num_key_value_heads": 1}),
    "qwen3_next": TinyModel(
        "Qwen3NextForCausalLM",
        "Gated DeltaNet beside gated attention, experts beside a shared one, a layer with an MLP",
        {
            **_EXPERTS,
            **_ODD,
            **_DELTA_NET,
            **_QWEN_EXPERTS,
            "mlp_only_layers": [1],
            "full_attention_interval": 2,
        },
    ),
    "qwen3_5": TinyModel(
        "Qwen3_5ForCausalLM",
        "Gated DeltaNet beside gated attention, tied embeddings, one query group",
        {**_DELTA_NET, **_TIED, "head_dim": 16, "num_key_value_heads": 1, "layer_types": _LINEAR_FIRST},
    ),
    "qwen3_5_images": TinyModel(
        "Qwen3_5ForConditionalGeneration",
        "the language model out of one that takes images",
        {"text_config": {**SMALL, **_DELTA_NET, "full_attention_interval": 4}, "vision_config": _QWEN_VISION},
        layouts=("one process",),
    ),
    "qwen3_5_moe_images": TinyModel(
        "Qwen3_5MoeForConditionalGeneration",
        "the language model out of one that takes images, experts in one tensor a layer",
        {
            "text_config": {**SMALL, **_EXPERTS, **_DELTA_NET, **_QWEN_EXPERTS, "full_attention_interval": 2},
            "vision_config": _QWEN_VISION,
        },
        is_stacked=True,
        layouts=("one process",),
    ),
    "qwen3_5_moe": TinyModel(
        "Qwen3_5MoeForCausalLM",
        "Gated DeltaNet and experts beside a shared one in every layer",
        {
            **_EXPERTS,
            **_ODD,
            **_DELTA_NET,
            **_QWEN_EXPERTS,
            "layer_types": _LINEAR_FIRST,
        },
        layouts=("one process", "TP2 EP2 ETP1"),
    ),
    "seed_oss": TinyModel(
        "SeedOssForCausalLM",
        "biases on query, key and value alone, wide heads, one query group, dropout of attention and MLP",
        {**_ODD, "pad_token_id": None, "head_dim": 16, "num_key_value_heads": 1},
        layouts=("TP2 SP", "PP2"),
    ),
    "smollm3": TinyModel(
        "SmolLM3ForCausalLM",
        "layers without rotary positions, a window in some of them, tied embeddings",
        {
            **_ODD,
            "pad_token_id": None,
            "no_rope_layers": [1, 0, 0, 1],
            "use_sliding_window": True,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "full_attention"],
        },
        layouts=("TP2 SP", "PP2 VP2"),
    ),
    "mixtral": TinyModel("MixtralForCausalLM", "experts", {**_EXPERTS, "num_local_experts": 4}),
    "qwen3_moe": TinyModel(
        "Qwen3MoeForCausalLM",
        "experts, query and key norms",
        {**_EXPERTS, **_ODD, "num_experts": 4, "moe_intermediate_size": 16, "norm_topk_prob": True},
    ),
    "qwen3_moe_mixed": TinyModel(
        "Qwen3MoeForCausalLM",
        "layers with an MLP, weights that don't add up to 1",
        {
            **_EXPERTS,
            "num_experts": 4,
            "moe_intermediate_size": 16,
            "mlp_only_layers": [1],
            "tie_word_embeddings": True,
        },
    ),
}


@dataclass(frozen=True)
class Layout:
    """How processes share a model."""

    num_ranks: int
    sizes: dict[str, Any]
    needs_experts: bool = False

    def fits(self, model: TinyModel) -> bool:
        """Whether a model can be shared so, of those that run on so many processes."""
        shares_an_expert = self.sizes.get("expert_tensor_parallel_size", 1) > 1
        if model.is_on_one_stage and self.sizes.get("pipeline_model_parallel_size", 1) > 1:
            return False
        if self.num_ranks > 2 and model not in [MODELS[name] for name in FOUR_RANKS]:
            return False
        return (model.has_experts or not self.needs_experts) and not (model.has_biased_experts and shares_an_expert)


def _layout(
    num_ranks: int, *, experts: bool = False, sequence: bool = False, dispatcher: str | None = None, **axes: int
) -> Layout:
    sizes: dict[str, Any] = {PARALLEL_SIZES[axis.upper()].field: size for axis, size in axes.items()}
    if sequence:
        sizes["sequence_parallel"] = True
    if dispatcher is not None:
        sizes["moe_token_dispatcher_type"] = dispatcher
    return Layout(num_ranks, sizes, experts)


# Core's all-to-all dispatcher gathers tensors of unequal length among expert-tensor-parallel ranks, which gloo can't.
LAYOUTS = {
    "one process": _layout(1),
    "TP2": _layout(2, tp=2),
    "TP2 SP": _layout(2, tp=2, sequence=True),
    "PP2": _layout(2, pp=2),
    "PP2 VP2": _layout(2, pp=2, vp=2),
    "EP2": _layout(2, experts=True, ep=2),
    "TP2 EP2 ETP1": _layout(2, experts=True, sequence=True, tp=2, ep=2, etp=1),
    "TP1 ETP2": _layout(2, experts=True, etp=2),
    "TP2 PP2": _layout(4, sequence=True, tp=2, pp=2),
    "TP2 EP2 ETP2": _layout(4, experts=True, sequence=True, tp=2, ep=2, dispatcher="allgather"),
    "PP2 EP2": _layout(4, experts=True, pp=2, ep=2),
}
FOUR_RANKS = ("qwen3", "qwen3_moe")
"""The models that run on four processes too."""
CELLS = [
    (model, layout)
    for model, of in MODELS.items()
    for layout, at in LAYOUTS.items()
    if at.fits(of) and (of.layouts is None or layout in of.layouts)
]


def table(trained: Mapping[str, str], adapted: Mapping[str, str]) -> str:
    """The cells as the table of docs/models.md.

    Args:
        trained: By model, where it is trained with offload and without.
        adapted: By model, which adapters are exported for peft.
    """
    lines = [
        "| family | shown by the model | logits and round trip at | trained, with offload as without, at | adapters |",
        "|---|---|---|---|---|",
    ]
    for name, model in MODELS.items():
        layouts = ", ".join(layout for of, layout in CELLS if of == name)
        more = f"{trained.get(name, '')} | {adapted.get(name, '')}"
        lines.append(f"| `{model.architecture}` | {model.shows} | {layouts} | {more} |")
    return "\n".join(lines) + "\n"
