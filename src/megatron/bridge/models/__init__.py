# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Floor 3, one of the materials: the model a run trains, and its conversion from and to Hugging Face."""

from importlib import import_module
from typing import Any

_DOORS = {
    "AutoBridge": "megatron.bridge.models.conversion.auto_bridge",
    "DeepSeekV2ModelProvider": "megatron.bridge.models.deepseek_v2",
    "DeepSeekV3ModelProvider": "megatron.bridge.models.deepseek_v3",
    "GLMModelProvider": "megatron.bridge.models.glm",
    "GLM4ModelProvider": "megatron.bridge.models.glm4",
    "GLM45ModelProvider": "megatron.bridge.models.glm4_moe",
    "GPTModelProvider": "megatron.bridge.models.gpt_provider",
    "Gemma3ModelProvider": "megatron.bridge.models.gemma3",
    "Gemma4ModelProvider": "megatron.bridge.models.gemma4",
    "GPTOSSModelProvider": "megatron.bridge.models.gpt_oss",
    "GraniteModelProvider": "megatron.bridge.models.granite",
    "Granite4ModelProvider": "megatron.bridge.models.granite4",
    "LlamaModelProvider": "megatron.bridge.models.llama",
    "Llama3ModelProvider": "megatron.bridge.models.llama",
    "Ministral3ModelProvider": "megatron.bridge.models.ministral3",
    "MistralModelProvider": "megatron.bridge.models.mistral",
    "MixtralModelProvider": "megatron.bridge.models.mixtral",
    "OLMo2ModelProvider": "megatron.bridge.models.olmo2",
    "OLMo3ModelProvider": "megatron.bridge.models.olmo3",
    "Phi3ModelProvider": "megatron.bridge.models.phi3",
    "Qwen2ModelProvider": "megatron.bridge.models.qwen2",
    "Qwen3ModelProvider": "megatron.bridge.models.qwen3",
    "Qwen3MoEModelProvider": "megatron.bridge.models.qwen3_moe",
    "Qwen3NextModelProvider": "megatron.bridge.models.qwen3_next",
    "Qwen35ModelProvider": "megatron.bridge.models.qwen3_5",
    "Qwen35MoEModelProvider": "megatron.bridge.models.qwen3_5_moe",
    "SeedOSSModelProvider": "megatron.bridge.models.seed_oss",
    "SmolLM3ModelProvider": "megatron.bridge.models.smollm3",
}
__all__ = list(_DOORS)


def __getattr__(name: str) -> Any:
    if name not in _DOORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_DOORS[name]), name)
