# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The Gemma 4 family, text: Gemma 3's norms and kinds of layers, with wider heads in layers that attend to everything.

These turn a quarter of each head, and may take their keys as values. Values are normalised, each layer's output is
scaled, and logits are capped. The last layers of E2B and E4B take keys and values of layers before them, and each layer
has an input of its own. 26B-A4B has experts beside each MLP.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from megatron.core.models.gpt import GPTModel

from megatron.bridge.models.conversion.mapping import fused_qkv_of_layer, replicated, split_columns, vocabulary
from megatron.bridge.models.conversion.transformers_config import expect_value
from megatron.bridge.models.decoder import (
    HF_LAYER,
    LAYER,
    QK_NORM_MAPPINGS,
    VOCABULARY_MAPPINGS,
    decoder_fields,
    mlp_mappings,
    window_fields,
)
from megatron.bridge.models.families import ModelFamily
from megatron.bridge.models.gemma3 import NORM_MAPPINGS, Gemma3ModelProvider
from megatron.bridge.models.gemma4_experts import (
    EXPERT_MAPPINGS,
    EXPERT_STACKS,
    check_experts_beside_mlp,
    experts_beside_mlp_spec,
    fields_of_experts,
)
from megatron.bridge.models.gemma4_layers import (
    NormThenAddAndScale,
    RotaryOfEachSize,
    SelfAttentionOfItsSize,
    cap_logits,
)
from megatron.bridge.models.gpt_provider import GPTModelProvider, LayerSpec
from megatron.bridge.models.layer_kinds import LayerKind, kind_of_layer
from megatron.bridge.models.sandwich_layers import rotary_of, sandwich_spec
from megatron.bridge.models.shared_keys import LayerWithContext, ModelWithContext, sources
from megatron.bridge.utils.set_fields import writes_that_nobody_set


@dataclass
class Gemma4ModelProvider(Gemma3ModelProvider):
    """What all Gemma 4 share."""

    layernorm_zero_centered_gamma: bool = False
    softmax_scale: float | None = 1.0
    rotary_percent: float = 0.25
    """Part of the channels of each head that turn, in layers without a sliding window; in the others all do."""
    global_kv_channels: int = 512
    """Channels of a head in layers without a sliding window; `kv_channels` is that of the others."""
    num_global_query_groups: int | None = None
    """Query groups of layers without a sliding window. None: `num_query_groups`, as in the others."""
    values_are_keys: bool = True
    """Whether layers without a sliding window have no value projection: keys, before norm and rotation, are values."""
    final_logit_softcapping: float | None = 30.0
    """What logits are capped at, by a hyperbolic tangent. None: nothing."""
    num_kv_shared_layers: int = 0
    """How many layers, the last ones, take keys and values of the last layer of their kind before them."""
    use_double_wide_mlp: bool = False
    """Whether the MLP of these layers is twice as wide."""
    hidden_size_per_layer_input: int = 0
    """Channels of the input that each layer has of its own. 0: they have none."""
    moe_router_dtype: Literal["fp32", "fp64"] | None = "fp32"
    moe_token_dispatcher_type: Literal["allgather", "alltoall", "flex"] = "alltoall"
    hetereogenous_dist_checkpoint: bool = True  # layers differ in shape, so a checkpoint has each by itself

    def finalize(self) -> None:
        """As for every provider.

        Raises:
            ValueError: Also for query groups that tensor-parallel ranks can't share, and what attention of two sizes
                can't have.
        """
        for name, needed in (
            ("seq_len_interpolation_factor", None),
            ("rope_scaling", False),
            ("fused_single_qkv_rope", False),
            ("attention_output_gate", False),
            ("qk_layernorm", True),
        ):
            if getattr(self, name, needed) != needed:
                raise ValueError(
                    f"model.{name}={getattr(self, name)!r}: Gemma 4's attention isn't built with it; set it to {needed}"
                )
        groups, ranks = self.sizes_of(LayerKind()).num_query_groups, self.tensor_model_parallel_size
        if groups and groups % ranks and ranks % groups:
            raise ValueError(
                f"model.tensor_model_parallel_size={ranks} and {groups} query groups in layers without a window "
                "(model.num_global_query_groups): one must divide the other; change model.tensor_model_parallel_size"
            )
        if self._has_context():
            self._check_context()
        if self.num_moe_experts:
            check_experts_beside_mlp(self)
        super().finalize()

    def _has_context(self) -> bool:
        """Whether layers need more than the layer before them gives."""
        return bool(self.num_kv_shared_layers or self.hidden_size_per_layer_input)

    def _check_context(self) -> None:
        if self.pipeline_model_parallel_size > 1:
            raise ValueError(
                f"model.pipeline_model_parallel_size={self.pipeline_model_parallel_size} with "
                f"model.num_kv_shared_layers={self.num_kv_shared_layers} and model.hidden_size_per_layer_input="
                f"{self.hidden_size_per_layer_input}: layers need the keys, values and inputs that are made on the "
                "first stages, and only the layers' output is sent on; set it to 1, and share the model by "
                "model.tensor_model_parallel_size"
            )
        sources(self)

    def sizes_of(self, kind: LayerKind) -> "Gemma4ModelProvider":
        """See `FamilySizes.sizes_of`."""
        sizes = copy.copy(self)
        with writes_that_nobody_set(sizes):
            if kind.window is not None:
                sizes.values_are_keys = False
            else:
                sizes.kv_channels = self.global_kv_channels
                sizes.num_query_groups = self.num_global_query_groups or self.num_query_groups
            if kind.takes_keys and self.use_double_wide_mlp:
                assert self.ffn_hidden_size is not None, "derived when finalized"
                sizes.ffn_hidden_size = 2 * self.ffn_hidden_size
            projections = 1 if sizes.values_are_keys else 2
            sizes.num_kv_projections = 0 if kind.takes_keys else projections  # type: ignore[misc]
        return sizes

    def takes_keys(self, layer_number: int) -> bool:
        """See `FamilySizes.takes_keys`."""
        assert self.num_layers is not None, "checked when finalized"
        return self.num_layers - self.num_kv_shared_layers < layer_number <= self.num_layers

    def layer_input_channels(self) -> int:
        """See `FamilySizes.layer_input_channels`."""
        return self.hidden_size_per_layer_input

    def heads_by_field(self) -> dict[str, int]:
        """See `FamilySizes.heads_by_field`."""
        of_full = self.num_global_query_groups
        return super().heads_by_field() | ({"num_global_query_groups": of_full} if of_full else {})

    def of_layer(self, layer_number: int) -> "Gemma4ModelProvider":
        """The fields as they are in one layer, counted from 1 over all pipeline stages."""
        return self.sizes_of(kind_of_layer(self, layer_number))

    def provide(
        self, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: int | None = None
    ) -> GPTModel:
        """Build one bare chunk. See `GPTModelProvider.provide`."""
        model = super().provide(pre_process, post_process, vp_stage)
        if model.post_process and self.final_logit_softcapping is not None:
            cap_logits(model.output_layer, self.final_logit_softcapping)
        return model

    def _give_positions(self, model: GPTModel) -> None:
        full = rotary_of(model, self, 1.0, channels=self.global_kv_channels, base=self.rotary_base)
        full.inv_freq[int(self.rotary_percent * self.global_kv_channels // 2) :] = 0  # these channels stay
        sliding = rotary_of(model, self, 1.0, channels=self.kv_channels, base=self.rotary_base_local)
        model.rotary_pos_emb = RotaryOfEachSize(full, sliding)

    def _model_class(self) -> type[GPTModel]:
        return ModelWithContext if self._has_context() else GPTModel

    def _layer_spec(self, vp_stage: int | None) -> LayerSpec:
        block = GPTModelProvider._layer_spec(self, vp_stage)
        if self.num_moe_experts:
            block = experts_beside_mlp_spec(block)
        if not self._has_context():
            return sandwich_spec(block, self, attention=SelfAttentionOfItsSize, after_mlp=NormThenAddAndScale)
        spec = sandwich_spec(block, self, attention=SelfAttentionOfItsSize)
        layers = [
            replace(layer, module=LayerWithContext, params={**layer.params, "norm": spec.layer_norm})
            for layer in spec.layer_specs or ()
        ]
        return replace(spec, layer_specs=layers)


def _provider_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    expect_value(hf, "hidden_activation", "gelu_pytorch_tanh")
    expect_value(hf, "attention_bias", False)
    if hf["hidden_size_per_layer_input"]:
        expect_value(hf, "vocab_size_per_layer_input", hf["vocab_size"])
    if hf["use_bidirectional_attention"] == "all":  # "vision" is about images
        expect_value(hf, "use_bidirectional_attention", None)
    sliding, full = _rotary_parameters(hf)
    of_full = _of_full_layers(hf)
    plain = {"rope_type": "default", "rope_theta": full.get("rope_theta")}  # the part that turns is read here
    fields = {
        **decoder_fields({**hf, "rope_parameters": plain, "per_layer_config": None}),
        **window_fields(hf, layer_types=hf["layer_types"]),
        **fields_of_experts(hf),
        "rotary_percent": full.get("partial_rotary_factor", 1.0),
        "rotary_base_local": sliding["rope_theta"],
        "global_kv_channels": of_full.get("head_dim", hf["head_dim"]),
        "values_are_keys": hf["attention_k_eq_v"],
        "final_logit_softcapping": hf["final_logit_softcapping"],
        "num_kv_shared_layers": hf["num_kv_shared_layers"],
        "use_double_wide_mlp": hf["use_double_wide_mlp"],
        "hidden_size_per_layer_input": hf["hidden_size_per_layer_input"] or 0,
    }
    if "num_key_value_heads" in of_full:
        fields["num_global_query_groups"] = of_full["num_key_value_heads"]
    return fields


def _rotary_parameters(hf: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of sliding layers, and of full ones."""
    rope = hf["rope_parameters"]
    sliding, full = ({**rope[kind]} for kind in ("sliding_attention", "full_attention"))
    for kind, needed in ((sliding, "default"), (full, "proportional")):
        found = kind.get("rope_type", "default"), kind.get("factor") or 1.0
        if found != (needed, 1.0):
            raise ValueError(
                f"config.json: rope_parameters with rope_type={found[0]!r} and factor={found[1]} aren't supported for "
                f"{hf['architectures']}: need default in sliding_attention, proportional in full_attention, no factor"
            )
    return sliding, full


def _of_full_layers(hf: Mapping[str, Any]) -> dict[str, Any]:
    """What differs in layers without a sliding window, all of which must be alike."""
    by_layer = {int(layer): fields for layer, fields in (hf.get("per_layer_config") or {}).items()}
    full = [number for number, kind in enumerate(hf["layer_types"]) if kind == "full_attention"]
    first = dict(by_layer.get(full[0], {}))
    expected = {number: first for number in full} if first else {}
    if by_layer != expected or not {"head_dim", "num_key_value_heads"}.issuperset(first):
        raise ValueError(
            f"config.json: per_layer_config={by_layer} is not supported: need the same head_dim and "
            f"num_key_value_heads in the layers of full_attention, {full}, and nothing in the others"
        )
    return first


def _write_own_keys(config: dict[str, Any], trained: Any) -> None:
    """The cap, and the rotary parameters of each kind of layer."""
    config["final_logit_softcapping"] = trained.final_logit_softcapping
    config["rope_parameters"] = {
        "full_attention": {
            "rope_type": "proportional",
            "partial_rotary_factor": trained.rotary_percent,
            "rope_theta": trained.rotary_base,
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": trained.rotary_base_local},
    }


_ATTENTION = f"{HF_LAYER}self_attn."
FAMILY = ModelFamily(
    provider_class=Gemma4ModelProvider,
    provider_fields=_provider_fields,
    mappings=(
        *VOCABULARY_MAPPINGS,
        *NORM_MAPPINGS,
        *QK_NORM_MAPPINGS,
        fused_qkv_of_layer(
            f"{LAYER}self_attention.linear_qkv.weight",
            q=f"{_ATTENTION}q_proj.weight",
            k=f"{_ATTENTION}k_proj.weight",
            v=f"{_ATTENTION}v_proj.weight",
        ),
        split_columns(f"{LAYER}self_attention.linear_proj.weight", f"{_ATTENTION}o_proj.weight"),
        *mlp_mappings("weight"),
        *EXPERT_MAPPINGS,
        replicated(f"{LAYER}mlp_bda.layer_scalar", f"{HF_LAYER}layer_scalar"),
        replicated(f"{LAYER}layer_scalar", f"{HF_LAYER}layer_scalar"),
        replicated(f"{LAYER}layer_input.gate.weight", f"{HF_LAYER}per_layer_input_gate.weight"),
        replicated(f"{LAYER}layer_input.projection.weight", f"{HF_LAYER}per_layer_projection.weight"),
        replicated(f"{LAYER}layer_input.norm.weight", f"{HF_LAYER}post_per_layer_input_norm.weight"),
        vocabulary("per_layer_inputs.table.weight", "model.embed_tokens_per_layer.weight"),
        replicated("per_layer_inputs.projection.weight", "model.per_layer_model_projection.weight"),
        replicated("per_layer_inputs.norm.weight", "model.per_layer_projection_norm.weight"),
    ),
    expert_stacks=EXPERT_STACKS,
    write_own_keys=_write_own_keys,
)
