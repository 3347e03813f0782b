# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Which implementation the transformer layers get: Transformer Engine's or Core's local one, chosen with a reason."""

import dataclasses
import importlib.util
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron.bridge.models.torch_norm import TorchNorm
from megatron.bridge.utils.device import is_simulated

logger = logging.getLogger(__name__)


def has_transformer_engine() -> bool:
    """Whether Transformer Engine is installed."""
    return importlib.util.find_spec("transformer_engine") is not None


def choose_layer_spec(config: TransformerConfig) -> tuple[str, str]:
    """The implementation for this process and the reason: `("local" | "transformer_engine", reason)`."""
    if config.transformer_impl == "local":
        return "local", "model.transformer_impl=local"
    if is_simulated():
        return "local", "Transformer Engine needs a GPU, and the accelerator is simulated"
    if not has_transformer_engine():
        return "local", "Transformer Engine is not installed"
    return "transformer_engine", "Transformer Engine is installed"


def why_local(model: Any) -> str | None:
    """Why the layers that a provider will get are Core's local ones; None if they are others, or not known yet.

    Args:
        model: The provider. What a layer spec of its own has is seen when it is built.
    """
    if model.transformer_layer_spec is local_layer_spec:
        return "model.transformer_layer_spec=local_layer_spec"
    name, reason = choose_layer_spec(model)
    return reason if name == "local" and model.transformer_layer_spec is default_layer_spec else None


def default_layer_spec(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Transformer Engine's layers where they can run, else Core's local layers; logs the choice and the reason.

    Args:
        config: A finalized provider.
        vp_stage: The chunk's virtual pipeline stage; None without virtual pipelining.
    """
    name, reason = choose_layer_spec(config)
    if not vp_stage:
        logger.info("layer spec: %s (%s)", name, reason)
    return (local_layer_spec if name == "local" else transformer_engine_layer_spec)(config, vp_stage)


def transformer_engine_layer_spec(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage on Transformer Engine."""
    return get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)


def local_layer_spec(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage on Core's own modules, with norms that know sequence parallelism."""
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization=config.normalization, vp_stage=vp_stage
    )
    # Apex's fused norm, where it is installed, knows LayerNorm with sequence parallelism, and no RMSNorm.
    replaced = (WrappedTorchNorm, FusedLayerNorm) if config.normalization == "RMSNorm" else (WrappedTorchNorm,)
    replace_norms(block, replaced)
    return block


def mtp_block_spec(config: TransformerConfig, vp_stage: int | None = None) -> None:
    """None: a model has no layers that predict further tokens.

    Raises:
        NotImplementedError: `mtp_num_layers` asks for some.
    """
    if config.mtp_num_layers:
        raise NotImplementedError(
            f"model.mtp_num_layers={config.mtp_num_layers}: layers that predict further tokens aren't built; unset it"
        )


def with_each_layer(block: Any, change: Callable[[ModuleSpec], ModuleSpec]) -> TransformerBlockSubmodules:
    """The spec of a block with each of its layers changed.

    Args:
        block: The spec of Core's local layers, or of Transformer Engine's. It isn't changed.
        change: Gives the new layer for one of its layers.

    Raises:
        ValueError: A spec of another form.
    """
    if not isinstance(block, TransformerBlockSubmodules) or block.layer_specs is None:
        raise ValueError(
            f"model.transformer_layer_spec gives a {type(block).__name__}: this family needs the layers of a block "
            "(TransformerBlockSubmodules), such as local_layer_spec or transformer_engine_layer_spec"
        )
    return dataclasses.replace(block, layer_specs=[change(layer) for layer in block.layer_specs])


def with_attention(layer: ModuleSpec, module: type) -> ModuleSpec:
    """A layer's spec with another class in place of Core's attention, which takes the same arguments.

    Args:
        layer: It isn't changed.
        module: The class.

    Raises:
        ValueError: The layer's attention isn't Core's `SelfAttention`.
    """
    parts = layer.submodules
    given = parts.self_attention
    if given.module is not SelfAttention:
        raise ValueError(f"model.transformer_layer_spec has attention of {given.module}: expected {SelfAttention}")
    attention = dataclasses.replace(given, module=module)
    return dataclasses.replace(layer, submodules=dataclasses.replace(parts, self_attention=attention))


def replace_norms(spec: Any, replaced: tuple[type, ...], norm: type = TorchNorm) -> None:
    """Put `norm` wherever a spec, or a spec inside it, names one of the `replaced` classes. Changes the spec."""
    if isinstance(spec, list):
        for item in spec:
            replace_norms(item, replaced, norm)
    elif isinstance(spec, ModuleSpec):
        replace_norms(spec.submodules, replaced, norm)
    elif isinstance(spec, partial):
        replace_norms(list(spec.keywords.values()), replaced, norm)
    elif dataclasses.is_dataclass(spec) and not isinstance(spec, type):
        for field in dataclasses.fields(spec):
            value = getattr(spec, field.name)
            if any(value is old for old in replaced):
                setattr(spec, field.name, norm)
            else:
                replace_norms(value, replaced, norm)
