# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Each row of a recipe's table is the model that was published: by its parameters, and by its configuration."""

import dataclasses
from importlib import import_module
from typing import Any

import pytest
import transformers

from megatron.bridge import AutoBridge
from megatron.bridge.peft.lora import LoRA
from megatron.bridge.planning.world import planned_world
from megatron.bridge.recipes import FAMILIES
from megatron.bridge.recipes.table import Layout

SIZES = {
    size: family
    for family in (import_module(f"megatron.bridge.recipes.{name}").FAMILY for name in FAMILIES)
    for size in family.sizes
}

PUBLISHED_PARAMETERS = {
    "deepseek_v2_lite": 15_706_484_224,
    "deepseek_v3": 671_026_419_200,
    "kimi_k2": 1_026_408_232_448,
    "moonlight_16b": 15_960_110_208,
    "gemma3_1b": 999_885_952,
    "gemma3_4b": 3_880_263_168,
    "gemma3_12b": 11_766_034_176,
    "gemma3_27b": 27_009_346_304,
    "gemma4_e2b": 4_628_569_379,
    "gemma4_e4b": 7_463_013_418,
    "gemma4_26b_a4b": 25_233_141_790,
    "gemma4_31b": 30_697_345_340,
    "glm4_9b": 9_400_279_040,
    "glm4_32b": 32_566_081_536,
    "glm45_air_106b": 106_852_251_264,
    "glm45_355b": 352_797_829_024,
    "gpt_oss_20b": 20_914_757_184,
    "gpt_oss_120b": 116_829_156_672,
    "granite33_2b": 2_533_539_840,
    "granite33_8b": 8_170_864_640,
    "granite4_1b": 1_631_750_144,
    "granite4_micro_3b": 3_402_836_480,
    "llama32_1b": 1_235_814_400,
    "llama32_3b": 3_212_749_824,
    "llama3_8b": 8_030_261_248,
    "llama31_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama31_70b": 70_553_706_496,
    "llama31_405b": 405_853_388_800,
    "ministral3_3b": 3_429_006_336,
    "ministral3_8b": 8_489_553_920,
    "olmo2_7b": 7_298_617_344,
    "olmo2_32b": 32_234_279_936,
    "olmo3_7b": 7_298_011_136,
    "olmo3_32b": 32_233_522_176,
    "phi4_mini_3p8b": 3_836_021_760,
    "phi4_14b": 14_659_507_200,
    "qwen25_500m": 494_032_768,
    "qwen25_1p5b": 1_543_714_304,
    "qwen25_7b": 7_615_616_512,
    "qwen25_14b": 14_770_033_664,
    "qwen25_32b": 32_763_876_352,
    "qwen25_72b": 72_706_203_648,
    "qwen3_600m": 596_049_920,
    "qwen3_1p7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "qwen3_14b": 14_768_307_200,
    "qwen3_32b": 32_762_123_264,
    "qwen3_30b_a3b": 30_532_122_624,
    "qwen3_235b_a22b": 235_093_634_560,
    "qwen3_next_80b_a3b": 79_674_391_296,
    "qwen35_text_9b": 8_953_803_264,
    "qwen35_text_27b": 26_895_998_464,
    "qwen35_text_35b_a3b": 34_660_610_688,
    "qwen35_text_122b_a10b": 122_111_526_912,
    "mistral_7b": 7_248_023_552,
    "mixtral_8x7b": 46_702_792_704,
    "seed_oss_36b": 36_151_104_512,
    "smollm2_135m": 134_515_008,
    "smollm2_360m": 361_821_120,
    "smollm2_1p7b": 1_711_376_384,
    "smollm3_3b": 3_075_098_624,
}
"""As the weights' own indexes count them, with the routers' biases; of models with images, the language model's; not
counted: layers that predict further tokens."""


def _llama(layers: int, hidden: int, ffn: int, heads: int, **others: Any) -> Any:
    llama3 = {"vocab_size": 128256, "num_key_value_heads": 8, "rope_theta": 500000.0}
    return transformers.LlamaConfig, (layers, hidden, ffn, heads), {"rms_norm_eps": 1e-5, **llama3, **others}


def _stretched(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _smollm2(layers: int, hidden: int, ffn: int, heads: int, groups: int, *, base: float, std: float) -> Any:
    others = {"vocab_size": 49152, "rope_theta": base, "initializer_range": std, "tie_word_embeddings": True}
    return _llama(layers, hidden, ffn, heads, num_key_value_heads=groups, **others)


def _phi3(layers: int, hidden: int, ffn: int, heads: int, groups: int, **others: Any) -> Any:
    return transformers.Phi3Config, (layers, hidden, ffn, heads), {"num_key_value_heads": groups, **others}


def _granite(hidden: int, ffn: int, *, scores: float, logits: float) -> Any:
    multipliers = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": logits}
    fields = {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e7, "vocab_size": 49159}
    others = {"attention_multiplier": scores, "tie_word_embeddings": True, "max_position_embeddings": 131072}
    return transformers.GraniteConfig, (40, hidden, ffn, 32), {**multipliers, **fields, **others}


def _granite4(hidden: int, ffn: int, heads: int, groups: int, *, scores: float, logits: float) -> Any:
    multipliers = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": logits}
    fields = {"num_key_value_heads": groups, "rms_norm_eps": 1e-5, "rope_theta": 1e7, "vocab_size": 100352}
    others = {"attention_multiplier": scores, "tie_word_embeddings": True, "max_position_embeddings": 131072}
    layers = {"layer_types": ["attention"] * 40, "num_local_experts": 0, "shared_intermediate_size": ffn}
    parts = {**multipliers, **fields, **others, **layers, "position_embedding_type": "rope"}
    return transformers.GraniteMoeHybridConfig, (40, hidden, ffn, heads), parts


def _ministral3(layers: int, hidden: int, ffn: int, *, tie_word_embeddings: bool) -> Any:
    yarn = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384}
    rope = {**yarn, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32.0, "beta_slow": 1.0}
    fields = {"rms_norm_eps": 1e-5, "vocab_size": 131072, "max_position_embeddings": 262144, "head_dim": 128}
    others = {"rope_parameters": {**rope, "llama_4_scaling_beta": 0.1}, "tie_word_embeddings": tie_word_embeddings}
    return transformers.Ministral3Config, (layers, hidden, ffn, 32), {"num_key_value_heads": 8, **fields, **others}


def _olmo(layers: int, hidden: int, ffn: int, heads: int, groups: int, *, version: int) -> Any:
    fields = {"num_key_value_heads": groups, "rms_norm_eps": 1e-6, "rope_theta": 500000}
    if version == 2:
        return transformers.Olmo2Config, (layers, hidden, ffn, heads), {**fields, "vocab_size": 100352}
    yarn = {"rope_type": "yarn", "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0}
    scaling = {**yarn, "attention_factor": 1.2079441541679836, "original_max_position_embeddings": 8192}
    fields |= {"sliding_window": 4096, "rope_scaling": scaling, "max_position_embeddings": 65536}
    return transformers.Olmo3Config, (layers, hidden, ffn, heads), {**fields, "vocab_size": 100278}


def _qwen2(layers: int, hidden: int, ffn: int, heads: int, groups: int, *, eps: float = 1e-6, **others: Any) -> Any:
    fields = {"num_key_value_heads": groups, "rms_norm_eps": eps, "rope_theta": 1e6, "use_sliding_window": False}
    return transformers.Qwen2Config, (layers, hidden, ffn, heads), {**fields, **others}


_QWEN_TIED = {"vocab_size": 151936, "tie_word_embeddings": True}
_QWEN_UNTIED = {"vocab_size": 152064, "tie_word_embeddings": False}


def _qwen3(layers: int, hidden: int, ffn: int, heads: int, *, tied: bool) -> Any:
    fields = {"num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "vocab_size": 151936}
    return transformers.Qwen3Config, (layers, hidden, ffn, heads), {**fields, "tie_word_embeddings": tied}


def _qwen3_moe(layers: int, hidden: int, ffn: int, heads: int, *, expert_ffn: int) -> Any:
    experts = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": expert_ffn}
    fields = {"num_key_value_heads": 4, "head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "vocab_size": 151936}
    others = {"norm_topk_prob": True, "router_aux_loss_coef": 0.001, "tie_word_embeddings": False}
    return transformers.Qwen3MoeConfig, (layers, hidden, ffn, heads), {**experts, **fields, **others}


def _gemma3(layers: int, hidden: int, ffn: int, heads: int = 8, groups: int = 4, **others: Any) -> Any:
    fields = {"num_key_value_heads": groups, "sliding_window": 1024, "vocab_size": 262208, **others}
    return transformers.Gemma3TextConfig, (layers, hidden, ffn, heads), fields


def _gemma4(layers: int, hidden: int, ffn: int, heads: int, groups: int, **others: Any) -> Any:
    fields = {"num_key_value_heads": groups, "sliding_window": 1024, "hidden_size_per_layer_input": 0}
    capped = {"final_logit_softcapping": 30.0, "attention_k_eq_v": True, "max_position_embeddings": 262144}
    return transformers.Gemma4TextConfig, (layers, hidden, ffn, heads), {**fields, **capped, **others}


def _gemma4_small(layers: int, hidden: int, ffn: int, groups: int, *, sliding: int, **others: Any) -> Any:
    kinds = [*["sliding_attention"] * sliding, "full_attention"] * (layers // (sliding + 1))
    fields = {"layer_types": kinds, "hidden_size_per_layer_input": 256, "sliding_window": 512}
    lengths = {"attention_k_eq_v": False, "max_position_embeddings": 131072}
    return _gemma4(layers, hidden, ffn, 8, groups, **{**fields, **lengths, **others})


def _gpt_oss(layers: int, *, experts: int) -> Any:
    rope = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
    scaling = {**rope, "original_max_position_embeddings": 4096}
    fields = {
        "num_local_experts": experts,
        "rope_theta": 150000,
        "rope_scaling": scaling,
        "router_aux_loss_coef": 0.001,
    }
    return transformers.GptOssConfig, (layers, 2880, 2880, 64), fields


def _latent(layers: int, hidden: int, ffn: int, heads: int, **others: Any) -> Any:
    width = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "kv_lora_rank": 512}
    fields = {"num_key_value_heads": heads, "aux_loss_alpha": 0.001, "seq_aux": True, "rms_norm_eps": 1e-6}
    config_class = transformers.DeepseekV2Config if "topk_method" in others else transformers.DeepseekV3Config
    return config_class, (layers, hidden, ffn, heads), {**width, **fields, **others}


def _deepseek_v3(heads: int, **others: Any) -> Any:
    fields = {"q_lora_rank": 1536, "n_shared_experts": 1, "moe_intermediate_size": 2048, "num_experts_per_tok": 8}
    return _latent(61, 7168, 18432, heads, **fields, norm_topk_prob=True, **others)


def _latent_yarn(factor: float, *, weight: float, beta_fast: int) -> dict[str, Any]:
    rope = {"type": "yarn", "factor": factor, "beta_fast": beta_fast, "beta_slow": 1, "mscale": weight}
    return {**rope, "mscale_all_dim": weight, "original_max_position_embeddings": 4096}


def _glm4(layers: int, hidden: int, ffn: int, heads: int, **others: Any) -> Any:
    fields = {"num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 32768, "vocab_size": 151552}
    return transformers.Glm4Config, (layers, hidden, ffn, heads), {**fields, **others}


def _glm45(layers: int, hidden: int, ffn: int, **others: Any) -> Any:
    fields = {"vocab_size": 151552, "attention_bias": True, "n_shared_experts": 1, "num_experts_per_tok": 8}
    shape = {"num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5, "rope_theta": 1e6}
    others |= {"max_position_embeddings": 131072, "partial_rotary_factor": 0.5, "norm_topk_prob": True}
    return transformers.Glm4MoeConfig, (layers, hidden, ffn, 96), {**fields, **shape, **others}


def _delta_net(value_heads: int, groups: int) -> dict[str, Any]:
    return {
        "num_key_value_heads": groups,
        "head_dim": 256,
        "max_position_embeddings": 262144,
        "full_attention_interval": 4,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": value_heads,
    }


def _qwen35(layers: int, hidden: int, ffn: int, heads: int, *, value_heads: int, groups: int, **others: Any) -> Any:
    config_class = transformers.Qwen3_5MoeTextConfig if others else transformers.Qwen3_5TextConfig
    rope = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}
    fields = {**_delta_net(value_heads, groups), "vocab_size": 248320, "rope_parameters": rope}
    return config_class, (layers, hidden, ffn, heads), {**fields, **others}


def _qwen35_moe(layers: int, hidden: int, width: int, heads: int, *, value_heads: int) -> Any:
    experts = {"num_experts": 256, "num_experts_per_tok": 8, "router_aux_loss_coef": 0.001}
    widths = {"moe_intermediate_size": width, "shared_expert_intermediate_size": width}
    return _qwen35(layers, hidden, width, heads, value_heads=value_heads, groups=2, **experts, **widths)


_GEMMA_IMAGES = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}

PUBLISHED_CONFIGS = {
    "deepseek_v2_lite": _latent(
        27,
        2048,
        10944,
        16,
        vocab_size=102400,
        max_position_embeddings=163840,
        q_lora_rank=None,
        n_routed_experts=64,
        n_shared_experts=2,
        num_experts_per_tok=6,
        moe_intermediate_size=1408,
        first_k_dense_replace=1,
        routed_scaling_factor=1.0,
        topk_method="greedy",
        n_group=1,
        topk_group=1,
        norm_topk_prob=False,
        rope_theta=10000,
        rope_scaling=_latent_yarn(40, weight=0.707, beta_fast=32),
    ),
    "deepseek_v3": _deepseek_v3(
        128,
        vocab_size=129280,
        max_position_embeddings=163840,
        n_routed_experts=256,
        first_k_dense_replace=3,
        routed_scaling_factor=2.5,
        n_group=8,
        topk_group=4,
        rope_theta=10000,
        rope_scaling=_latent_yarn(40, weight=1.0, beta_fast=32),
    ),
    "kimi_k2": _deepseek_v3(
        64,
        vocab_size=163840,
        max_position_embeddings=131072,
        n_routed_experts=384,
        first_k_dense_replace=1,
        routed_scaling_factor=2.827,
        n_group=1,
        topk_group=1,
        rope_theta=50000.0,
        rope_scaling=_latent_yarn(32.0, weight=1.0, beta_fast=1),
    ),
    "moonlight_16b": _latent(
        27,
        2048,
        11264,
        16,
        vocab_size=163840,
        max_position_embeddings=8192,
        q_lora_rank=None,
        n_routed_experts=64,
        n_shared_experts=2,
        num_experts_per_tok=6,
        moe_intermediate_size=1408,
        first_k_dense_replace=1,
        routed_scaling_factor=2.446,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        rms_norm_eps=1e-5,
        rope_theta=50000.0,
    ),
    "gemma3_1b": _gemma3(26, 1152, 6912, 4, 1, sliding_window=512, vocab_size=262144),
    "gemma3_4b": _gemma3(34, 2560, 10240, **_GEMMA_IMAGES),
    "gemma3_12b": _gemma3(48, 3840, 15360, 16, 8, **_GEMMA_IMAGES),
    "gemma4_e2b": _gemma4_small(35, 1536, 6144, 1, sliding=4, num_kv_shared_layers=20, use_double_wide_mlp=True),
    "gemma4_e4b": _gemma4_small(42, 2560, 10240, 2, sliding=5, num_kv_shared_layers=18),
    "gemma4_26b_a4b": _gemma4(
        30,
        2816,
        2112,
        16,
        8,
        num_global_key_value_heads=2,
        enable_moe_block=True,
        num_experts=128,
        top_k_experts=8,
        moe_intermediate_size=704,
    ),
    "gemma4_31b": _gemma4(60, 5376, 21504, 32, 16, num_global_key_value_heads=4),
    "gemma3_27b": _gemma3(62, 5376, 21504, 32, 16, head_dim=128, query_pre_attn_scalar=168, **_GEMMA_IMAGES),
    "glm4_9b": _glm4(40, 4096, 13696, 32),
    "glm4_32b": _glm4(61, 6144, 23040, 48, attention_bias=False),
    "glm45_air_106b": _glm45(
        46,
        4096,
        10944,
        n_routed_experts=128,
        moe_intermediate_size=1408,
        first_k_dense_replace=1,
        routed_scaling_factor=1.0,
        use_qk_norm=False,
    ),
    "glm45_355b": _glm45(
        92,
        5120,
        12288,
        n_routed_experts=160,
        moe_intermediate_size=1536,
        first_k_dense_replace=3,
        routed_scaling_factor=2.5,
        use_qk_norm=True,
    ),
    "gpt_oss_20b": _gpt_oss(24, experts=32),
    "gpt_oss_120b": _gpt_oss(36, experts=128),
    "llama32_1b": _llama(16, 2048, 8192, 32, head_dim=64, rope_scaling=_stretched(32.0), tie_word_embeddings=True),
    "llama32_3b": _llama(28, 3072, 8192, 24, head_dim=128, rope_scaling=_stretched(32.0), tie_word_embeddings=True),
    "llama3_8b": _llama(32, 4096, 14336, 32),
    "llama31_8b": _llama(32, 4096, 14336, 32, rope_scaling=_stretched(8.0)),
    "llama3_70b": _llama(80, 8192, 28672, 64),
    "llama31_70b": _llama(80, 8192, 28672, 64, rope_scaling=_stretched(8.0)),
    "llama31_405b": _llama(126, 16384, 53248, 128, rope_scaling=_stretched(8.0)),
    "phi4_mini_3p8b": _phi3(
        32,
        3072,
        8192,
        24,
        8,
        vocab_size=200064,
        tie_word_embeddings=True,
        max_position_embeddings=131072,
        sliding_window=262144,
        partial_rotary_factor=0.75,
        rope_scaling={
            "type": "longrope",
            "short_factor": [1.0] * 48,
            "long_factor": SIZES["phi4_mini_3p8b"].sizes["phi4_mini_3p8b"].fields["longrope_long_factor"],
        },
    ),
    "phi4_14b": _phi3(40, 5120, 17920, 40, 10, vocab_size=100352, max_position_embeddings=16384, rope_theta=250000.0),
    "qwen25_500m": _qwen2(24, 896, 4864, 14, 2, **_QWEN_TIED),
    "qwen25_1p5b": _qwen2(28, 1536, 8960, 12, 2, **_QWEN_TIED),
    "qwen25_7b": _qwen2(28, 3584, 18944, 28, 4, **_QWEN_UNTIED),
    "qwen25_14b": _qwen2(48, 5120, 13824, 40, 8, eps=1e-5, **_QWEN_UNTIED),
    "qwen25_32b": _qwen2(64, 5120, 27648, 40, 8, eps=1e-5, **_QWEN_UNTIED),
    "qwen25_72b": _qwen2(80, 8192, 29568, 64, 8, eps=1e-5, **_QWEN_UNTIED),
    "qwen3_600m": _qwen3(28, 1024, 3072, 16, tied=True),
    "qwen3_1p7b": _qwen3(28, 2048, 6144, 16, tied=True),
    "qwen3_4b": _qwen3(36, 2560, 9728, 32, tied=True),
    "qwen3_8b": _qwen3(36, 4096, 12288, 32, tied=False),
    "qwen3_14b": _qwen3(40, 5120, 17408, 40, tied=False),
    "qwen3_32b": _qwen3(64, 5120, 25600, 64, tied=False),
    "qwen3_30b_a3b": _qwen3_moe(48, 2048, 6144, 32, expert_ffn=768),
    "qwen3_235b_a22b": _qwen3_moe(94, 4096, 12288, 64, expert_ffn=1536),
    "qwen3_next_80b_a3b": (
        transformers.Qwen3NextConfig,
        (48, 2048, 5120, 16),
        {
            **_delta_net(32, 2),
            "vocab_size": 151936,
            "partial_rotary_factor": 0.25,
            "rope_theta": 1e7,
            "num_experts": 512,
            "num_experts_per_tok": 10,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
            "norm_topk_prob": True,
            "router_aux_loss_coef": 0.001,
        },
    ),
    "qwen35_text_9b": _qwen35(32, 4096, 12288, 16, value_heads=32, groups=4),
    "qwen35_text_27b": _qwen35(64, 5120, 17408, 24, value_heads=48, groups=4),
    "qwen35_text_35b_a3b": _qwen35_moe(40, 2048, 512, 16, value_heads=32),
    "qwen35_text_122b_a10b": _qwen35_moe(48, 3072, 1024, 32, value_heads=64),
    "mistral_7b": (
        transformers.MistralConfig,
        (32, 4096, 14336, 32),
        {"vocab_size": 32768, "rope_theta": 1e6, "sliding_window": None, "rms_norm_eps": 1e-5},
    ),
    "mixtral_8x7b": (
        transformers.MixtralConfig,
        (32, 4096, 14336, 32),
        {
            "vocab_size": 32000,
            "rope_theta": 1e6,
            "sliding_window": None,
            "rms_norm_eps": 1e-5,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "router_aux_loss_coef": 0.02,
        },
    ),
    "smollm2_135m": _smollm2(30, 576, 1536, 9, 3, base=100000.0, std=0.041666666666666664),
    "smollm2_360m": _smollm2(32, 960, 2560, 15, 5, base=100000.0, std=0.02),
    "granite33_2b": _granite(2048, 8192, scores=0.015625, logits=8.0),
    "granite33_8b": _granite(4096, 12800, scores=0.0078125, logits=16.0),
    "granite4_1b": _granite4(2048, 4096, 16, 4, scores=0.0078125, logits=8.0),
    "granite4_micro_3b": _granite4(2560, 8192, 40, 8, scores=0.015625, logits=10.0),
    "ministral3_3b": _ministral3(26, 3072, 9216, tie_word_embeddings=True),
    "ministral3_8b": _ministral3(34, 4096, 14336, tie_word_embeddings=False),
    "olmo2_7b": _olmo(32, 4096, 11008, 32, 32, version=2),
    "olmo2_32b": _olmo(64, 5120, 27648, 40, 8, version=2),
    "olmo3_7b": _olmo(32, 4096, 11008, 32, 32, version=3),
    "olmo3_32b": _olmo(64, 5120, 27648, 40, 8, version=3),
    "seed_oss_36b": (
        transformers.SeedOssConfig,
        (64, 5120, 27648, 80),
        {"max_position_embeddings": 524288, "rope_theta": 1e7, "vocab_size": 155136},
    ),
    "smollm3_3b": (
        transformers.SmolLM3Config,
        (36, 2048, 11008, 16),
        {"max_position_embeddings": 65536, "rope_theta": 5000000.0, "vocab_size": 128256},
    ),
    "smollm2_1p7b": _smollm2(24, 2048, 8192, 32, 32, base=130000.0, std=0.02),
}
"""The fields of each published config.json that make its architecture."""

NOT_THE_ARCHITECTURE = {"seq_length", "params_dtype", "pipeline_dtype", "bf16", "fp16", "sequence_parallel"}


EXPERT_RANKS = 8
"""One of them builds its share of the experts, which is faster."""
PATTERNS = ("moe_layer_freq", "linear_attention_freq", "no_rope_freq", "window_attn_skip_freq")
"""The provider's fields that say for each layer which kind it is of."""


def _of_layers(provider: Any, pattern: str) -> list[Any]:
    found = getattr(provider, pattern)
    assert isinstance(found, list) or found in (None, 1), "a list, or the same for all"
    return found if isinstance(found, list) else [found] * provider.num_layers


def _weights_of(module: Any) -> int:
    kept = ("expert_bias", "layer_scalar")  # weights in files
    buffers = [(name, buffer) for name, buffer in module.named_buffers() if name.endswith(kept)]
    return sum(
        weight.numel() * (EXPERT_RANKS if ".experts." in name else 1)
        for name, weight in [*module.named_parameters(), *buffers]
    )


def test_every_size_is_known_here():
    assert set(SIZES) == set(PUBLISHED_PARAMETERS) == set(PUBLISHED_CONFIGS)


def _one_layer_of_each_kind(provider: Any) -> tuple[Any, list[Any], list[Any]]:
    """A smaller model, the kinds of its layers, and those of all layers. Within a world of `EXPERT_RANKS`."""
    if provider.num_moe_experts:
        provider.expert_model_parallel_size = EXPERT_RANKS
    layers = list(zip(*(_of_layers(provider, pattern) for pattern in PATTERNS), strict=True))
    if getattr(provider, "num_kv_shared_layers", 0):  # a layer depends on those before it: all are built
        provider.initialize_model_parallel(create_gloo_process_groups=False)
        (model,) = provider.provide_distributed_model(wrap_with_ddp=False)
        return model, list(range(len(layers))), list(range(len(layers)))
    built = list(dict.fromkeys(layers))
    provider.num_layers = len(built)
    for pattern, values in zip(PATTERNS, zip(*built, strict=True), strict=True):
        if isinstance(getattr(provider, pattern), list):
            setattr(provider, pattern, list(values))
    provider.initialize_model_parallel(create_gloo_process_groups=False)
    (model,) = provider.provide_distributed_model(wrap_with_ddp=False)
    return model, built, layers


@pytest.mark.parametrize("size", sorted(SIZES))
def test_a_size_has_the_published_number_of_parameters(size):
    with planned_world(EXPERT_RANKS):
        model, built, layers = _one_layer_of_each_kind(SIZES[size].build_provider(size, Layout()))
        of_kinds = dict(zip(built, map(_weights_of, model.decoder.layers), strict=True))
        counted = _weights_of(model) - sum(of_kinds.values()) + sum(of_kinds[kind] for kind in layers)
    assert counted == PUBLISHED_PARAMETERS[size] == SIZES[size].sizes[size].parameters


NAMED = sorted(
    size
    for size in SIZES
    if any(kind in SIZES[size].provider for kind in ("deepseek", "glm4_moe", "qwen3_next", "qwen3_5"))
)
"""Those whose adapters aren't put beside LoRA's default targets."""


@pytest.mark.parametrize(
    ("size", "scheme"),
    [(size, "lora") for size in NAMED] + [("glm45_355b", "canonical_lora"), ("deepseek_v3", "canonical_lora")],
)
def test_adapters_are_put_beside_layers_that_the_model_has(size, scheme):
    cfg = SIZES[size].peft(size, scheme)
    for axis in ("tensor_model", "expert_model"):
        setattr(cfg.model, f"{axis}_parallel_size", 1)
    cfg.model.sequence_parallel = False
    with planned_world(EXPERT_RANKS):
        model, built, _ = _one_layer_of_each_kind(cfg.model)
        cfg.peft(model)  # which refuses targets that there aren't
    adapted = {name.split(".")[2] for name in cfg.peft.params_to_save}
    assert adapted == {str(layer) for layer in range(len(built))}
    assert SIZES[size].peft(size, LoRA(target_modules=["linear_proj"])).peft.target_modules == ["linear_proj"]


@pytest.mark.parametrize("size", sorted(SIZES))
def test_a_size_is_what_the_conversion_makes_of_its_configuration(size):
    config_class, (layers, hidden, ffn, heads), others = PUBLISHED_CONFIGS[size]
    shape = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": ffn, "num_attention_heads": heads}
    config = config_class(**shape, **others)
    converted = AutoBridge.from_hf_config(config).to_megatron_provider(load_weights=False)
    of_recipe = SIZES[size].build_provider(size, Layout())
    assert type(of_recipe) is type(converted)
    if of_recipe.moe_layer_freq == 1 and isinstance(converted.moe_layer_freq, list):
        assert set(converted.moe_layer_freq) == {1}
        converted.moe_layer_freq = 1
    differing = {
        field.name: (getattr(of_recipe, field.name), getattr(converted, field.name))
        for field in dataclasses.fields(converted)
        if field.name not in NOT_THE_ARCHITECTURE and getattr(of_recipe, field.name) != getattr(converted, field.name)
    }
    assert differing == {}
