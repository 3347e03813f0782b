# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A built model seen as a list of conversion tasks: each weight of this rank with its place and its mapping."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import unwrap_model

from megatron.bridge.models.conversion.mapping import Segment, WeightMapping, hf_lengths
from megatron.bridge.models.expert_bias import EXPERT_BIAS
from megatron.bridge.models.families import ModelFamily

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"(?<=\.experts\.)(local_experts\.|linear_fc[12]\.(?:weight|bias))(\d+)")
_EMBEDDING = "embedding.word_embeddings.weight"
_OUTPUT = "output_layer.weight"
_BUFFERS = (EXPERT_BIAS, "layer_scalar")
"""What the names of buffers end with that are weights in files: a router's bias, and a layer's scale."""


@dataclass(frozen=True)
class WeightPlace:
    """One Megatron weight as every rank knows it, whether or not it holds it."""

    mapping: WeightMapping
    local_shape: tuple[int, ...]
    """Shape on each tensor-parallel rank."""
    dtype: torch.dtype
    owner: int
    """Global rank of a process that holds it, or its tensor-parallel shard of it."""
    is_copy: bool
    """A second copy of the tied embedding, on the last pipeline stage: loaded, never exported."""

    def full_length(self, config: TransformerConfig) -> int:
        """Length along the split axis over all the ranks that share the weight."""
        if self.mapping.dim is None:
            return self.local_shape[0]
        return self.local_shape[self.mapping.dim] * self._num_shards(config)

    def _num_shards(self, config: TransformerConfig) -> int:
        return config.expert_tensor_parallel_size if self.mapping.is_expert else config.tensor_model_parallel_size

    def segments(self, config: TransformerConfig) -> list[Segment]:
        """The segments of the whole weight.

        Raises:
            ValueError: They don't add up to it: the model was built with other sizes than `config` says.
        """
        full_length = self.full_length(config)
        segments = self.mapping.segments(config, self._num_shards(config), full_length)
        total = sum(segment.length for segment in segments)
        if total != full_length:
            raise ValueError(
                f"{self.mapping.megatron_name} has {full_length} rows over all ranks, expected {total} "
                "by the model's configuration: build the model again after changing its sizes"
            )
        return segments

    def hf_shapes(self, config: TransformerConfig) -> dict[str, tuple[int, ...]]:
        """The shapes of the Hugging Face tensors that make up the weight."""
        dim = self.mapping.dim or 0
        shapes = {}
        for name, length in hf_lengths(self.segments(config)).items():
            shapes[name] = (*self.local_shape[:dim], length, *self.local_shape[dim + 1 :])
        return shapes

    def dtype_in_files(self, asked: torch.dtype | None) -> torch.dtype:
        """The dtype in which an export has it. A router's bias stays in FP32, as in transformers."""
        is_bias = self.mapping.megatron_name.endswith(EXPERT_BIAS)
        return self.dtype if asked is None or is_bias else asked

    def hf_bytes(self, config: TransformerConfig, dtype: torch.dtype | None = None) -> list[tuple[str, int]]:
        """(name, size) of each Hugging Face tensor in a dtype, the weight's own by default."""
        itemsize = self.dtype_in_files(dtype).itemsize
        return [(name, math.prod(shape) * itemsize) for name, shape in self.hf_shapes(config).items()]


class AdaptedWeight(Protocol):
    """A weight with an adapter beside it. The layer's `adapted_weights` gives it by the weight's name in the layer."""

    @property
    def adapter(self) -> torch.nn.Module:
        """The adapter, whose parameters are named `<layer>.adapter.<parameter>`."""

    def merged(self) -> torch.Tensor:
        """The weight that alone gives what layer and adapter give, this rank's part."""


@dataclass(frozen=True)
class ConversionTask:
    """One weight that this rank holds."""

    place: WeightPlace
    parameter: torch.Tensor
    """The parameter, or a buffer of `_BUFFERS`."""
    adapted: AdaptedWeight | None = None
    """The same weight with its adapter, if it has one that is to be merged."""

    def tensor(self) -> torch.Tensor:
        """The weight, with the adapter in it. Call on all ranks that hold a part of it."""
        return self.parameter.detach() if self.adapted is None else self.adapted.merged().detach()

    @property
    def megatron_name(self) -> str:
        """The weight's name, with the layer counted over all pipeline stages."""
        return self.place.mapping.megatron_name

    @property
    def hf_names(self) -> tuple[str, ...]:
        """The Hugging Face tensors that it is made of."""
        return self.place.mapping.hf_names


def model_config(chunks: Sequence[MegatronModule]) -> TransformerConfig:
    """The provider that a model was built from."""
    return unwrap_model(chunks[0]).config


def tensor_parallel_group(mapping: WeightMapping) -> dist.ProcessGroup:
    """The ranks that share the matrix."""
    if mapping.is_expert:
        return parallel_state.get_expert_tensor_parallel_group()
    return parallel_state.get_tensor_model_parallel_group()


def exchange_group(mapping: WeightMapping) -> dist.ProcessGroup:
    """The ranks among which one copy of the weight lies: pipeline stages, with the ranks that share out experts."""
    if mapping.is_expert:
        return parallel_state.get_expert_tensor_model_pipeline_parallel_group()
    return parallel_state.get_pipeline_model_parallel_group()


def local_tasks(chunks: Sequence[MegatronModule], family: ModelFamily) -> list[list[ConversionTask]]:
    """This rank's weights, chunk by chunk. Adapters are no weights of their own; they may be merged into these.

    Args:
        chunks: The model, wrapped or not.
        family: Its table of mappings.

    Raises:
        ValueError: The model has a weight that the table doesn't know.
    """
    table = {mapping.megatron_name: mapping for mapping in family.mappings}
    config = model_config(chunks)
    first_expert = 0
    if config.num_moe_experts:
        per_rank = config.num_moe_experts // config.expert_model_parallel_size
        first_expert = per_rank * parallel_state.get_expert_model_parallel_rank()
    tasks = []
    for chunk in map(unwrap_model, chunks):
        chunk_tasks = []
        buffers = {name: buffer for name, buffer in chunk.named_buffers() if name.endswith(_BUFFERS)}
        parameters = {**dict(chunk.named_parameters()), **buffers}
        adapted = _adapted_weights(chunk)
        for name, parameter in parameters.items():
            if ".adapter." in name:
                continue
            is_copy = config.share_embeddings_and_output_weights and name == _OUTPUT
            in_layer, of_expert = _LAYER.match(name), _EXPERT.search(name)
            layer = chunk.decoder.layers[int(in_layer[1])].layer_number - 1 if in_layer else None
            expert = first_expert + int(of_expert[2]) if of_expert else None
            template = _EMBEDDING if is_copy else _LAYER.sub("decoder.layers.{layer}.", name)
            template = _EXPERT.sub(r"\1{expert}", template)
            if template not in table:
                raise ValueError(
                    f"the model's weight {name!r} has no mapping to Hugging Face: add one to the family's table"
                )
            mapping = table[template].at_layer(layer, expert).as_held(config, len(parameter))
            place = WeightPlace(mapping, tuple(parameter.shape), parameter.dtype, dist.get_rank(), is_copy)
            chunk_tasks.append(ConversionTask(place, parameter, adapted.get(name)))
        tasks.append(chunk_tasks)
    return tasks


def _adapted_weights(chunk: torch.nn.Module) -> dict[str, AdaptedWeight]:
    layers: list[tuple[str, Any]] = [one for one in chunk.named_modules() if hasattr(one[1], "adapted_weights")]
    return {f"{name}.{own}": one for name, layer in layers for own, one in layer.adapted_weights().items()}


def all_places(tasks: Sequence[Sequence[ConversionTask]]) -> list[WeightPlace]:
    """Every weight of the model, in the order of its layers. Collective over the ranks that hold one model.

    Args:
        tasks: This rank's tasks, chunk by chunk.
    """
    mine = [task.place for chunk in tasks for task in chunk]
    pipeline_group = parallel_state.get_pipeline_model_parallel_group()
    # The ranks that share out the experts hold other experts each, on every pipeline stage.
    group = parallel_state.get_expert_tensor_model_pipeline_parallel_group()
    found: list[list[WeightPlace]] = [mine]
    if group.size() > 1:
        found = [[] for _ in range(group.size())]
        dist.all_gather_object(found, mine, group=group)
    stages = set(dist.get_process_group_ranks(pipeline_group))
    places: dict[tuple[str, bool], WeightPlace] = {}
    for place in (place for rank in found for place in rank):
        key = place.mapping.megatron_name, place.is_copy
        if key not in places or (not place.mapping.is_expert and place.owner in stages):
            places[key] = place
    return sorted(places.values(), key=lambda place: _position(place.mapping.megatron_name))


def _position(megatron_name: str) -> float:
    """Where a weight stands: before, in, or after the layers."""
    in_layer = _LAYER.match(megatron_name)
    return int(in_layer[1]) if in_layer else -1 if megatron_name == _EMBEDDING else math.inf
