# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The model families that can be converted, by their Hugging Face architecture.

A family is one file: how its Hugging Face configuration becomes provider fields, and a table of weight mappings. To
add one, write the file and name it here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from megatron.bridge.models.conversion.mapping import WeightMapping
from megatron.bridge.models.conversion.text_tower import TEXT_TOWERS
from megatron.bridge.models.conversion.transformers_config import as_read_by_transformers, check_transformers_knows

if TYPE_CHECKING:
    from megatron.bridge.models.conversion.expert_stacks import ExpertStack
    from megatron.bridge.models.gpt_provider import GPTModelProvider

FAMILY_MODULES = {
    "DeepseekV2ForCausalLM": "megatron.bridge.models.deepseek_v2",
    "DeepseekV3ForCausalLM": "megatron.bridge.models.deepseek_v3",
    "Gemma3ForCausalLM": "megatron.bridge.models.gemma3",
    "Gemma3ForConditionalGeneration": "megatron.bridge.models.gemma3",
    "Gemma4ForCausalLM": "megatron.bridge.models.gemma4",
    "Gemma4ForConditionalGeneration": "megatron.bridge.models.gemma4",
    "Glm4ForCausalLM": "megatron.bridge.models.glm4",
    "Glm4MoeForCausalLM": "megatron.bridge.models.glm4_moe",
    "GlmForCausalLM": "megatron.bridge.models.glm",
    "GptOssForCausalLM": "megatron.bridge.models.gpt_oss",
    "GraniteForCausalLM": "megatron.bridge.models.granite",
    "GraniteMoeHybridForCausalLM": "megatron.bridge.models.granite4",
    "LlamaForCausalLM": "megatron.bridge.models.llama",
    "Ministral3ForCausalLM": "megatron.bridge.models.ministral3",
    "Mistral3ForConditionalGeneration": "megatron.bridge.models.ministral3",
    "MistralForCausalLM": "megatron.bridge.models.mistral",
    "MixtralForCausalLM": "megatron.bridge.models.mixtral",
    "Olmo2ForCausalLM": "megatron.bridge.models.olmo2",
    "Olmo3ForCausalLM": "megatron.bridge.models.olmo3",
    "Phi3ForCausalLM": "megatron.bridge.models.phi3",
    "Qwen2ForCausalLM": "megatron.bridge.models.qwen2",
    "Qwen3ForCausalLM": "megatron.bridge.models.qwen3",
    "Qwen3MoeForCausalLM": "megatron.bridge.models.qwen3_moe",
    "Qwen3NextForCausalLM": "megatron.bridge.models.qwen3_next",
    "Qwen3_5ForCausalLM": "megatron.bridge.models.qwen3_5",
    "Qwen3_5ForConditionalGeneration": "megatron.bridge.models.qwen3_5",
    "Qwen3_5MoeForCausalLM": "megatron.bridge.models.qwen3_5_moe",
    "Qwen3_5MoeForConditionalGeneration": "megatron.bridge.models.qwen3_5_moe",
    "SeedOssForCausalLM": "megatron.bridge.models.seed_oss",
    "SmolLM3ForCausalLM": "megatron.bridge.models.smollm3",
}

REFUSED_ARCHITECTURES = {
    "Gemma2ForCausalLM": "soft-capped attention scores and logits",
    "Gemma3nForConditionalGeneration": "embeddings for each layer and layers that share keys and values",
}
"""What Core's layers lack for well-known architectures, for the error."""


@dataclass(frozen=True)
class ModelFamily:
    """Everything conversion knows about a family."""

    provider_class: "type[GPTModelProvider]"
    provider_fields: Callable[[Mapping[str, Any]], dict[str, Any]]
    """Hugging Face configuration, with transformers' defaults -> fields of the provider; raises ValueError for what it
    can't express."""
    mappings: tuple[WeightMapping, ...]
    """Every weight that a model of the family may have; the built model says which ones it does."""
    ignored_tensors: tuple[str, ...] = ()
    """Patterns (fnmatch) of tensors that files may hold and the model has no place for."""
    has_further_layers: bool = False
    """Whether files may hold layers after the last one, which predict further tokens. They are left out."""
    write_own_keys: "Callable[[dict[str, Any], GPTModelProvider], None] | None" = None
    """Writes into a Hugging Face configuration what a trained model of this family has and others don't."""
    expert_stacks: "tuple[ExpertStack, ...]" = ()
    """The tensors of its files that hold all experts of a layer; `mappings` names each expert's by itself."""
    read_stacks: "tuple[ExpertStack, ...]" = ()
    """Such tensors that files may hold, and exports don't: they have the experts one by one."""
    build_with: "Callable[[Mapping[str, Any]], GPTModelProvider] | None" = None
    """Makes the provider of a Hugging Face configuration. None: the class, with its fields."""

    @property
    def stacks_in_files(self) -> "tuple[ExpertStack, ...]":
        """The tensors of all experts of a layer that its files may hold."""
        return (*self.expert_stacks, *self.read_stacks)


_registered: dict[str, ModelFamily] = {}


def register_family(architecture: str, family: ModelFamily) -> None:
    """Let an architecture be converted; a family registered for it goes before one of this package."""
    _registered[architecture] = family


def supported_architectures() -> list[str]:
    """The architectures that can be converted."""
    return sorted({*FAMILY_MODULES, *_registered})


def architecture_of(hf_config: Mapping[str, Any]) -> str | None:
    """The first supported architecture that a Hugging Face configuration names, or None."""
    supported = {*FAMILY_MODULES, *_registered}
    return next((name for name in hf_config.get("architectures") or () if name in supported), None)


def _known_architecture(hf_config: Mapping[str, Any]) -> str:
    found = architecture_of(hf_config)
    assert found is not None, "check_supported refuses what no family is for"
    return found


def check_supported(hf_config: Mapping[str, Any], name: str) -> None:
    """Refuse what no family is for.

    Args:
        hf_config: Content of `config.json`.
        name: What the user called the model.

    Raises:
        ValueError: No architecture that is supported.
    """
    if architecture_of(hf_config) is not None:
        return
    found = hf_config.get("architectures")
    lacking = [f", which needs {REFUSED_ARCHITECTURES[one]}" for one in found or () if one in REFUSED_ARCHITECTURES]
    code = ", and has code of its own (auto_map), which is never run" if hf_config.get("auto_map") else ""
    known = supported_architectures()
    raise ValueError(f"{name} names architectures {found}{''.join(lacking)}{code}: supported are {known}")


def family_of(hf_config: Mapping[str, Any]) -> ModelFamily:
    """The family of a Hugging Face configuration that `architecture_of` knows."""
    architecture = _known_architecture(hf_config)
    return _registered.get(architecture) or import_module(FAMILY_MODULES[architecture]).FAMILY


def _as_read(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers reads, which must know the families of this package."""
    architecture = _known_architecture(hf_config)
    if architecture not in _registered and architecture not in TEXT_TOWERS:  # which config_as_dict has replaced
        check_transformers_knows(architecture, hf_config)
    return as_read_by_transformers(hf_config, architecture)


def provider_fields(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """A Hugging Face configuration in fields of the family's provider.

    Raises:
        ValueError: transformers doesn't read it, or it asks for what can't be expressed.
    """
    return family_of(hf_config).provider_fields(_as_read(hf_config))


def build_provider(hf_config: Mapping[str, Any]) -> "GPTModelProvider":
    """The provider of a Hugging Face configuration.

    Raises:
        ValueError: As for `provider_fields`.
    """
    family = family_of(hf_config)
    if family.build_with is None:
        return family.provider_class(**provider_fields(hf_config))
    return family.build_with(_as_read(hf_config))
