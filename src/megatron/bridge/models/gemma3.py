# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The Gemma 3 family, text: scaled embeddings, norms around attention and MLP, and two kinds of layers.

Five layers with a sliding window and a short rotary base are followed by one that attends to everything.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from megatron.bridge.models.activations import gelu_tanh
from megatron.bridge.models.conversion.mapping import replicated
from megatron.bridge.models.conversion.rope_fields import rope_of_each_kind
from megatron.bridge.models.conversion.transformers_config import expect_value
from megatron.bridge.models.decoder import (
    FINAL_NORM_MAPPING,
    HF_LAYER,
    INPUT_NORM_MAPPINGS,
    LAYER,
    QK_NORM_MAPPINGS,
    VOCABULARY_MAPPINGS,
    DecoderModelProvider,
    attention_mappings,
    decoder_fields,
    mlp_mappings,
    window_fields,
)
from megatron.bridge.models.families import ModelFamily
from megatron.bridge.models.gpt_provider import LayerSpec
from megatron.bridge.models.sandwich_layers import (
    check_positions_of_each_kind,
    give_each_kind_its_positions,
    sandwich_spec,
)


@dataclass
class Gemma3ModelProvider(DecoderModelProvider):
    """What all Gemma 3 share."""

    activation_func: Callable = gelu_tanh
    bias_activation_fusion: bool = False  # Core's fused kernel is chosen for its own GELU alone
    masked_softmax_fusion: bool = False  # Core's fused kernel knows no window
    layernorm_zero_centered_gamma: bool = True
    share_embeddings_and_output_weights: bool = True
    qk_layernorm: bool = True
    kv_channels: int | None = 256
    softmax_scale: float | None = 256**-0.5
    seq_length: int = 131_072
    layernorm_epsilon: float = 1e-6
    rotary_base: float = 1_000_000
    rotary_base_local: float = 10_000
    """Base of the rotary frequencies in layers with a sliding window; `rotary_base` is that of the others."""

    def finalize(self) -> None:
        """As for every provider.

        Raises:
            ValueError: Also for positions that have no base for each kind of layer.
        """
        check_positions_of_each_kind(self, ["rope"])
        super().finalize()

    def provide(
        self, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: int | None = None
    ) -> GPTModel:
        """Build one bare chunk. See `GPTModelProvider.provide`."""
        model = super().provide(pre_process, post_process, vp_stage)
        self._give_positions(model)
        if model.pre_process:
            model.embedding.register_forward_hook(partial(_scaled, factor=self.hidden_size**0.5))
        return model

    def _give_positions(self, model: GPTModel) -> None:
        give_each_kind_its_positions(model, self)

    def _layer_spec(self, vp_stage: int | None) -> LayerSpec:
        return sandwich_spec(super()._layer_spec(vp_stage), self)


def _scaled(embedding: Any, _inputs: Any, output: torch.Tensor, *, factor: float) -> torch.Tensor:
    """The embedding's output times `factor`, which is rounded to the weight's dtype as in transformers."""
    return output * float(torch.tensor(factor, dtype=embedding.word_embeddings.weight.dtype))


def _provider_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    expect_value(hf, "hidden_activation", "gelu_pytorch_tanh")
    expect_value(hf, "attention_bias", False)
    expect_value(hf, "final_logit_softcapping", None)
    expect_value(hf, "attn_logit_softcapping", None)
    if hf.get("use_bidirectional_attention"):
        expect_value(hf, "use_bidirectional_attention", False)
    of_full_layers, local_base = rope_of_each_kind(hf)
    return {
        **decoder_fields(of_full_layers),
        **window_fields(hf, layer_types=hf["layer_types"]),
        "rotary_base_local": local_base,
        "softmax_scale": hf["query_pre_attn_scalar"] ** -0.5,
    }


def _write_own_keys(config: dict[str, Any], trained: Any) -> None:
    """The scale of the scores and the rotary base of sliding layers, in the form that the file has."""
    if trained.softmax_scale:
        config["query_pre_attn_scalar"] = round(trained.softmax_scale**-2)
    if "rope_parameters" not in config:
        config["rope_local_base_freq"] = trained.rotary_base_local
        return
    rope = config["rope_parameters"]
    config["rope_parameters"] = {
        "full_attention": rope.get("full_attention", rope),
        "sliding_attention": {"rope_type": "default", "rope_theta": trained.rotary_base_local},
    }


_BEFORE_MLP = f"{HF_LAYER}pre_feedforward_layernorm.weight"
NORM_MAPPINGS = (
    *INPUT_NORM_MAPPINGS,
    replicated(f"{LAYER}self_attn_bda.norm.weight", f"{HF_LAYER}post_attention_layernorm.weight"),
    replicated(f"{LAYER}pre_mlp_layernorm.weight", _BEFORE_MLP),
    replicated(f"{LAYER}mlp.linear_fc1.layer_norm_weight", _BEFORE_MLP),
    replicated(f"{LAYER}mlp_bda.norm.weight", f"{HF_LAYER}post_feedforward_layernorm.weight"),
    FINAL_NORM_MAPPING,
)

FAMILY = ModelFamily(
    provider_class=Gemma3ModelProvider,
    provider_fields=_provider_fields,
    mappings=(
        *VOCABULARY_MAPPINGS,
        *NORM_MAPPINGS,
        *QK_NORM_MAPPINGS,
        *attention_mappings("weight"),
        *mlp_mappings("weight"),
    ),
    write_own_keys=_write_own_keys,
)
