# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""File names in a checkpoint directory: which iterations it has, which is the latest, which can be removed.

    <root>/latest_checkpointed_iteration.txt    the iteration, or "release": written last, it commits a save
    <root>/latest_train_state.pt                copy of that iteration's train state
    <root>/iter_0000010/                        .metadata, metadata.json, __*_*.distcp, run_config.yaml, train_state.pt,
                                                manifest.json (see `manifest`)

Megatron Bridge and Megatron-LM use the same names. Nothing here touches a tensor.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron.bridge.checkpoint.manifest import check_files_of, is_small_file
from megatron.bridge.utils.files import atomic_write, clean_up, remove_directory

TRACKER_FILE = "latest_checkpointed_iteration.txt"
TRACKER_PREFIX = "latest"
TRAIN_STATE_FILE = "train_state.pt"
CONFIG_FILE = "run_config.yaml"
METADATA_FILE = "metadata.json"
DCP_METADATA_FILE = ".metadata"
TOKENIZER_DIRECTORY = "tokenizer"

OPTIMIZER_KEY = re.compile(r"(chained_\d+\.)?optimizer\.")
"""Start of the keys of optimizer state. A model with experts has a chain of several optimizers."""

_MOST_DIGITS = 18
_ITERATION_NAME = re.compile(r"iter_(\d{7,})")


@dataclass(frozen=True)
class Tracker:
    """The latest complete checkpoint, as named by the tracker file."""

    iteration: int
    release: bool = False


def checkpoint_name(root: str | os.PathLike, iteration: int, *, release: bool = False) -> Path:
    """The directory of one iteration: `<root>/iter_0000010`, or `<root>/release`."""
    return Path(root) / ("release" if release else f"iter_{iteration:07d}")


def unfinished_name(root: str | os.PathLike, iteration: int) -> Path:
    """Directory of a save that is not complete yet: `<root>/.iter_0000010.saving`."""
    return Path(root) / f".{checkpoint_name(root, iteration).name}.saving"


def replaced_name(root: str | os.PathLike, iteration: int) -> Path:
    """Directory of an iteration while a new save takes its name: `<root>/.iter_0000010.old`."""
    return unfinished_name(root, iteration).with_suffix(".old")


def leftovers(root: str | os.PathLike) -> list[Path]:
    """Directories that killed processes left behind: partial saves, replaced iterations, partly removed ones."""
    return sorted(path for end in ("saving", "old", "removed") for path in Path(root).glob(f".iter_*.{end}"))


def clear_leftovers(root: str | os.PathLike) -> None:
    """Remove what killed processes left behind. An iteration that was only renamed gets its name back.

    Logs a warning for what can't be removed.
    """
    for path in leftovers(root):
        directory = path.with_name(path.name[1:].rpartition(".")[0])
        if path.suffix == ".old" and not os.path.lexists(directory):
            os.replace(path, directory)
        else:
            clean_up(path)


def read_tracker(root: str | os.PathLike) -> Tracker | None:
    """Read the tracker file.

    Returns:
        None where there is no tracker file.

    Raises:
        ValueError: The file holds neither an iteration nor "release".
    """
    path = Path(root) / TRACKER_FILE
    try:
        text = path.read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return None
    if text == "release":
        return Tracker(0, release=True)
    if not (text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS):
        whole = _complete_iterations(root)
        way_out = f"write the newest complete one into it: {whole[-1]}" if whole else "no complete iteration is there"
        raise ValueError(f"{path} holds {text[:40]!r}: expected an iteration number or 'release'; {way_out}")
    return Tracker(int(text))


def write_tracker(root: str | os.PathLike, iteration: int, *, release: bool = False) -> None:
    """Commit a checkpoint: after this it is the latest one. Atomic."""
    with atomic_write(Path(root) / TRACKER_FILE) as file:
        file.write("release" if release else str(iteration))


def iteration_of(path: str | os.PathLike) -> int | None:
    """The iteration in a directory's name; None if it isn't the directory of an iteration."""
    match = _ITERATION_NAME.fullmatch(Path(path).name)
    return int(match.group(1)) if match else None


def is_iteration_directory(path: str | os.PathLike) -> bool:
    """Whether `path` is one iteration's directory (`iter_N` or `release`), rather than the root of many."""
    path = Path(path)
    is_release = path.name == "release" and not (path / TRACKER_FILE).exists()  # a root may have that name, too
    return path.is_dir() and (iteration_of(path) is not None or is_release)


def is_hf_directory(path: str | os.PathLike) -> bool:
    """Whether `path` holds a Hugging Face model: `config.json` and safetensors weights."""
    path = Path(path)
    return (path / "config.json").is_file() and any(path.glob("*.safetensors"))


def why_incomplete(directory: str | os.PathLike) -> str | None:
    """The reason why an iteration's directory is not a complete checkpoint, as text; None if it is complete."""
    directory = Path(directory)
    if not directory.is_dir():
        return "there is no such directory"
    for name in (METADATA_FILE, DCP_METADATA_FILE):
        if not (directory / name).is_file():
            return f"{name} is missing: the save that wrote it did not finish"
    try:
        backend = json.loads((directory / METADATA_FILE).read_text(encoding="utf-8"))["sharded_backend"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"{METADATA_FILE} is damaged: expected JSON with 'sharded_backend'"
    if backend != "torch_dist":
        return f"its format is {backend!r}, as {METADATA_FILE} says: expected 'torch_dist'"
    if not any(directory.glob("__*.distcp")):
        return "it has no __*.distcp file: the tensors are missing"
    return None


def is_complete(directory: str | os.PathLike) -> bool:
    """Whether an iteration's directory holds a complete checkpoint."""
    return why_incomplete(directory) is None


def iterations(root: str | os.PathLike) -> Iterator[tuple[int, Path]]:
    """The (iteration, directory) pairs below a root, oldest first, complete or not."""
    root = Path(root)
    found = [(iteration_of(path), path) for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    yield from sorted((iteration, path) for iteration, path in found if iteration is not None)


def _complete_iterations(root: str | os.PathLike) -> list[int]:
    return [iteration for iteration, path in iterations(root) if is_complete(path)]


def newer_than_tracker(root: str | os.PathLike) -> list[Path]:
    """Complete iterations newer than the tracker's, e.g. because a save was killed before it moved the tracker."""
    tracker = read_tracker(root)
    if tracker is None or tracker.release:
        return []
    return [path for iteration, path in iterations(root) if iteration > tracker.iteration and is_complete(path)]


def checkpoint_exists(root: str | os.PathLike | None) -> bool:
    """Whether a directory names a checkpoint to load: a root with a tracker file, or an iteration's own directory.

    An incomplete one counts: `resolve_checkpoint` refuses it. Otherwise a run would silently start from scratch.
    """
    if root is None:
        return False
    return read_tracker(root) is not None or (is_iteration_directory(root) and any(Path(root).iterdir()))


def resolve_checkpoint(path: str | os.PathLike, ckpt_step: int | None = None, *, option: str = "path") -> Path:
    """Find an iteration as `find_checkpoint` does, and verify its small files.

    The tokenizer's directory may be missing as a whole. A checkpoint is complete without it.

    Args:
        path: See `find_checkpoint`.
        ckpt_step: See `find_checkpoint`.
        option: See `find_checkpoint`.

    Raises:
        FileNotFoundError: There is no checkpoint, or not that iteration.
        ValueError: The checkpoint is not complete, or a file other than the tensors' is damaged.
    """
    directory = find_checkpoint(path, ckpt_step, option=option)
    removed = () if (directory / TOKENIZER_DIRECTORY).exists() else (f"{TOKENIZER_DIRECTORY}/",)
    check_files_of(directory, lambda name: is_small_file(name) and not name.startswith(removed))
    return directory


def find_checkpoint(path: str | os.PathLike, ckpt_step: int | None = None, *, option: str = "path") -> Path:
    """Find the directory of the iteration that a path stands for.

    Args:
        path: A root with a tracker file, or an `iter_N` or `release` directory itself.
        ckpt_step: This iteration instead of the tracker's.
        option: The configuration option that named the path, for errors.

    Raises:
        FileNotFoundError: There is no checkpoint, or not that iteration.
        ValueError: The checkpoint is not complete.
    """
    root = Path(path).expanduser()
    named = f"{option}={str(path)!r}"
    if ckpt_step is not None:
        directory = _standing(root, ckpt_step)
        if not directory.is_dir():
            there = ", ".join(str(iteration) for iteration, _ in iterations(root)) or "none"
            raise FileNotFoundError(
                f"{named} has no iteration {ckpt_step} (checkpoint.ckpt_step); there: {there}; name one of these"
            )
    elif is_iteration_directory(root):
        directory = root
    else:
        tracker = read_tracker(root)
        if tracker is None:
            raise FileNotFoundError(
                f"{named} holds no checkpoint: {root / TRACKER_FILE} is missing; name a directory that a save wrote, "
                "or one of its iter_N directories"
            )
        directory = _standing(root, tracker.iteration, release=tracker.release)
    missing = why_incomplete(directory)
    if missing is not None:
        whole = ", ".join(map(str, _complete_iterations(directory.parent)))
        way_out = f"; complete iterations there: {whole} (checkpoint.ckpt_step)" if whole else ""
        named_by = "" if directory.is_dir() else f", though {TRACKER_FILE} names it"
        raise ValueError(f"{directory} ({option}) is not a complete checkpoint: {missing}{named_by}{way_out}")
    return directory


def _standing(root: str | os.PathLike, iteration: int, *, release: bool = False) -> Path:
    """An iteration's directory, or the `.old` one if a save was killed before the new directory got its name."""
    directory = checkpoint_name(root, iteration, release=release)
    taken_aside = replaced_name(root, iteration)
    return taken_aside if not release and not directory.exists() and taken_aside.is_dir() else directory


def prune(root: str | os.PathLike, keep: int, *, retain_interval: int | None = None) -> list[Path]:
    """Remove the oldest iterations of a root, keeping the newest `keep` complete ones and the tracker's.

    Args:
        root: Directory of iterations.
        keep: How many to keep; 0 or less keeps all.
        retain_interval: Also keep each iteration that is a multiple of this. None: no such rule.

    If an iteration is a link, only the link is removed. A dangling link is removed if it is older than those kept.

    Returns:
        The directories and links that were removed. A warning names what could not be removed.
    """
    if keep <= 0:
        return []
    whole = [(iteration, path) for iteration, path in iterations(root) if is_complete(path)]
    dangling = [(iteration, path) for iteration, path in _dangling(root) if whole and iteration < whole[-keep:][0][0]]
    tracker = read_tracker(root)
    removed = []
    for iteration, path in sorted(whole[:-keep] + dangling):
        is_the_trackers = tracker is not None and not tracker.release and iteration == tracker.iteration
        if is_the_trackers or (retain_interval is not None and iteration % retain_interval == 0):
            continue
        if remove_directory(path):
            removed.append(path)
    return removed


def _dangling(root: str | os.PathLike) -> list[tuple[int, Path]]:
    """(iteration, link) pairs of links whose directory is missing, perhaps because its disk is not mounted."""
    found = [(iteration_of(path), path) for path in Path(root).iterdir() if path.is_symlink() and not path.exists()]
    return [(iteration, path) for iteration, path in found if iteration is not None]


def remove_from_step(root: str | os.PathLike, step: int) -> None:
    """Remove the iterations of `step` and later steps, and the tracker if it names one of them."""
    tracker = read_tracker(root)
    if tracker is not None and tracker.iteration >= step:
        (Path(root) / TRACKER_FILE).unlink()
    for iteration, path in iterations(root):
        if iteration >= step:
            remove_directory(path)
