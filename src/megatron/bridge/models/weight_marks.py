# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Marks on weights by which Core adds up gradients over ranks and counts each part of them once in their norm."""

import re

from megatron.core import tensor_parallel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule

_CUT_ALONG = {
    tensor_parallel.VocabParallelEmbedding: 0,
    tensor_parallel.ColumnParallelLinear: 0,
    tensor_parallel.RowParallelLinear: 1,
}
"""The axis along which tensor-parallel ranks share a layer's weight."""

_SINKS = "core_attention.softmax_offset"
_EXPERT_OUTPUT_BIAS = re.compile(r"\.experts\..*linear_fc2\.bias\d*$")


def mark_weights(chunk: MegatronModule) -> None:
    """Mark what Core leaves unmarked, or marks as what it isn't.

    - Core 0.16 marks as cut those weights alone that it initializes, and with `perform_initialization=False` it
      initializes none. No Core marks attention's sinks, of which each rank has those of its heads.
    - Core sums the gradients of experts over the ranks that hold the same ones only with expert parallelism. Without,
      it takes those of the other weights, which are others where tensor-parallel sizes of the two differ.
    - Core marks the output bias of an expert for the sum over tensor-parallel ranks that norms need with sequence
      parallelism. But these ranks have other experts, or other tokens of the same whose gradients are summed already.
    """
    for module in chunk.modules():
        axis = next((axis for kind, axis in _CUT_ALONG.items() if isinstance(module, kind)), None)
        weight = getattr(module, "weight", None)
        if axis is not None and weight is not None:
            _mark_cut(weight, axis)
    splits_experts_otherwise = isinstance(chunk, MegatronModule) and _splits_experts_otherwise(chunk.config)
    for name, parameter in chunk.named_parameters():
        # An adapter that all experts of a layer share is no expert's.
        if splits_experts_otherwise and ".experts." in name and ".experts.adapter." not in name:
            parameter.allreduce = False
        if name.endswith(_SINKS):
            _mark_cut(parameter, 0)
        elif _EXPERT_OUTPUT_BIAS.search(name):
            parameter.sequence_parallel = False
            _mark_cut(parameter, 0)


def _splits_experts_otherwise(config: TransformerConfig) -> bool:
    return bool(config.num_moe_experts) and config.expert_tensor_parallel_size != config.tensor_model_parallel_size


def _mark_cut(weight: object, axis: int) -> None:
    if not hasattr(weight, "tensor_model_parallel"):
        tensor_parallel.set_tensor_model_parallel_attributes(weight, True, axis, 1)
