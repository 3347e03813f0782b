# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Hugging Face weights into a built Megatron model: everything is checked before anything is touched."""

import logging
import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from tqdm import tqdm

from megatron.bridge.models.conversion.hf_weights import HFWeights
from megatron.bridge.models.conversion.left_out import (
    is_of_no_shared_expert,
    may_be_ignored,
    say_what_is_left_out,
)
from megatron.bridge.models.conversion.mapping import shard
from megatron.bridge.models.conversion.tasks import (
    ConversionTask,
    WeightPlace,
    all_places,
    local_tasks,
    model_config,
    tensor_parallel_group,
)
from megatron.bridge.models.families import ModelFamily
from megatron.bridge.utils.distributed import is_rank_0, raise_on_all_ranks

logger = logging.getLogger(__name__)

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_BLOCK_BYTES = 1 << 19
_SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def load_weights(
    chunks: Sequence[MegatronModule],
    family: ModelFamily,
    weights: HFWeights,
    *,
    allowed_mismatched: Sequence[str] = (),
    show_progress: bool = True,
) -> None:
    """Copy Hugging Face weights into this rank's parameters, in the parameters' dtype. Collective.

    Each rank reads only the slices it needs, one at a time.

    Args:
        chunks: The model, wrapped or not.
        family: Its table of mappings.
        weights: Where to read.
        allowed_mismatched: Patterns (fnmatch) of Hugging Face or Megatron names whose shape may differ; such weights
            keep their values.
        show_progress: Whether rank 0 shows a bar.

    Raises:
        FileNotFoundError: No weights there, or a shard is missing.
        ValueError: A tensor is missing, unexpected, or of the wrong shape. No parameter has changed then.
    """
    config = model_config(chunks)
    tasks = local_tasks(chunks, family)
    places = all_places(tasks)
    with raise_on_all_ranks(f"checking the weights in {weights.directory}"):
        mismatched = check_weights(places, config, family, weights, allowed_mismatched=allowed_mismatched)
    with raise_on_all_ranks(f"reading the weights in {weights.directory}"):
        mine = [task for chunk in tasks for task in chunk if task.megatron_name not in mismatched]
        # File by file: what is mapped of a file counts as memory, until the file is closed.
        mine.sort(key=lambda task: weights.files[task.hf_names[0]])
        last_of = {weights.files[name]: task for task in mine for name in task.hf_names}
        with tqdm(mine, desc="reading weights", unit="tensor", disable=not (show_progress and is_rank_0())) as bar:
            for task in bar:
                _copy_into(task, config, weights)
                for path in {weights.files[name] for name in task.hf_names}:
                    if last_of[path] is task:
                        weights.close(path)


def _copy_into(task: ConversionTask, config: TransformerConfig, weights: HFWeights) -> None:
    """Fill one parameter, slice by slice."""
    dim = task.place.mapping.dim
    segments = task.place.segments(config)
    if dim is None:
        parts = shard(segments, 0, task.parameter.shape[0])
    else:
        length = task.parameter.shape[dim]
        parts = shard(segments, tensor_parallel_group(task.place.mapping).rank() * length, length)
    mapped = {name: weights.read(name) for name in task.hf_names}
    with torch.no_grad():
        for offset, segment in parts:
            target = task.parameter.narrow(dim or 0, offset, segment.length)
            if segment.hf_name is None:
                target.zero_()
            else:
                found = mapped[segment.hf_name].narrow(dim or 0, segment.start, segment.length)
                _copy_checked(target, found, segment.hf_name, weights.files[segment.hf_name])


def _copy_checked(target: torch.Tensor, found: torch.Tensor, name: str, path: Path) -> None:
    """Fill a slice, in blocks that the processor's cache still holds when their values are looked at.

    Raises:
        ValueError: A value is NaN or infinite, or too large for the slice's dtype.
    """
    rows = max(1, _BLOCK_BYTES * target.shape[0] // max(1, target.nbytes))
    for block, read in zip(target.split(rows), found.split(rows), strict=True):
        block.copy_(read)
        if not is_finite(block):
            if is_finite(read):
                raise _too_large(name, block.dtype)
            raise ValueError(
                f"{path}: {name!r} holds NaN or infinite values: download the file again, or take another copy of the "
                "model"
            )


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite. Their sum says so without a copy; only one too large leaves it open."""
    return math.isfinite(tensor.sum()) or bool(tensor.isfinite().all())


def cast(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """A tensor in another dtype.

    Raises:
        ValueError: A value is too large for it.
    """
    if tensor.dtype == dtype:
        return tensor
    converted = tensor.to(dtype)
    if dtype == torch.float16 and not is_finite(converted):
        raise _too_large(name, dtype)
    return converted


def _too_large(name: str, dtype: torch.dtype) -> ValueError:
    return ValueError(f"{name!r} holds values that {str(dtype)[6:]} can't: choose dtype bfloat16 or float32")


def check_weights(
    places: Sequence[WeightPlace],
    config: TransformerConfig,
    family: ModelFamily,
    weights: HFWeights,
    *,
    allowed_mismatched: Sequence[str] = (),
) -> set[str]:
    """Compare the files with the model, reading headers only.

    Returns:
        The Megatron names whose shapes differ and may.

    Raises:
        FileNotFoundError: No weights there, or a shard is missing.
        ValueError: Names the file, the tensor, what was found and what is expected; on rank 0 alone for a head that
            isn't tied.
    """
    expected: set[str] = set()
    mismatched: set[str] = set()
    dtypes: dict[str, int] = {}
    for place in places:
        for name, shape in place.hf_shapes(config).items():
            expected.add(name)
            if name not in weights.files:
                raise ValueError(
                    f"{weights.directory} holds no tensor {name!r}, which the model needs with shape {shape}: "
                    "name the directory of this model, or download it again"
                )
            found = weights.shape(name)
            if weights.dtype(name) not in _SAFETENSORS_DTYPES.values():
                raise ValueError(
                    f"{weights.files[name]}: {name!r} has dtype {weights.dtype(name)}, expected one of "
                    f"{sorted(_SAFETENSORS_DTYPES.values())}: take a copy of the model that isn't quantized"
                )
            if found == shape:
                if weights.dtype(name) != _SAFETENSORS_DTYPES.get(place.dtype):
                    dtypes[weights.dtype(name)] = dtypes.get(weights.dtype(name), 0) + 1
            elif any(fnmatchcase(n, p) for p in allowed_mismatched for n in (name, place.mapping.megatron_name)):
                logger.warning(
                    "%s keeps its values: %s has shape %s, not %s", place.mapping.megatron_name, name, found, shape
                )
                mismatched.add(place.mapping.megatron_name)
            else:
                raise ValueError(_wrong_shape(weights, name, found, shape, place, config))
    if is_rank_0():
        _check_tied_head(config, weights)
    unexpected = [
        name
        for name in weights.files
        if name not in expected
        and (
            not may_be_ignored(name, config, family)
            or (is_of_no_shared_expert(name, config) and 0 not in weights.shape(name))
        )
    ]
    if unexpected:
        raise ValueError(
            f"{weights.files[unexpected[0]]} holds {unexpected[0]!r}, for which the model has no place "
            f"({len(unexpected)} such tensors): name the directory of this model, or correct the model's configuration"
        )
    left_out = say_what_is_left_out(weights.files, config, family)
    if left_out is not None and is_rank_0():
        logger.warning("%s: %s", weights.directory, left_out)
    for dtype, count in dtypes.items():
        logger.warning("%d tensors of dtype %s are cast to the model's", count, dtype)
    return mismatched


def _check_tied_head(config: TransformerConfig, weights: HFWeights) -> None:
    """Refuse to drop an output layer of its own: where it differs from the embedding, transformers doesn't tie them.

    Raises:
        ValueError: The model ties the two, and the files hold different ones.
    """
    if not config.share_embeddings_and_output_weights or _HEAD not in weights.files:
        return
    head, embedding = weights.read(_HEAD), weights.read(_EMBEDDING)
    rows = max(1, _BLOCK_BYTES * embedding.shape[0] // max(1, embedding.nbytes))
    if head.shape != embedding.shape or not all(map(_same_values, head.split(rows), embedding.split(rows))):
        raise ValueError(
            f"{weights.files[_HEAD]} holds {_HEAD!r}, which differs from {_EMBEDDING!r}, and config.json says "
            "tie_word_embeddings=true: transformers doesn't tie such weights; set it to false there to keep both, or "
            f"remove {_HEAD} from the files"
        )


def _same_values(left: torch.Tensor, right: torch.Tensor) -> bool:
    same_bits = left.dtype == right.dtype and torch.equal(left.view(torch.uint8), right.view(torch.uint8))
    return same_bits or torch.equal(left.double(), right.double())


def _wrong_shape(
    weights: HFWeights, name: str, found: tuple, expected: tuple, place: WeightPlace, config: TransformerConfig
) -> str:
    """The one-line error for a tensor that doesn't fit."""
    line = f"{weights.files[name]}: {name!r} has shape {found}, expected {expected}"
    if place.mapping.is_vocabulary:
        rows = place.full_length(config)
        return f"{line} for model.vocab_size={config.vocab_size} (padded to {rows}): set model.vocab_size={found[0]}"
    return f"{line} by the model's configuration: name the directory of this model, or correct the model's sizes"
