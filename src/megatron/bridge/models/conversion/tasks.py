# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A built model seen as a list of conversion tasks: each weight of this rank with its place and its mapping."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import unwrap_model

from megatron.bridge.models.conversion.mapping import Segment, WeightMapping, hf_lengths
from megatron.bridge.models.families import ModelFamily

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_EMBEDDING = "embedding.word_embeddings.weight"
_OUTPUT = "output_layer.weight"


@dataclass(frozen=True)
class WeightPlace:
    """One Megatron weight as every rank knows it, whether or not it holds it."""

    mapping: WeightMapping
    local_shape: tuple[int, ...]
    """Shape on each tensor-parallel rank."""
    dtype: torch.dtype
    pipeline_rank: int
    is_copy: bool
    """A second copy of the tied embedding, on the last pipeline stage: loaded, never exported."""

    def full_length(self, tensor_parallel_size: int) -> int:
        """Length along the split axis over all tensor-parallel ranks."""
        if self.mapping.dim is None:
            return self.local_shape[0]
        return self.local_shape[self.mapping.dim] * tensor_parallel_size

    def segments(self, config: TransformerConfig) -> list[Segment]:
        """The segments of the whole weight.

        Raises:
            ValueError: They don't add up to it: the model was built with other sizes than `config` says.
        """
        full_length = self.full_length(config.tensor_model_parallel_size)
        segments = self.mapping.segments(config, config.tensor_model_parallel_size, full_length)
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

    def hf_bytes(self, config: TransformerConfig) -> list[tuple[str, int]]:
        """(name, size) of each Hugging Face tensor."""
        return [(name, math.prod(shape) * self.dtype.itemsize) for name, shape in self.hf_shapes(config).items()]


@dataclass(frozen=True)
class ConversionTask:
    """One weight that this rank holds."""

    place: WeightPlace
    parameter: torch.nn.Parameter

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


def local_tasks(chunks: Sequence[MegatronModule], family: ModelFamily) -> list[list[ConversionTask]]:
    """This rank's weights, chunk by chunk.

    Args:
        chunks: The model, wrapped or not.
        family: Its table of mappings.

    Raises:
        ValueError: The model has a weight that the table doesn't know.
    """
    table = {mapping.megatron_name: mapping for mapping in family.mappings}
    tied = model_config(chunks).share_embeddings_and_output_weights
    pipeline_rank = parallel_state.get_pipeline_model_parallel_rank()
    tasks = []
    for chunk in map(unwrap_model, chunks):
        chunk_tasks = []
        for name, parameter in chunk.named_parameters():
            is_copy = tied and name == _OUTPUT
            match = _LAYER.match(name)
            layer = chunk.decoder.layers[int(match[1])].layer_number - 1 if match else None
            template = _LAYER.sub("decoder.layers.{layer}.", _EMBEDDING if is_copy else name)
            if template not in table:
                raise ValueError(
                    f"the model's weight {name!r} has no mapping to Hugging Face: add one to the family's table"
                )
            mapping = table[template].at_layer(layer)
            place = WeightPlace(mapping, tuple(parameter.shape), parameter.dtype, pipeline_rank, is_copy)
            chunk_tasks.append(ConversionTask(place, parameter))
        tasks.append(chunk_tasks)
    return tasks


def all_places(tasks: Sequence[Sequence[ConversionTask]]) -> list[WeightPlace]:
    """Every weight of the model, in the order of its layers. Collective over the pipeline-parallel group.

    Args:
        tasks: This rank's tasks, chunk by chunk.
    """
    mine = [[task.place for task in chunk] for chunk in tasks]
    stages: list[list[list[WeightPlace]]] = [mine]
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() > 1:
        stages = [[] for _ in range(group.size())]
        dist.all_gather_object(stages, mine, group=group)
    # With virtual pipelining the first chunk of every stage comes before the second chunk of any.
    return [place for index in range(len(mine)) for stage in stages for place in stage[index]]
