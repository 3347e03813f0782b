# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A whole Hugging Face directory: configuration, tokenizer and weights, there in full or not at all."""

import json
import logging
import shutil
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule

from megatron.bridge.models.conversion.expert_stacks import names_when_exported, stacked_sizes
from megatron.bridge.models.conversion.export import export_weights, exported_places
from megatron.bridge.models.conversion.hf_weights import INDEX_FILE, HFWeightsWriter, ShardPlan, names_of_tensors
from megatron.bridge.models.conversion.left_out import config_of_export, may_be_ignored
from megatron.bridge.models.conversion.load import cast
from megatron.bridge.models.conversion.tasks import local_tasks, model_config
from megatron.bridge.models.conversion.tokenizer_files import TokenizerFiles, copy_files
from megatron.bridge.models.conversion.trained_config import config_as_trained
from megatron.bridge.models.families import ModelFamily
from megatron.bridge.utils.distributed import is_rank_0, raise_on_all_ranks
from megatron.bridge.utils.files import replaced_directory

logger = logging.getLogger(__name__)

OTHER_FILES = ("LICENSE*", "NOTICE*")


def save_hf_directory(
    chunks: Sequence[MegatronModule],
    family: ModelFamily,
    path: str | Path,
    *,
    hf_config: dict[str, Any],
    source: Path | None,
    text: TokenizerFiles,
    strict: bool = True,
    show_progress: bool = True,
    max_shard_bytes: int = 5_000_000_000,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a model as a Hugging Face directory. Collective; rank 0 writes, one shard of weights in memory.

    Args:
        chunks: The model, wrapped or not.
        family: Its table of mappings.
        path: The directory; an older export there is replaced once the new one is complete.
        hf_config: Becomes `config.json`, with the model's dtype and the values that it was trained with.
        source: Directory that the model came from, whose licence is copied; None: there is none.
        text: The tokenizer, and where a text ends.
        strict: Refuse an export whose tensor names differ from those of `source`.
        show_progress: Whether rank 0 shows a bar.
        max_shard_bytes: Size that a file of weights stays below, unless a single tensor is larger.
        dtype: Of the tensors in the files, but for the biases of routers; None: the model's.

    Raises:
        ValueError: `path` is taken by something else, the names differ, or `config.json` can't say a value. Nothing is
            written then.
    """
    path = Path(path).expanduser()
    config = model_config(chunks)
    places = exported_places(local_tasks(chunks, family))
    sizes = (pair for place in places for pair in place.hf_bytes(config, dtype))
    dtypes = {name: place.dtype_in_files(dtype) for place in places for name in place.mapping.hf_names}
    plan = ShardPlan.make(stacked_sizes(sizes, family.expert_stacks), max_shard_bytes)
    with ExitStack() as stack:
        with raise_on_all_ranks(f"preparing {path}"):
            check_target(path, source)
            check_names(set(plan.file_of), family, config, source, strict=strict)
            as_trained = config_as_trained(hf_config, config)
            if is_rank_0():
                directory = stack.enter_context(replaced_directory(path))
                _write_config(directory, as_trained, dtype or config.params_dtype)
                if source is not None:
                    copy_files(source, directory, OTHER_FILES)
                text.write(directory)
                writer = HFWeightsWriter(directory, plan)
        for name, tensor in export_weights(chunks, family, cpu=True, show_progress=show_progress, copies=False):
            with raise_on_all_ranks(f"writing {path}"):
                if is_rank_0():
                    writer.add(name, cast(tensor, dtypes.get(name, dtype or tensor.dtype), name))
        with raise_on_all_ranks(f"completing {path}"):
            if is_rank_0():
                writer.finish()
                stack.close()
    logger.info("wrote %s (%d tensors, %.2f GB)", path, len(plan.file_of), plan.total_bytes / 1e9)


def save_hf_weights(
    chunks: Sequence[MegatronModule],
    family: ModelFamily,
    path: str | Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    source: Path | None,
    strict: bool = True,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a model's weights as safetensors, in place of those in a directory; its other files stay. Collective.

    Args:
        chunks: As for `save_hf_directory`, and so are the others.
        family: Its table of mappings.
        path: The directory.
        tensors: (Hugging Face name, whole tensor in host memory) pairs; every rank takes all of them.
        source: Directory that the model came from.
        strict: Refuse an export whose tensor names differ from those of `source`.
        max_shard_bytes: Size that a file stays below.

    Raises:
        ValueError: `path` is taken by something else, or the names differ. Nothing is written then.
    """
    path = Path(path).expanduser()
    config = model_config(chunks)
    places = exported_places(local_tasks(chunks, family))
    sizes = (pair for place in places for pair in place.hf_bytes(config, None))
    plan = ShardPlan.make(stacked_sizes(sizes, family.expert_stacks), max_shard_bytes)
    with ExitStack() as stack:
        with raise_on_all_ranks(f"preparing {path}"):
            check_target(path, source)
            check_names(set(plan.file_of), family, config, source, strict=strict)
            if is_rank_0():
                directory = stack.enter_context(replaced_directory(path))
                if path.is_dir():
                    weights = shutil.ignore_patterns("*.safetensors", INDEX_FILE)
                    shutil.copytree(path, directory, ignore=weights, dirs_exist_ok=True)
                writer = HFWeightsWriter(directory, plan)
        for name, tensor in tensors:
            with raise_on_all_ranks(f"writing {path}"):
                if is_rank_0():
                    writer.add(name, tensor)
        with raise_on_all_ranks(f"completing {path}"):
            if is_rank_0():
                writer.finish()
                stack.close()
    logger.info("wrote the weights in %s (%d tensors, %.2f GB)", path, len(plan.file_of), plan.total_bytes / 1e9)


def check_target(path: Path, source: Path | None) -> None:
    """Refuse to replace what is no earlier export.

    Raises:
        ValueError: `path` is the source itself, a file, or a directory with other content.
    """
    if source is not None and path.resolve() == source.resolve():
        raise ValueError(f"{path} is the source of the conversion: name another directory to write to")
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file: name a directory to write to")
    if path.is_dir() and any(path.iterdir()) and not (path / "config.json").is_file():
        raise ValueError(f"{path} holds something else than a Hugging Face model: name a new or empty directory")


def check_names(exported: set[str], family: ModelFamily, config: Any, source: Path | None, *, strict: bool) -> None:
    """Compare the names of an export with those of the directory that the model came from.

    Raises:
        ValueError: They differ, and `strict`.
    """
    named = None if source is None else names_of_tensors(source)
    if named is None:
        return
    named = names_when_exported(
        named, family.expert_stacks, read_stacks=family.read_stacks, num_experts=config.num_moe_experts
    )
    in_source = {name for name in named if not may_be_ignored(name, config, family)}
    differing = sorted(in_source ^ exported)
    if differing:
        side = "only the source" if differing[0] in in_source else "only the export"
        message = (
            f"the export's tensors differ from those of {source}: {side} holds {differing[0]!r} "
            f"({len(differing)} differ)"
        )
        if strict:
            raise ValueError(f"{message}; name the directory of this model, or pass strict=False")
        logger.warning(message)


def _write_config(directory: Path, hf_config: dict[str, Any], dtype: torch.dtype) -> None:
    """Write `config.json` with the dtype that the weights really have."""
    key = "dtype" if "dtype" in hf_config else "torch_dtype"
    config = {**config_of_export(hf_config), key: str(dtype).removeprefix("torch.")}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
