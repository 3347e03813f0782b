# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Files and directories that are either there in full or not at all, with the permissions that the umask gives."""

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
"""Bytes of a file's name, on the file systems that are in use."""


def is_below(name: str) -> bool:
    """Whether a name that a file gives leads to a file below the file's directory, on any system's disk."""
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
    """A name that nothing has, in the same directory, for what becomes `path`."""
    short = path.name.encode()[: _LONGEST_NAME - 42].decode(errors="ignore")
    return path.with_name(f".{short}.{uuid.uuid4().hex[:8]}.partial")


def use_umask(path: str | os.PathLike) -> None:
    """Give a new file the permissions that it would have had, had its writer left them to the umask.

    A file made on the way shows them: asking for the umask would change it for other threads.

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
    """Give a complete directory its name. What stood there goes after it is replaced; its permissions stay.

    No directory can be replaced in one step: killed between two, the old one stands beside `source` as `.old`.

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
    """Remove a directory so that no one ever sees a part of it under its name; of a link, the link alone.

    Args:
        path: Killed on the way, its rest stands beside it as `.<name>.removed`.

    Returns:
        Whether nothing stands under that name any more. If not, a warning says why; so it does where a rest stays.
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
    """Remove what isn't needed any more: a directory, a file, or a link and not what it points to.

    Nothing is lost where it stays, so that it fails with a warning.

    Returns:
        Whether it is gone.
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
    """Flush a directory's entries, so that a rename in it survives a crash."""
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
