# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The files of local checkpoints, one for each rank: `<dir>/<rank>/iter_0000010_<rank>_local.pt`.

nvidia-resiliency-ext's `LocalCheckpointManager` writes them, finds the steps that all ranks have, and keeps only the
newest. This module adds what it lacks: files are read without executing anything, a failing rank doesn't leave the
others waiting, and files of a killed save, or of steps that the run has abandoned, don't get in the way.

Import it only if nvidia-resiliency-ext is installed.
"""

import zipfile
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.tensor_aware_state_dict import MCoreTensorAwareStateDict
from nvidia_resiliency_ext.checkpointing.local.ckpt_managers.local_manager import LocalCheckpointManager

from megatron.bridge.checkpoint.safe_pickle import read_blob
from megatron.bridge.utils.device import synchronize
from megatron.bridge.utils.distributed import raise_on_all_ranks


class LocalCheckpointFiles(LocalCheckpointManager):
    """This rank's local checkpoints. All methods but `path_of` and `read` must be called on all ranks."""

    distribution: Any = None
    """Which rank writes what. Core determines it at the first save of a run."""

    def path_of(self, step: int) -> Path:
        """This rank's file of a step."""
        return self._local_ckpt_path_from_id(self._ckpt_id(step))

    def steps_by_rank(self) -> list[set[int]]:
        """The steps for which each rank has a file, as found by `find_latest`."""
        return [{step for step, _, _ in ids} for ids in self.globally_available_ids]

    def remove_from(self, step: int) -> None:
        """Remove this rank's files of `step` and later steps, and those of a killed save.

        A run that resumes from an earlier step abandons the later ones.
        """
        with raise_on_all_ranks("removing abandoned local checkpoints"):
            self._ensure_dir()
            for path in self.local_ckpt_dir.glob(self._filename_from_template("*", "*", "*")):
                if self._filename_to_id(path.name)[0] >= step or ".dirty" in path.suffixes:
                    path.unlink()
        self.latest_iteration = -1

    def read(self, path: Path, *, mmap: bool = False) -> MCoreTensorAwareStateDict:
        """Read a file without executing anything in it.

        Args:
            path: The file.
            mmap: Map the tensors instead of reading them, to look at the rest. Their checksums are not compared then.

        Raises:
            ValueError: The file is damaged, or holds anything but a local checkpoint.
        """
        try:
            if not mmap:
                _check_sums(path)
            content = read_blob(path, classes=(MCoreTensorAwareStateDict, ShardedTensor, ShardedObject), mmap=mmap)
        except (ValueError, zipfile.BadZipFile) as error:
            raise ValueError(_damaged(path, str(error))) from error
        if not isinstance(content, MCoreTensorAwareStateDict):
            raise ValueError(_damaged(path, f"it holds a {type(content).__name__}"))
        return content

    def _load(self, ckpt_id: Any) -> MCoreTensorAwareStateDict:
        return self.read(self._local_ckpt_path_from_id(ckpt_id))

    def _load_fn(self, ckpt_id: Any) -> MCoreTensorAwareStateDict:
        return self._load(ckpt_id)  # tensors stay on the host: the device has no room for a second optimizer

    def _save_fn(self, id_to_state_dict: dict[Any, Any]) -> None:
        with raise_on_all_ranks("writing a local checkpoint"):
            synchronize()  # the copies to pinned memory were only queued
            super()._save_fn(id_to_state_dict)


def _check_sums(path: Path) -> None:
    """Compare the content with the checksums that torch writes but never checks.

    Raises:
        zipfile.BadZipFile: A byte changed, or the file is cut off.
    """
    with zipfile.ZipFile(path) as archive:
        changed = archive.testzip()
    if changed is not None:
        raise zipfile.BadZipFile(f"the checksum of {changed} in it is wrong")


def _damaged(path: Path, reason: str) -> str:
    return (
        f"{path} can't be read as a local checkpoint: {reason}; remove it, and the run resumes from the newest "
        "checkpoint that all ranks can read"
    )
