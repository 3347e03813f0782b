# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Hugging Face weights on disk: safetensors read slice by slice, and written shard by shard."""

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron.bridge.models.conversion.fp8_blocks import SCALE, block_size, dequantized, without_scales
from megatron.bridge.models.conversion.text_tower import text_names
from megatron.bridge.utils.files import is_below, use_umask

logger = logging.getLogger(__name__)

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


class HFWeights:
    """The tensors of a Hugging Face directory. Nothing but headers is read until a slice is asked for.

    Of a model that takes images too, they are those of its language model, under the names that they have by itself.

    Args:
        directory: Holds `model.safetensors`, or shards with their index.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._files: dict[Path, Any] = {}

    @cached_property
    def files(self) -> dict[str, Path]:
        """The file of each tensor that transformers would load, by tensor name.

        A single file goes before an index, and all that a shard holds counts, whether or not the index names it.

        Raises:
            FileNotFoundError: No safetensors weights, or a shard that the index names is missing.
            ValueError: A file is damaged or half-written, a shard lacks a tensor that the index puts there, or two
                shards hold the same one.
        """
        names = without_scales(self._stored_names) if self._fp8_block else self._stored_names
        return {name: self._stored_files[self._stored_names[name]] for name in names}

    @cached_property
    def _fp8_block(self) -> tuple[int, int] | None:
        """Rows and columns of a block of weights in FP8, as `config.json` says; None where weights are in none."""
        path = self.directory / "config.json"
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return block_size(content.get("quantization_config"))

    @cached_property
    def _stored_names(self) -> dict[str, str]:
        """The names in the files, by the names that this class goes by."""
        return text_names(self._stored_files)

    @cached_property
    def _stored_files(self) -> dict[str, Path]:
        index, single = self.directory / INDEX_FILE, self.directory / SINGLE_FILE
        if single.is_file():
            if index.is_file():
                logger.warning("%s is read, as by transformers, and %s is not: remove what is old", single, index.name)
            return dict.fromkeys(self._open(single).keys(), single)
        if not index.is_file():
            raise FileNotFoundError(
                f"{single} is missing, and so is {INDEX_FILE}: expected a Hugging Face model saved as safetensors"
            )
        file_of = _read_index(index)
        found: dict[str, Path] = {}
        for path in (self.directory / file for file in sorted(set(file_of.values()))):
            for name in self._open(path).keys():
                if name in found:
                    raise ValueError(
                        f"{found[name]} and {path.name} both hold {name!r}: expected it once; take another copy of the "
                        "model"
                    )
                found[name] = path
        for name, file in file_of.items():
            path = self.directory / file
            if found.get(name) != path:
                raise ValueError(f"{path} holds no {name!r}, which {index} puts there: download the file again")
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """The dtype in which a tensor is read, as safetensors names it: `BF16`, `F16`, `F32`, …"""
        return "BF16" if self._is_in_fp8(name) else self._slice(name).get_dtype()

    def read(self, name: str) -> torch.Tensor:
        """A tensor on the host, a view of the mapped file: what of it is looked at is read. One in FP8 becomes bf16."""
        tensor = self._stored(name)
        if not self._is_in_fp8(name):
            return tensor
        return dequantized(tensor, self._stored(name + SCALE), block=self._fp8_block or (1, 1), name=name)

    def close(self, path: Path) -> None:
        """Give back what is mapped of a file, apart from tensors still in use; reading from it again opens it."""
        self._files.pop(path, None)

    def _is_in_fp8(self, name: str) -> bool:
        return self._fp8_block is not None and name + SCALE in self._stored_names

    def _stored(self, name: str) -> torch.Tensor:
        stored = self._stored_names[name]
        return self._open(self._stored_files[stored]).get_tensor(stored)

    def _slice(self, name: str) -> Any:
        return self._open(self.files[name]).get_slice(self._stored_names[name])

    def _open(self, path: Path) -> Any:
        if path not in self._files:
            try:
                self._files[path] = safe_open(path, framework="pt", device="cpu")
            except FileNotFoundError:
                raise FileNotFoundError(f"{path} is missing, and {INDEX_FILE} names it: download it again") from None
            except SafetensorError as error:
                raise ValueError(f"{path} is damaged or half-written ({error}): download it again") from None
        return self._files[path]


def names_of_tensors(directory: Path) -> set[str] | None:
    """The names of the tensors in a Hugging Face directory. None: it holds none.

    Where the weights haven't been fetched, as for a model of the hub that only gives its configuration, the index says.

    Raises:
        FileNotFoundError, ValueError: As for `HFWeights.files`.
    """
    index = directory / INDEX_FILE
    if any(directory.glob("*.safetensors")):
        return set(HFWeights(directory).files)
    return set(without_scales(text_names(_read_index(index)))) if index.is_file() else None


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): expected JSON with a weight_map") from None
    for name, file in weight_map.items():
        if not (isinstance(file, str) and is_below(file) and Path(file).name == file):
            raise ValueError(f"{path} names {file!r} for {name!r}: expected a file in the same directory")
    return weight_map


@dataclass(frozen=True)
class ShardPlan:
    """Which tensor goes to which file; decided before the first one is written."""

    file_of: dict[str, str]
    total_bytes: int

    @classmethod
    def make(cls, sizes_bytes: Iterable[tuple[str, int]], max_shard_bytes: int) -> "ShardPlan":
        """Fill files in the given order.

        Args:
            sizes_bytes: (tensor name, size) pairs.
            max_shard_bytes: Size that a file stays below, unless a single tensor is larger.
        """
        shards: list[list[str]] = [[]]
        filled = total = 0
        for name, size in sizes_bytes:
            if shards[-1] and filled + size > max_shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += size
            total += size
        if len(shards) == 1:
            return cls(dict.fromkeys(shards[0], SINGLE_FILE), total)
        names = {i: f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)}
        return cls({tensor: names[i] for i, shard in enumerate(shards, start=1) for tensor in shard}, total)


class HFWeightsWriter:
    """Writes tensors in the order of a plan, holding one shard in memory.

    Args:
        directory: Where the files go.
        plan: Names every tensor that will be added.
    """

    def __init__(self, directory: Path, plan: ShardPlan) -> None:
        self._directory = directory
        self._plan = plan
        self._shard: dict[str, torch.Tensor] = {}
        self._waiting = dict(plan.file_of)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take the next tensor, which lies in host memory; writes its file when the file's last tensor has come."""
        file = self._waiting.pop(name)
        self._shard[name] = tensor.contiguous()
        if file not in self._waiting.values():
            path = self._directory / file
            save_file(self._shard, path, metadata={"format": "pt"})
            use_umask(path)  # safetensors makes files that only their owner can read
            self._shard.clear()

    def finish(self) -> None:
        """Write the index, where there is more than one file."""
        if set(self._plan.file_of.values()) != {SINGLE_FILE}:
            index = {"metadata": {"total_size": self._plan.total_bytes}, "weight_map": self._plan.file_of}
            (self._directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
