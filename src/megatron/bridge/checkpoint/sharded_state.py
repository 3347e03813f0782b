# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Read sharded state in the `torch_dist` format with Megatron-Core's `dist_checkpointing`, with errors that name files.

Core reads metadata and objects with pickle's own reader, which executes what a file asks for. So while Core loads, its
readers are replaced by ours, which accept only plain data (`safe_pickle`).
"""

import contextlib
import dataclasses
import functools
import inspect
import io
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import __version__ as core_version
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.core import CheckpointingException, maybe_load_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.dist_checkpointing.strategies import common as common_strategies
from megatron.core.dist_checkpointing.strategies import torch as torch_strategies
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from megatron.bridge.checkpoint.iterations import DCP_METADATA_FILE, METADATA_FILE
from megatron.bridge.checkpoint.manifest import check_files_of, is_tensor_file
from megatron.bridge.checkpoint.safe_pickle import read_blob, read_dcp_metadata
from megatron.bridge.utils.distributed import raise_on_all_ranks, rank, world_size
from megatron.bridge.utils.replaced import replaced

COMMON_STATE = ShardedObject("common_state", None, (1,), (0,)).unique_key
"""Key under which later versions of Core store the common state among the tensors."""

Advice = Callable[[list[str], Collection[str]], str]
"""Returns the advice for an error, given the keys of the tensors that don't fit and of all stored ones."""


def default_advice(keys: list[str], stored: Collection[str]) -> str:
    """The advice if nothing but the keys is known."""
    return "load a checkpoint of this model, or set the model's sizes to the checkpoint's"


def load_sharded(
    sharded_state_dict: ShardedStateDict,
    directory: str | Path,
    *,
    strict: str = "assume_ok_unexpected",
    parallel_group: dist.ProcessGroup | None = None,
    exchange: str = "broadcast",
    check_sharding: bool = True,
    verify: bool = True,
    advice: Advice = default_advice,
) -> dict[str, Any]:
    """Read the tensors that a sharded state dict describes, with all ranks.

    Args:
        sharded_state_dict: The template; its tensors are filled in place where the format allows.
        directory: A complete iteration's directory.
        strict: Name of Core's `StrictHandling` for keys that are only in the template or only in the checkpoint.
        parallel_group: Read each replicated tensor once in this group and exchange.
        exchange: Core's name of the exchange algorithm.
        check_sharding: Check that the template's parts, over all ranks, cover each tensor once.
        verify: First compare the tensors' files with the manifest's checksums; the ranks divide the files.
        advice: Says what to do where tensors don't fit.

    Returns:
        The template's structure with tensors in place of their descriptions, and the common state.

    Raises:
        ValueError: A file is missing, truncated or damaged, or holds more than plain data; or a tensor is missing or
            has another shape. Names the file or tensor.
    """
    with raise_on_all_ranks(f"matching the model with {directory}"):
        reader = PlainReader(directory)
        _check_config(Path(directory))
        check_files(directory, reader)
        if verify:
            check_files_of(directory, is_tensor_file, share=rank(), shares=world_size())
        common_state = read_common_state(directory, reader)
        check_shapes(sharded_state_dict, directory, reader, advice)
        for wanted in _sharded_objects(sharded_state_dict):
            reader.read_object(wanted.unique_key)
    with _core_reads_plain_data(reader, common_state):
        try:
            strategy = serialization.get_default_load_sharded_strategy(str(directory))
            if parallel_group is not None:
                strategy = FullyParallelLoadStrategyWrapper(strategy, parallel_group, exchange_algo=exchange)
            return dist_checkpointing.load(
                sharded_state_dict,
                str(directory),
                strategy,
                validate_access_integrity=check_sharding,
                strict=strict,
            )
        except CheckpointException as error:  # raised by torch on all ranks, with each failing rank's traceback
            cause, _ = next(iter(error.failures.values()))
            raise ValueError(" ".join(str(cause).split())) from error
        except CheckpointingException as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{directory} can't be loaded: {reason}; load another iteration") from error


def _check_config(directory: Path) -> None:
    """Refuse a `metadata.json` that Core can't read."""
    try:
        maybe_load_config(str(directory))
    except (CheckpointingException, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{directory / METADATA_FILE} is damaged ({reason}): expected names and versions of formats; restore it "
            "from another copy, or load another iteration (checkpoint.ckpt_step)"
        ) from error


class PlainReader(FileSystemReader):
    """Torch's reader of a distributed checkpoint, restricted to plain data. Reads the metadata only once."""

    def __init__(self, directory: str | Path) -> None:
        super().__init__(directory)
        self.directory = Path(directory)
        self._metadata: Metadata | None = None
        self._last_file = ""

    def _slice_file(self, file: Any, part: Any) -> Any:
        self._last_file = part.relative_path
        return super()._slice_file(file, part)

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """The metadata: what is stored in which file.

        Raises:
            ValueError: The file is damaged, or holds something else.
        """
        if self._metadata is None:
            self._metadata = read_dcp_metadata(self.directory / DCP_METADATA_FILE)
            self._metadata.storage_meta = self._metadata.storage_meta or StorageMeta()
            self._metadata.storage_meta.load_id = self.load_id
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what a rank needs, directly into the target tensor if possible, else as torch does.

        Torch reads each stored tensor as a whole into new memory and copies the needed part.

        Raises:
            ValueError: A file is damaged or holds something else. Names the file.
        """
        try:
            left = [item for item in plan.items if not self._read_in_place(item, planner)]
            return super().read_data(dataclasses.replace(plan, items=left), planner)
        except Exception as error:  # damaged bytes may raise anything in torch's reader
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"{self.directory / self._last_file} can't be read: {reason}; restore it from another copy, or load "
                "another iteration (checkpoint.ckpt_step)"
            ) from error

    def _read_in_place(self, item: ReadItem, planner: LoadPlanner) -> bool:
        """Read a tensor into its target in host memory. Returns False if either side of the copy isn't contiguous."""
        if item.type is LoadItemType.BYTE_IO or not _torch_tells_offsets():
            return False
        place = planner.resolve_tensor(item).detach()
        if place.device.type != "cpu" or not place.is_contiguous() or place.numel() == 0 or place.shape != item.lengths:
            return False
        part = self.storage_data[item.storage_index]
        with open(self.directory / part.relative_path, "rb") as file:
            stored = torch.load(self._slice_file(file, part), map_location="meta", weights_only=True)
            is_in_one_piece = stored.ndim > 0 and stored.is_contiguous() and stored.shape[1:] == item.lengths[1:]
            if not is_in_one_piece or stored.dtype != place.dtype:
                return False
            start = (stored.storage_offset() + item.storage_offsets[0] * stored.stride(0)) * stored.itemsize
            file.seek(part.offset + stored.untyped_storage()._checkpoint_offset + start)
            bytes_of_place = place.view(-1).view(torch.uint8).numpy()
            if file.readinto(bytes_of_place.data) != bytes_of_place.nbytes:
                return False
        planner.commit_tensor(item, place)
        return True

    def read_object(self, key: str) -> Any:
        """Read an object that is stored among the tensors.

        Returns:
            The object; None if there is no such object.

        Raises:
            ValueError: It is damaged, or holds more than plain data.
        """
        part = self.read_metadata().storage_data.get(MetadataIndex(key))
        if part is None:
            return None
        with open(self.directory / part.relative_path, "rb") as file:
            file.seek(part.offset)
            stored = io.BytesIO(file.read(part.length))
        return read_blob(stored, named=f"{self.directory / part.relative_path} ({key})")


@functools.cache
def _torch_tells_offsets() -> bool:
    """Whether this torch can read an archive without its tensors' data and report their offsets. Older ones can't."""
    file = io.BytesIO()
    torch.save(torch.zeros(1), file)
    file.seek(0)
    return hasattr(torch.load(file, map_location="meta", weights_only=True).untyped_storage(), "_checkpoint_offset")


@contextlib.contextmanager
def _core_reads_plain_data(reader: PlainReader, common_state: dict[str, Any]) -> Iterator[None]:
    """Within the context, Core reads metadata and objects through `reader`, and gets the common state already read."""

    class PlainPlanner(torch_strategies.MCoreLoadPlanner):
        def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
            key = read_item.dest_index.fqn
            content = read_blob(value, named=f"{reader.directory} ({key})")
            if self.flatten_state_dict:
                set_element(self.original_state_dict, self.mappings[key], content)
            else:
                self.state_dict[key] = content

    readers = {"_get_filesystem_reader": lambda *_, **__: reader, "MCoreLoadPlanner": PlainPlanner}
    place, name = _reader_of_the_common_state()
    with replaced(torch_strategies, **readers), replaced(place, **{name: lambda *_: common_state}):
        yield


def _reader_of_the_common_state() -> tuple[Any, str]:
    """(owner, name) of what Core's load calls to read the common state; it differs between versions."""
    if hasattr(common_strategies, "TorchCommonLoadStrategy"):
        return common_strategies.TorchCommonLoadStrategy, "load_common"
    return serialization, "load_common" if _keeps_common_state_apart() else "load_common_state_dict"


def _keeps_common_state_apart() -> bool:
    """Whether this Core keeps the common state in a separate file. From 0.19 on it is among the tensors."""
    return "common_strategy" in inspect.signature(dist_checkpointing.load).parameters


def read_common_state(directory: str | Path, reader: PlainReader | None = None) -> dict[str, Any]:
    """Read the common state of a checkpoint: everything but tensors and objects of single ranks.

    Args:
        directory: An iteration's directory.
        reader: A reader of this directory, whose metadata is reused. None: a new one.

    Raises:
        ValueError: A later Core wrote it than this one can read, it is damaged, or it holds more than plain data.
    """
    directory = Path(directory)
    path = directory / common_strategies.COMMON_STATE_FNAME
    if path.is_file():
        return read_blob(path)
    if _keeps_common_state_apart():
        raise ValueError(
            f"{directory} has no common.pt: a later Megatron-Core wrote it than the installed {core_version} can read; "
            "install that version"
        )
    stored = (reader or PlainReader(directory)).read_object(COMMON_STATE)
    if stored is None:
        raise ValueError(
            f"{directory} holds no common state, neither in common.pt nor as {COMMON_STATE}: the checkpoint is not "
            "complete; load another iteration (checkpoint.ckpt_step)"
        )
    return stored[0]


def stored_shapes(directory: str | Path) -> dict[str, tuple[int, ...]]:
    """The global shape of each tensor that a checkpoint holds, by key."""
    return {key: tuple(tensor.global_shape) for key, tensor in _stored_tensors(PlainReader(directory)).items()}


def stored_content_metadata(directory: str | Path) -> dict[str, Any]:
    """The `content_metadata` that a checkpoint was saved with (`save_sharded`); empty if there is none.

    Raises:
        ValueError: A later Core wrote it than this one can read, a file is missing or cut off, or holds more than
            plain data.
    """
    check_files(directory)  # later versions of Core keep the metadata among the tensors
    return read_common_state(directory).get("content_metadata") or {}


def check_files(directory: str | Path, reader: PlainReader | None = None) -> None:
    """Refuse a checkpoint with a missing or truncated file, before anything is read.

    Args:
        directory: An iteration's.
        reader: As for `read_common_state`.

    Raises:
        ValueError: Names the first such file.
    """
    directory = Path(directory)
    needed_bytes: dict[str, int] = {}
    for part in (reader or PlainReader(directory)).read_metadata().storage_data.values():
        needed_bytes[part.relative_path] = max(needed_bytes.get(part.relative_path, 0), part.offset + part.length)
    for name, needed in sorted(needed_bytes.items()):
        path = directory / name
        found = f"has {path.stat().st_size} bytes" if path.is_file() else "is missing"
        if not path.is_file() or path.stat().st_size < needed:
            raise ValueError(
                f"{path} {found}: expected {needed} bytes, as {directory / DCP_METADATA_FILE} says; "
                "restore it from another copy, or load another iteration (checkpoint.ckpt_step)"
            )


def check_shapes(
    sharded_state_dict: ShardedStateDict,
    directory: str | Path,
    reader: PlainReader | None = None,
    advice: Advice = default_advice,
) -> None:
    """Refuse a checkpoint whose tensors don't match the template, before anything is read.

    Args:
        sharded_state_dict: The template.
        directory: An iteration's.
        reader: As for `read_common_state`.
        advice: As for `load_sharded`.

    Raises:
        ValueError: Names the first tensor that differs, how many others do, and both shapes.
    """
    stored = _stored_tensors(reader or PlainReader(directory))
    wrong: dict[str, str] = {}
    for wanted in _sharded_tensors(sharded_state_dict):
        if wanted.allow_shape_mismatch:
            continue
        if wanted.key not in stored:
            wrong[wanted.key] = f"is missing there, the run needs shape {tuple(wanted.global_shape)}"
        elif tuple(stored[wanted.key].global_shape) != tuple(wanted.global_shape):
            found = tuple(stored[wanted.key].global_shape)
            wrong[wanted.key] = f"has shape {found} there, the run needs {tuple(wanted.global_shape)}"
    if wrong:
        first = " ".join(next(iter(wrong.items())))
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ValueError(f"{directory} doesn't fit this model: {first}{more}; {advice(list(wrong), stored)}")


def _stored_tensors(reader: PlainReader) -> dict[str, ShardedTensor]:
    strategy = torch_strategies.TorchDistLoadShardedStrategy()
    return strategy.load_tensors_metadata(reader.directory, reader.read_metadata())


def _sharded_objects(state: ShardedStateDict) -> Iterator[ShardedObject]:
    return (value for value in nested_values(state) if isinstance(value, ShardedObject))


def _sharded_tensors(state: Any) -> list[ShardedTensor]:
    """Every `ShardedTensor` in a nested state, factories built."""
    if isinstance(state, ShardedTensor):
        return [state]
    if isinstance(state, ShardedTensorFactory):
        return _sharded_tensors(state.build())
    if isinstance(state, dict):
        return [tensor for value in state.values() for tensor in _sharded_tensors(value)]
    if isinstance(state, (list, tuple)):
        return [tensor for value in state for tensor in _sharded_tensors(value)]
    return []
