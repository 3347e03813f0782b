# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What scripts ask of a checkpoint's files, on directories made here."""

import pytest
import torch

from megatron.bridge.checkpoint.iterations import TRACKER_FILE
from megatron.bridge.training import checkpointing
from megatron.bridge.training.utils.checkpoint_utils import join_paths


def _iteration(root, step):
    directory = root / f"iter_{step:07d}"
    directory.mkdir()
    (directory / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    for name in (".metadata", "__0_0.distcp"):
        (directory / name).touch()
    return directory


def test_an_iteration_is_found_once_it_is_complete(tmp_path):
    directory = _iteration(tmp_path, 3)
    assert checkpointing.find_checkpoint_rank_0(tmp_path, 3) == str(directory)
    assert checkpointing.find_checkpoint_rank_0(tmp_path, 4) is None
    (directory / ".metadata").unlink()
    assert checkpointing.find_checkpoint_rank_0(tmp_path, 3) is None


@pytest.mark.parametrize(("text", "expected"), [("12", (12, False)), ("release", (0, True))])
def test_a_tracker_names_an_iteration_or_release(tmp_path, text, expected):
    (tmp_path / TRACKER_FILE).write_text(text)
    assert checkpointing.read_metadata(join_paths(tmp_path, TRACKER_FILE)) == expected


def test_a_tracker_that_is_missing_or_another_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is missing"):
        checkpointing.read_metadata(tmp_path / TRACKER_FILE)
    with pytest.raises(ValueError, match="is no tracker"):
        checkpointing.read_metadata(tmp_path / "run_config.yaml")


def test_old_non_persistent_checkpoints_are_removed(tmp_path):
    kept = [_iteration(tmp_path, step) for step in (1, 2, 3)][1:]
    checkpointing.cleanup_old_non_persistent_checkpoint(tmp_path, leave_ckpt_num=2)
    assert sorted(tmp_path.iterdir()) == kept
    checkpointing.cleanup_old_non_persistent_checkpoint(tmp_path / "not there")


def test_extra_state_is_removed_from_a_model_and_from_chunks():
    weights = {"a.weight": torch.ones(1), "a._extra_state": None}
    assert list(checkpointing.delete_extra_state(dict(weights))) == ["a.weight"]
    whole = {"model0": dict(weights), "model1": dict(weights), "iteration": 1}
    assert [list(whole[key]) for key in checkpointing.delete_extra_state(whole) if key != "iteration"] == [
        ["a.weight"]
    ] * 2


def test_what_is_not_supported_says_so_by_name():
    checkpointing.set_checkpoint_version(checkpointing.get_checkpoint_version())
    with pytest.raises(ValueError, match="checkpoint version 2.0"):
        checkpointing.set_checkpoint_version(2.0)
    checkpointing.maybe_save_dataloader_state(None, None, 1, None)
    with pytest.raises(ValueError, match="dataloader_load_path='there'"):
        checkpointing.maybe_load_dataloader_state(None, 1, "there")
    for name in ("preprocess_fsdp_dtensor_state_dict", "save_fsdp_dtensor_checkpoint", "load_fsdp_dtensor_checkpoint"):
        with pytest.raises(NotImplementedError, match=name):
            getattr(checkpointing, name)({})
    with pytest.raises(NotImplementedError, match="schedule_async_save"):
        checkpointing.schedule_async_save(None, None)
