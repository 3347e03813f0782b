# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The Seed-OSS family: a Llama with biases on query, key and value, and with dropout."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron.core.models.gpt import GPTModel

from megatron.bridge.models.decoder import (
    DECODER_MAPPINGS,
    DecoderModelProvider,
    attention_mappings,
    decoder_fields,
    mlp_mappings,
)
from megatron.bridge.models.families import ModelFamily


@dataclass
class SeedOSSModelProvider(DecoderModelProvider):
    """What all Seed-OSS share."""

    add_qkv_bias: bool = True
    num_query_groups: int | None = 8
    kv_channels: int | None = 128
    seq_length: int = 524_288
    layernorm_epsilon: float = 1e-6
    rotary_base: float = 10_000_000
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1

    def provide(
        self, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: int | None = None
    ) -> GPTModel:
        """Build one bare chunk. See `GPTModelProvider.provide`."""
        model = super().provide(pre_process, post_process, vp_stage)
        if model.pre_process:  # Core's dropout is of embeddings too, and Seed-OSS's of attention and MLP alone
            model.embedding.embedding_dropout.p = 0.0
        return model


def _provider_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    biases = {name: hf[name] for name in ("attention_bias", "attention_out_bias", "mlp_bias")}
    has_more = biases["attention_out_bias"] or biases["mlp_bias"]
    if has_more and not all(biases.values()):
        raise ValueError(
            f"config.json: {', '.join(f'{name}={value}' for name, value in biases.items())} is not supported for "
            f"{hf['architectures']}: Core has one switch for the biases of all, and one for query, key and value "
            "alone; need all, those of attention_bias alone, or none"
        )
    return {
        **decoder_fields(hf),
        "hidden_dropout": hf["residual_dropout"],
        "add_qkv_bias": biases["attention_bias"],
        "add_bias_linear": has_more,
    }


FAMILY = ModelFamily(
    provider_class=SeedOSSModelProvider,
    provider_fields=_provider_fields,
    mappings=(*DECODER_MAPPINGS, *attention_mappings("bias"), *mlp_mappings("bias")),
)
