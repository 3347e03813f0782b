# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Write files and directories atomically, with the permissions of the umask."""

import contextlib
import logging
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

logger = logging.getLogger(__name__)

_LONGEST_NAME = 255
"""Longest file name in bytes on common file systems."""


def is_below(name: str) -> bool:
    """Whether a relative path stays below its directory, on any operating system."""
    path = PurePosixPath(name)
    is_short = all(len(part.encode("utf-8", errors="replace")) <= _LONGEST_NAME for part in path.parts)
    return is_short and name.isprintable() and not path.is_absolute() and ".." not in path.parts and name != ""


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file beside `path` for writing; on success it replaces `path` in one step, on failure it is removed.

    The data and the directory entry are flushed to disk before and after the rename, so a crash leaves either the
    old file or the new one.

    Args:
        path: The file to replace.
        mode: `w` (UTF-8 text) or `wb`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _name_beside(path)
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)  # not mkstemp, which ignores the umask
    try:
        with os.fdopen(descriptor, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        fsync_directory(path.parent)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(beside)
        raise


@contextlib.contextmanager
def replaced_directory(path: str | os.PathLike) -> Iterator[Path]:
    """A directory beside `path` to fill; on success it takes `path`'s place, on failure it is removed.

    Args:
        path: The directory to replace; an old one is removed after the new one is complete.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _name_beside(path)
    beside.mkdir()
    try:
        yield beside
        move_directory(beside, path)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _name_beside(path: Path) -> Path:
    """An unused name in the same directory for a file that will become `path`."""
    short = path.name.encode()[: _LONGEST_NAME - 42].decode(errors="ignore")
    return path.with_name(f".{short}.{uuid.uuid4().hex[:8]}.partial")


def use_umask(path: str | os.PathLike) -> None:
    """Give a new file the permissions of the umask, which its writer has ignored.

    They are taken from a temporary file, since reading the umask would change it for other threads.

    Args:
        path: The file.
    """
    probe = _name_beside(Path(path))
    descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        os.chmod(path, stat.S_IMODE(os.fstat(descriptor).st_mode))
    finally:
        os.close(descriptor)
        os.unlink(probe)


def move_directory(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Rename a complete directory, replacing what has its new name. The permissions of a replaced directory are kept.

    A directory can't be replaced atomically. If the process is killed in between, the old one is left beside `source`
    as `.old`.

    Args:
        source: On the same file system as `target`.
        target: May exist, as a directory, a link or a file.
    """
    source, target = Path(source), Path(target)
    if os.path.lexists(target):
        old = source.with_suffix(".old")
        if target.is_dir():
            os.chmod(source, stat.S_IMODE(target.stat().st_mode))
        os.replace(target, old)
        os.replace(source, target)
        clean_up(old)
    else:
        os.replace(source, target)
    fsync_directory(target.parent)


def remove_directory(path: str | os.PathLike) -> bool:
    """Remove a directory so that a partial one is never visible under its name. Of a link, only the link is removed.

    If the process is killed in between, the rest is left beside it as `.<name>.removed`.

    Args:
        path: The directory or link.

    Returns:
        Whether the name is free now. A warning says why it isn't, or if a rest is left.
    """
    path = Path(path)
    if path.is_symlink():
        return clean_up(path)
    beside = path.with_name(f".{path.name}.removed")
    if os.path.lexists(beside) and not clean_up(beside):
        return False
    try:
        os.replace(path, beside)
    except OSError as error:
        _warn_of_rest(path, error)
        return False
    clean_up(beside)
    return True


def clean_up(path: str | os.PathLike) -> bool:
    """Remove a directory, a file, or a link (not its target) that isn't needed any more.

    Failing to remove it does no harm, so it only logs a warning.

    Returns:
        Whether it is removed.
    """
    path = Path(path)
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        _warn_of_rest(path, error)
        return False
    return True


def _warn_of_rest(path: Path, error: OSError) -> None:
    logger.warning(
        "%s is not needed any more and could not be removed (%s): remove it by hand, or the next save tries again",
        path,
        error.strerror or error,
    )


def fsync_directory(path: str | os.PathLike) -> None:
    """Flush a directory's entries to disk, so that a rename in it survives a crash."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable_directory(path: str | os.PathLike, option: str) -> None:
    """Create `path` if needed and write one file in it.

    Args:
        path: The directory.
        option: The configuration option that named it, for the error.

    Raises:
        ValueError: It can't be created or written.
    """
    try:
        directory = Path(path)
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as probe:
            probe.write(b"0")
    except OSError as error:
        raise ValueError(
            f"{option}={str(path)!r} can't be written ({error.strerror}): name a directory that this user can write"
        ) from error
