# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A family that a script adds: how its Hugging Face configuration becomes a provider, and its table of weights."""

import abc
import dataclasses
import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, TypeVar

from megatron.core.models.gpt import GPTModel

from megatron.bridge.models.conversion.export import HFWeightTuple
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.transformers_config import config_class_of
from megatron.bridge.models.decoder import DecoderModelProvider, decoder_fields
from megatron.bridge.models.families import ModelFamily, register_family
from megatron.bridge.models.gpt_provider import GPTModelProvider

__all__ = ["HFWeightTuple", "MegatronModelBridge"]

BridgeT = TypeVar("BridgeT", bound="type[MegatronModelBridge]")


class MegatronModelBridge(abc.ABC):
    """Extend it, and register the class with `register_bridge`; `AutoBridge` then converts the architecture."""

    ignored_tensors: tuple[str, ...] = ()
    """Patterns (fnmatch) of tensors that files may hold and the model has no place for."""

    def provider_bridge(self, hf_pretrained: Any) -> GPTModelProvider:
        """The provider of a model. By itself: RMSNorm, rotary positions, a gated SiLU MLP, as most decoders are.

        Args:
            hf_pretrained: Has the model's `config`, transformers' configuration object.

        Raises:
            ValueError: The configuration asks for what that can't express.
        """
        return DecoderModelProvider(**decoder_fields(hf_pretrained.config.to_dict()))

    @abc.abstractmethod
    def mapping_registry(self) -> MegatronMappingRegistry:
        """The weights of the family."""

    @staticmethod
    def make_vocab_size_divisible_by(vocab_size: int) -> int:
        """The highest power of two, up to 128, that divides a vocabulary: what it is padded to as a multiple of."""
        return math.gcd(vocab_size, 128)

    @classmethod
    def register_bridge(
        cls, *, source: type | str, target: type | str = GPTModel, **accepted: Any
    ) -> Callable[[BridgeT], BridgeT]:
        """Decorate a class that extends this one; a second one for an architecture takes the first one's place.

        Args:
            source: transformers' class of the architecture, or its name in `config.json`.
            target: Core's `GPTModel`.
            accepted: `provider` and `model_type`, which `provider_bridge` and the files say.

        Raises:
            ValueError: Another target, or an unknown argument.
        """
        architecture = source if isinstance(source, str) else source.__name__
        named = target if isinstance(target, str) else target.__name__
        if named != "GPTModel":
            raise ValueError(f"target={named} of {architecture} is not supported: expected megatron-core's GPTModel")
        for name in accepted:
            if name not in ("provider", "model_type"):
                raise ValueError(f"register_bridge has no argument {name}: expected source and target")

        def register(bridge_class: BridgeT) -> BridgeT:
            register_family(architecture, family_of_bridge(bridge_class(), architecture))
            return bridge_class

        return register


def family_of_bridge(bridge: MegatronModelBridge, architecture: str) -> ModelFamily:
    """What conversion knows about a family, said by a bridge."""

    def build(hf: Mapping[str, Any]) -> GPTModelProvider:
        config = config_class_of(architecture, hf).from_dict(dict(hf))
        return bridge.provider_bridge(SimpleNamespace(config=config))

    def changed_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
        provider = build(hf)
        fields = [field for field in dataclasses.fields(provider) if field.init]
        return {
            field.name: getattr(provider, field.name)
            for field in fields
            if getattr(provider, field.name) is not field.default
        }

    return ModelFamily(
        provider_class=GPTModelProvider,
        provider_fields=changed_fields,
        mappings=bridge.mapping_registry().weight_mappings(),
        ignored_tensors=bridge.ignored_tensors,
        build_with=build,
    )
