# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The GPT-OSS family: experts with biases and a clamped gate, attention with sinks, a window in every other layer.

A sink is a learned number for each head beside the scores of a row: it takes a part of the softmax, and gives nothing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron.core.models.gpt import GPTModel

from megatron.bridge.models.activations import quick_gelu
from megatron.bridge.models.biased_experts import leave_communication_to_dispatcher
from megatron.bridge.models.conversion.expert_stacks import ExpertStack
from megatron.bridge.models.conversion.mapping import split_rows
from megatron.bridge.models.conversion.transformers_config import expect_value
from megatron.bridge.models.decoder import (
    HF_LAYER,
    LAYER,
    NORM_MAPPINGS,
    VOCABULARY_MAPPINGS,
    ExpertsModelProvider,
    attention_mappings,
    decoder_fields,
    expert_fields,
    expert_mappings,
    window_fields,
)
from megatron.bridge.models.families import ModelFamily
from megatron.bridge.models.gpt_provider import PositionEmbeddingType


@dataclass
class GPTOSSModelProvider(ExpertsModelProvider):
    """What all GPT-OSS share."""

    add_bias_linear: bool = True
    activation_func: Callable = quick_gelu
    activation_func_clamp_value: float | None = 7.0
    glu_linear_offset: float = 1.0
    bias_activation_fusion: bool = False  # Core's fused kernel is chosen for its own function alone
    bias_dropout_fusion: bool = False  # not with biases in Transformer Engine's grouped experts
    softmax_type: Literal["vanilla", "off-by-one", "learnable"] = "learnable"
    masked_softmax_fusion: bool = False  # Core's fused kernel knows neither windows nor sinks
    kv_channels: int | None = 64
    num_query_groups: int | None = 8
    seq_length: int = 131_072
    layernorm_epsilon: float = 1e-5
    position_embedding_type: PositionEmbeddingType = "yarn"
    rotary_base: float = 150_000
    yarn_rotary_scaling_factor: float = 32.0
    yarn_original_max_position_embeddings: int = 4096
    yarn_correction_range_round_to_int: bool = False
    num_moe_experts: int | None = 32
    moe_router_topk: int = 4
    expert_tensor_parallel_size: int | None = 1

    def finalize(self) -> None:
        """As for every provider.

        Raises:
            ValueError: Also for ranks that share an expert's matrices.
        """
        if (self.expert_tensor_parallel_size or self.tensor_model_parallel_size) != 1:
            raise ValueError(
                f"model.expert_tensor_parallel_size={self.expert_tensor_parallel_size} (None: as "
                f"model.tensor_model_parallel_size={self.tensor_model_parallel_size}): GPT-OSS's experts have biases, "
                "which Core adds on each rank; set it to 1"
            )
        super().finalize()

    def provide(
        self, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: int | None = None
    ) -> GPTModel:
        """Build one bare chunk. See `GPTModelProvider.provide`."""
        model = super().provide(pre_process, post_process, vp_stage)
        leave_communication_to_dispatcher(model)
        return model


def _provider_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    expect_value(hf, "attention_bias", True)
    expect_value(hf, "swiglu_alpha", 1.702)
    if (hf.get("quantization_config") or {}).get("quant_method") == "mxfp4":
        # Dequantised when it is read, to bf16; published files don't name a dtype.
        hf = {**hf, "quantization_config": None, "dtype": hf.get("dtype") or hf.get("torch_dtype") or "bfloat16"}
    fields = {
        **decoder_fields(hf),
        **window_fields(hf, layer_types=hf["layer_types"]),
        **expert_fields(hf, ffn_hidden_size=hf["intermediate_size"]),
        "activation_func_clamp_value": hf.get("swiglu_limit", 7.0),
    }
    if not hf.get("output_router_logits"):
        del fields["moe_aux_loss_coeff"]  # published files have 0.9, and switch the loss off with that key
    return fields


def _write_own_keys(config: dict[str, Any], trained: Any) -> None:
    """The clamp."""
    config["swiglu_limit"] = trained.activation_func_clamp_value


_MATRICES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj", "router": "router"}
_EXPERT = f"{HF_LAYER}mlp.experts.{{expert}}."
_STACK = f"{HF_LAYER}mlp.experts."

FAMILY = ModelFamily(
    provider_class=GPTOSSModelProvider,
    provider_fields=_provider_fields,
    mappings=(
        *VOCABULARY_MAPPINGS,
        *NORM_MAPPINGS,
        *attention_mappings("weight"),
        *attention_mappings("bias"),
        split_rows(f"{LAYER}self_attention.core_attention.softmax_offset", f"{HF_LAYER}self_attn.sinks"),
        *expert_mappings("mlp", **_MATRICES),
        *expert_mappings("mlp", **_MATRICES, kind="bias"),
    ),
    expert_stacks=(
        ExpertStack(f"{_STACK}gate_up_proj", (f"{_EXPERT}gate_proj.weight", f"{_EXPERT}up_proj.weight")),
        ExpertStack(f"{_STACK}gate_up_proj_bias", (f"{_EXPERT}gate_proj.bias", f"{_EXPERT}up_proj.bias")),
        ExpertStack(f"{_STACK}down_proj", (f"{_EXPERT}down_proj.weight",)),
        ExpertStack(f"{_STACK}down_proj_bias", (f"{_EXPERT}down_proj.bias",)),
    ),
    write_own_keys=_write_own_keys,
)
