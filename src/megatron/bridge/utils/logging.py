# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Logging for a run of many ranks: rank 0 by default, and optionally a file for each rank."""

import logging
from collections.abc import Sequence
from pathlib import Path

from megatron.bridge.utils.distributed import rank
from megatron.bridge.utils.files import check_writable_directory

_RANK_FILE = "rank file"
"""Name of the handler, so that the next run in a process replaces it."""


class _RankFilter(logging.Filter):
    """Passes all records of rank 0 and only warnings of other ranks, unless all ranks are to log."""

    def __init__(self, *, all_ranks: bool) -> None:
        super().__init__()
        self._all_ranks = all_ranks

    def filter(self, record: logging.LogRecord) -> bool:
        own_rank = record.rank = rank()
        return self._all_ranks or own_rank == 0 or record.levelno >= logging.ERROR


class _ModuleFilter(logging.Filter):
    """Drops what some loggers, and those below them, say."""

    def __init__(self, modules: Sequence[str], *, warnings: bool) -> None:
        super().__init__()
        self._modules, self._lowest = modules, logging.ERROR if warnings else logging.WARNING

    def filter(self, record: logging.LogRecord) -> bool:
        is_named = any(record.name == module or record.name.startswith(f"{module}.") for module in self._modules)
        return not is_named or record.levelno >= self._lowest


def filter_modules(modules: Sequence[str] | None, *, warnings: bool = True) -> None:
    """Leave out what some loggers say, whatever shows it; a second call replaces the first.

    Args:
        modules: Names of loggers; those below them are left out too. None: nothing is left out.
        warnings: Leave out their warnings too; errors are always shown.
    """
    for handler in [*logging.getLogger().handlers, *logging.getLogger("megatron.bridge").handlers]:
        for old in [found for found in handler.filters if isinstance(found, _ModuleFilter)]:
            handler.removeFilter(old)
        if modules:
            handler.addFilter(_ModuleFilter(modules, warnings=warnings))


def set_level_of_all(level: int) -> None:
    """Give every logger there is, and those made later, a level."""
    logging.getLogger().setLevel(level)
    for name in logging.root.manager.loggerDict:
        logging.getLogger(name).setLevel(level)


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


def log_to_rank_file(directory: str | Path | None) -> None:
    """Also write all of this rank's records to a file of its own. A new run appends.

    Args:
        directory: Directory of `rank_00000.log` and so on. None: write no file, and stop writing an earlier run's.

    Raises:
        ValueError: It can't be written.
    """
    ours = logging.getLogger("megatron.bridge")
    for handler in [handler for handler in ours.handlers if handler.name == _RANK_FILE]:
        ours.removeHandler(handler)
        handler.close()
    if directory is None:
        return
    check_writable_directory(directory, "logger.rank_log_dir")
    file = logging.FileHandler(Path(directory) / f"rank_{rank():05d}.log", encoding="utf-8")
    file.name = _RANK_FILE
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s"))
    ours.addHandler(file)
