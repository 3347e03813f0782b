# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A save that is written while training continues (`checkpoint.async_save`). There is at most one at a time.

The state is copied first, and a thread on each rank writes the copies. After the first step at which all ranks have
written, they complete the save together, in the same way as any other save.
"""

import threading
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from megatron.bridge.checkpoint.sharded_save import ShardedSave
from megatron.bridge.utils.device import current_device
from megatron.bridge.utils.distributed import raise_on_all_ranks

_FAILED, _WRITING, _WRITTEN = -1, 0, 1
"""Progress of a rank's writing. The lowest of all ranks decides."""


class BackgroundSave:
    """This rank's part of a save in the background."""

    def __init__(self, save: ShardedSave, close: Callable[[], Path]) -> None:
        """Copy what this rank writes and start writing it. Call on all ranks.

        Args:
            save: A planned save that is not written yet.
            close: Completes the save with all ranks once all files are on disk; returns the iteration's directory.
        """
        self._save = save
        self._close = close
        with raise_on_all_ranks(f"copying what is saved to {save.directory}"):
            save.copy_tensors()
        self._thread = threading.Thread(target=save.write, name="checkpoint writer")
        self._thread.start()

    @property
    def root(self) -> Path:
        """The directory that the iteration appears in."""
        return Path(self._save.directory).parent

    def finish(self, *, wait: bool) -> Path | None:
        """Complete the save if all ranks have written. Call on all ranks.

        Args:
            wait: Wait until all ranks have written.

        Returns:
            The iteration's directory; None while a rank is still writing.

        Raises:
            OSError: This rank couldn't write. The other ranks raise a RuntimeError with the same text.
        """
        if wait:
            self._thread.join()
        slowest = torch.tensor(self._progress(), device=current_device())
        dist.all_reduce(slowest, op=dist.ReduceOp.MIN)
        if slowest.item() == _WRITING:
            return None
        if slowest.item() == _FAILED:
            self._save.cancel()
        self._thread.join()
        self._save.complete()
        return self._close()

    def _progress(self) -> int:
        if self._save.error is not None:
            return _FAILED
        return _WRITING if self._thread.is_alive() else _WRITTEN

    def abandon(self) -> None:
        """Stop writing and leave a partial save on disk. Not collective."""
        self._save.cancel()
        self._thread.join()
