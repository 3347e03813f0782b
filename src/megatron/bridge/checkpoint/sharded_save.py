# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Write sharded state: planned by Megatron-Core, written by this process, and complete on all ranks or on none.

Core 0.16 forks a process for each file and waits for it forever, even if it was killed. In 0.16 and 0.19, if the disk
is full when rank 0 writes the metadata, rank 0 leaves the others waiting. So Core only plans which rank writes which
tensor where. The rest is done here: no process is started, and an error on one rank ends all ranks.
"""

import contextlib
import dataclasses
import inspect
import json
import os
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import __version__ as core_version
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint import filesystem as torch_filesystem
from torch.distributed.checkpoint.metadata import Metadata
from tqdm import tqdm

from megatron.bridge.checkpoint.iterations import METADATA_FILE
from megatron.bridge.checkpoint.manifest import Checksums, ChecksumWriter, write_manifest
from megatron.bridge.utils.distributed import is_rank_0, raise_on_all_ranks, rank, world_size
from megatron.bridge.utils.files import atomic_write
from megatron.bridge.utils.replaced import replaced


def save_sharded(
    sharded_state_dict: ShardedStateDict,
    directory: str | Path,
    *,
    content_metadata: dict[str, Any] | None = None,
    parallel_group: dist.ProcessGroup | None = None,
) -> None:
    """Write a sharded state dict with all ranks. Returns when every rank's files are complete.

    Args:
        sharded_state_dict: Core's `ShardedTensor`s and `ShardedObject`s; other values are common to all ranks.
        directory: Exists and is empty; `model_checkpoint.prepare_save` makes it.
        content_metadata: Plain data that describes the content, read back with the common state.
        parallel_group: Spread replicated tensors' writing over this group's ranks (the data-parallel group).

    Raises:
        OSError: This rank can't write. The other ranks raise a RuntimeError with the same text.
    """
    save = plan_save(sharded_state_dict, directory, content_metadata=content_metadata, parallel_group=parallel_group)
    save.write(show_progress=True)
    save.complete()


def plan_save(
    sharded_state_dict: ShardedStateDict,
    directory: str | Path,
    *,
    content_metadata: dict[str, Any] | None = None,
    parallel_group: dist.ProcessGroup | None = None,
) -> "ShardedSave":
    """Agree with all ranks on which rank writes what. The common state is written, or copied, now.

    Args:
        sharded_state_dict: See `save_sharded`.
        directory: See `save_sharded`.
        content_metadata: See `save_sharded`.
        parallel_group: See `save_sharded`.

    Returns:
        This rank's part of the save.

    Raises:
        OSError: See `save_sharded`.
    """
    described = dict(sharded_state_dict)
    if content_metadata is not None:
        described["content_metadata"] = content_metadata
    sharded, common = save_preprocess(described)
    if "common_strategy" in inspect.signature(dist_checkpointing.save).parameters:
        with raise_on_all_ranks(f"writing the common state in {directory}"), _errors_of_the_disk(directory):
            if is_rank_0():
                with atomic_write(Path(directory) / COMMON_STATE_FNAME, "wb") as file:
                    torch.save(common, file)
    else:  # later versions keep it among the tensors
        sharded["common_state"] = ShardedObject("common_state", common, (1,), (0,), replica_id=rank())
    strategy = _PlanningStrategy("torch_dist", 1, thread_count=1)
    parallel = FullyParallelSaveStrategyWrapper(strategy, parallel_group) if parallel_group is not None else strategy
    with _no_process_for_results():
        planned = parallel.async_save(sharded, str(directory), *strategy.of_this_core)
    if not isinstance(planned, ShardedSave):
        raise RuntimeError(
            f"megatron-core {core_version} plans a save in another way than 0.16.1 to 0.19.2: install one of these"
        )
    return planned


class ShardedSave:
    """One rank's part of a planned save. `write` may run in a thread; `complete` must be called on all ranks."""

    def __init__(self, writer: filesystem_async.FileSystemWriterAsync, metadata: Metadata | None) -> None:
        self._writer = writer
        self._metadata = metadata
        self._results: list[Any] = []
        self._checksums: Checksums = {}
        self._cancelled = threading.Event()
        self.directory = Path(writer.checkpoint_dir)
        self.error: Exception | None = None
        """The error that kept this rank from writing; None if there is none."""

    def copy_tensors(self) -> None:
        """Copy everything that this rank writes to new host memory, so that training can continue.

        Core copies only tensors on a device, and views. The host tensors of an offloaded optimizer would be changed by
        the next step while they are written.
        """
        for _, _, (_, tensors) in self._writer.write_buckets:
            for index, (item, tensor) in enumerate(tensors):
                tensors[index] = (item, tensor.to("cpu", copy=True))

    def write(self, *, show_progress: bool = False) -> None:
        """Write this rank's files and flush them to disk. Doesn't raise, but sets `error`.

        Args:
            show_progress: Show a progress bar, on rank 0 in a terminal.
        """
        count = sum(len(blobs) + len(tensors) for _, _, (blobs, tensors) in self._writer.write_buckets)
        is_hidden = None if show_progress and is_rank_0() else True  # None: where there is no terminal
        try:
            with _errors_of_the_disk(self.directory), _one_checksum():
                with tqdm(total=count, desc="saving", unit="tensor", leave=False, disable=is_hidden) as bar:
                    self._write_files(bar)
        except Exception as error:
            self.error = error
        finally:
            self._writer.write_buckets = []  # free the copies

    def _write_files(self, bar: tqdm) -> None:
        for path, name, (blobs, tensors) in self._writer.write_buckets:
            with open(path, "wb") as file:
                checksummed = ChecksumWriter(file)
                for item, data in (*blobs, *tensors):
                    if self._cancelled.is_set():
                        return
                    on_host = data.cpu() if isinstance(data, torch.Tensor) else data
                    self._results.append(self._write_item(checksummed, on_host, item, name))
                    bar.update()
                self._checksums[name] = checksummed.entry
                file.flush()
                os.fsync(file.fileno())

    def _write_item(self, file: ChecksumWriter, data: Any, item: Any, name: str) -> Any:
        """Write one tensor or blob with torch's own function. Torch 2.6 has no transforms and no second format."""
        arguments = inspect.signature(torch_filesystem._write_item).parameters
        transforms: list[Any] = [self._writer.transforms] if "transforms" in arguments else []
        options: dict[str, Any] = {}
        if "serialization_format" in arguments:
            options["serialization_format"] = torch_filesystem.SerializationFormat.TORCH_SAVE
        write: Callable[..., Any] = torch_filesystem._write_item
        return write(*transforms, file, data, item, name, **options)

    def cancel(self) -> None:
        """Let `write` stop before its next tensor. Not collective."""
        self._cancelled.set()

    def complete(self) -> None:
        """Write the metadata once all ranks have written. Without it the files are not a checkpoint. Collective.

        Raises:
            OSError: This rank couldn't write. The other ranks raise a RuntimeError with the same text.
        """
        with raise_on_all_ranks(f"writing {self.directory}"):
            if self.error is not None:
                raise self.error
        written: list[Any] | None = [None] * world_size() if is_rank_0() else None
        dist.gather_object((self._results, self._checksums), written)
        with raise_on_all_ranks(f"completing {self.directory}"), _errors_of_the_disk(self.directory):
            if written is not None:
                self._writer.finish(self._metadata, [results for results, _ in written])
                checksums = {name: entry for _, of_a_rank in written for name, entry in of_a_rank.items()}
                write_manifest(self.directory, checksums)
                with atomic_write(self.directory / METADATA_FILE) as file:
                    json.dump(dataclasses.asdict(CheckpointingConfig("torch_dist", 1)), file)


class _PlanningStrategy(TorchDistSaveShardedStrategy):
    """Core's strategy up to where it would write."""

    @property
    def of_this_core(self) -> tuple[str, ...]:
        """Further arguments of this Core's `async_save`: later versions have a second implementation."""
        return ("mcore",) if "async_strategy" in inspect.signature(self.async_save).parameters else ()

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any, *_: Any) -> ShardedSave:
        _, metadata, _ = save_state_dict_ret
        return ShardedSave(writer, metadata)


@contextlib.contextmanager
def _one_checksum() -> Iterator[None]:
    """Don't compute the checksum of each tensor's archive: it is twice as slow as the file's, and never checked."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _no_process_for_results() -> contextlib.AbstractContextManager[None]:
    """Don't let Core start a process for its writers' results: it would import the script again, and isn't needed."""
    return replaced(filesystem_async, _results_queue=queue.SimpleQueue())


@contextlib.contextmanager
def _errors_of_the_disk(directory: str | Path) -> Iterator[None]:
    """Raise the disk's own error, in one line. Torch's archive writer fails again while closing, and reports only that.

    Raises:
        OSError: The body couldn't write.
    """
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None:
            raise
        raise OSError(
            cause.errno,
            f"{directory} can't be written on rank {rank()} ({cause.strerror}): make it writable or free space there, "
            "and start again: the run resumes from the last complete checkpoint",
        ) from error
