# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Logging for a run of many ranks: one voice by default."""

import logging

from megatron.bridge.utils.distributed import rank


class _RankFilter(logging.Filter):
    """Lets rank 0 speak; other ranks only warn, unless all ranks are asked to log."""

    def __init__(self, *, all_ranks: bool) -> None:
        super().__init__()
        self._all_ranks = all_ranks

    def filter(self, record: logging.LogRecord) -> bool:
        record.rank = rank()
        return self._all_ranks or record.rank == 0 or record.levelno >= logging.ERROR


def setup_logging(level: int = logging.INFO, *, all_ranks: bool = False) -> None:
    """Send this package's log records to standard error, from rank 0 only unless asked otherwise.

    A program that configured the root logger itself keeps its own handlers.

    Args:
        level: Lowest level shown.
        all_ranks: Show every rank's records.
    """
    ours = logging.getLogger("megatron.bridge")
    ours.setLevel(level)
    if logging.getLogger().handlers or ours.handlers:
        return
    stream = logging.StreamHandler()
    stream.setFormatter(logging.Formatter("%(asctime)s [rank %(rank)d] %(levelname).1s %(message)s", "%H:%M:%S"))
    stream.addFilter(_RankFilter(all_ranks=all_ranks))
    ours.addHandler(stream)
    ours.propagate = False
