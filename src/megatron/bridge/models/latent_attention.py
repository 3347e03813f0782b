# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Multi-head latent attention: queries, keys and values that are projected down, normed, and up again.

It is Core's `MLASelfAttention`. Core's own layers lack three things for it: an attention that takes values of another
width than keys, YaRN on a simulated accelerator, and, in later versions, norms of keys and values where queries aren't
projected down. They are here.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import MLATransformerConfig

from megatron.bridge.models.biased_router import BiasedRouterModelProvider
from megatron.bridge.models.gpt_provider import LayerSpec
from megatron.bridge.models.layer_specs import has_transformer_engine
from megatron.bridge.models.rope import YarnRopeScaling, yarn_attention_factor
from megatron.bridge.utils.replaced import replaced
from megatron.bridge.utils.set_fields import writes_that_nobody_set


@dataclass
class MLAModelProvider(BiasedRouterModelProvider, MLATransformerConfig):
    """A decoder with latent attention and experts; `qk_head_dim` channels of a head's query and key don't turn."""

    multi_latent_attention: bool = True
    qk_layernorm: bool = True
    apply_rope_fusion: bool = False
    q_lora_rank: int | None = 1536
    """Channels that queries are projected down to; None: they aren't."""
    rope_type: str = "rope"
    """`rope`, or `yarn` with Core's `rotary_scaling_factor`, `mscale` and the like in place of the yarn_ fields."""
    latent_layernorm_epsilon: float = 1e-6
    """Epsilon of the norms between down and up. It doesn't follow `layernorm_epsilon`."""

    def finalize(self) -> None:
        """As for every provider.

        Raises:
            ValueError: Also for rotary positions that latent attention doesn't have.
        """
        for name, found, needed in (
            ("position_embedding_type", self.position_embedding_type, "rope"),
            ("rope_scaling", self.rope_scaling, False),
            ("seq_len_interpolation_factor", self.seq_len_interpolation_factor, None),
            ("rotary_percent", self.rotary_percent, 1),
        ):
            if found != needed:
                raise ValueError(
                    f"model.{name}={found!r}: latent attention has rotary positions of its own (model.rope_type, "
                    f"model.rotary_scaling_factor); set it to {needed!r}"
                )
        with writes_that_nobody_set(self):
            self.kv_channels = self.v_head_dim
        super().finalize()

    def _layer_spec(self, vp_stage: int | None) -> LayerSpec:
        return latent_spec(super()._layer_spec(vp_stage))


class LatentSelfAttention(MLASelfAttention):
    """Core's latent attention with the norms and the projections that its spec names, as in Core 0.16."""

    def __init__(self, config: MLAModelProvider, *args: Any, **kwargs: Any) -> None:
        scales = config.rope_type == "yarn" and not config.apply_rope_fusion
        # Core 0.16 takes Transformer Engine for installed where its own door to it is.
        rope_type = "rope" if scales else config.rope_type
        has_engine = has_transformer_engine()
        with replaced(multi_latent_attention, HAVE_TE=has_engine), replaced(config, rope_type=rope_type):
            super().__init__(config, *args, **kwargs)
        if scales:
            plain: Any = self.get_submodule("rotary_pos_emb")
            self.rotary_pos_emb = YarnPositions(config, plain)
        for latent, is_projected in (("q", config.q_lora_rank is not None), ("kv", True)):
            self._set_epsilon(latent, config.latent_layernorm_epsilon, needed=is_projected and config.qk_layernorm)

    def _set_epsilon(self, latent: str, epsilon: float, *, needed: bool) -> None:
        # Transformer Engine has a norm within the projection that follows.
        names = (f"{latent}_layernorm", f"linear_{latent}_up_proj")
        parts: list[Any] = [getattr(self, name, None) for name in names]
        norms = [part for part in parts if hasattr(part, "eps")]
        if needed and not norms:
            kinds = " and ".join(f"{name} ({type(part).__name__})" for name, part in zip(names, parts, strict=True))
            raise ValueError(
                f"model.transformer_layer_spec: none of {kinds} is a norm with an eps, so that "
                f"model.latent_layernorm_epsilon={epsilon} has no place: take local_layer_spec or "
                "transformer_engine_layer_spec"
            )
        for norm in norms:
            norm.eps = epsilon

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        parts = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {part: getattr(submodules, part) for part in parts}


class YarnPositions(RotaryEmbedding):
    """YaRN's rotary positions with transformers' bits; Core's own class needs a device.

    Args:
        config: The provider.
        plain: Those of the same channels without scaling.
    """

    def __init__(self, config: MLAModelProvider, plain: RotaryEmbedding) -> None:
        torch.nn.Module.__init__(self)
        self.__dict__.update({name: value for name, value in vars(plain).items() if name not in vars(self)})
        scaling = YarnRopeScaling(
            factor=config.rotary_scaling_factor,
            original_max_position_embeddings=config.original_max_position_embeddings,
            beta_fast=config.beta_fast,
            beta_slow=config.beta_slow,
            round_to_int=config.yarn_correction_range_round_to_int,
        )
        self.inv_freq = scaling.frequencies(config.qk_pos_emb_head_dim, config.rotary_base, plain.inv_freq.device)
        self.factor = yarn_attention_factor(config.rotary_scaling_factor, config.mscale, config.mscale_all_dim)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The angles [S, 1, 1, D], and what cosine and sine are multiplied by. Arguments as for `RotaryEmbedding`."""
        return super().forward(*args, **kwargs), self.factor


class LatentDotProductAttention(DotProductAttention):
    """Core's own attention, which takes any width of queries and keys, with outputs as wide as values.

    Args:
        args: As Core's, and so are `kwargs`.
        k_channels: Channels of a head's query and key.
        v_channels: Channels of a head's value. None: of an attention that Core builds and then replaces.
    """

    def __init__(self, *args: Any, k_channels: int | None = None, v_channels: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if v_channels is not None:
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition


def latent_spec(block: Any) -> TransformerBlockSubmodules:
    """The layers of a block with latent attention that Core's own modules can run.

    Args:
        block: The spec of Core's local layers, or of Transformer Engine's. It isn't changed.

    Raises:
        ValueError: A spec whose layers have another attention.
    """
    layers = block.layer_specs if isinstance(block, TransformerBlockSubmodules) else None
    if layers is None or any(layer.submodules.self_attention.module is not MLASelfAttention for layer in layers):
        raise ValueError(
            f"model.transformer_layer_spec gives a {type(block).__name__} without {MLASelfAttention.__name__} in every "
            "layer: take local_layer_spec or transformer_engine_layer_spec"
        )
    return replace(block, layer_specs=[_latent(layer) for layer in layers])


def _latent(layer: ModuleSpec) -> ModuleSpec:
    attention = layer.submodules.self_attention
    parts = attention.submodules
    if parts.core_attention is DotProductAttention:
        parts = replace(parts, core_attention=LatentDotProductAttention)
    attention = replace(attention, module=LatentSelfAttention, submodules=parts)
    return replace(layer, submodules=replace(layer.submodules, self_attention=attention))
