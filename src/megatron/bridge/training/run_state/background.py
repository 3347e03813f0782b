# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A save whose files are written while training continues (`checkpoint.async_save`), one at a time.

What is saved is copied first; a thread of each rank writes the copies. The closing steps are those of any save, taken
by all ranks together at the first step at which all have written.
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
"""How far a rank is; the lowest of all ranks counts."""


class BackgroundSave:
    """This rank's part of a save in flight."""

    def __init__(self, save: ShardedSave, close: Callable[[], Path]) -> None:
        """Copy what this rank writes, and start to write it. Call on all ranks.

        Args:
            save: Planned, and not yet written.
            close: What remains to be done when all is on disk, with all ranks; gives the iteration's directory.
        """
        self._save = save
        self._close = close
        with raise_on_all_ranks(f"copying what is saved to {save.directory}"):
            save.copy_tensors()
        self._thread = threading.Thread(target=save.write, name="checkpoint writer")
        self._thread.start()

    def finish(self, *, wait: bool) -> Path | None:
        """Take the closing steps if all ranks have written. Call on all ranks.

        Args:
            wait: Wait until they have.

        Returns:
            The iteration's directory; None while a rank still writes.

        Raises:
            OSError: This rank couldn't write; on the other ranks a RuntimeError that carries its text.
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
        """Stop writing; what is on disk stays a partial save. No other rank needs to take part."""
        self._save.cancel()
        self._thread.join()
