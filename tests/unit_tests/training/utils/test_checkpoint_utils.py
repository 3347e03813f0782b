# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The public names of a checkpoint's files: where they say things are, and that reading gives fresh objects."""

import pytest
import torch

from megatron.bridge.training.state import TrainState
from megatron.bridge.training.utils import checkpoint_utils as names


def test_names_are_the_ones_that_megatron_bridge_writes(tmp_path):
    root = str(tmp_path)
    assert names.get_checkpoint_name(root, 10) == f"{root}/iter_0000010"
    assert names.get_checkpoint_name(root, 12_345_678) == f"{root}/iter_12345678"
    assert names.get_checkpoint_name(root, 0, True) == f"{root}/release"
    assert names.get_checkpoint_train_state_filename(root) == f"{root}/train_state.pt"
    assert names.get_checkpoint_train_state_filename(root, names.TRACKER_PREFIX) == f"{root}/latest_train_state.pt"
    assert names.get_checkpoint_run_config_filename(root) == f"{root}/run_config.yaml"
    assert names.get_checkpoint_tracker_filename(root) == f"{root}/latest_checkpointed_iteration.txt"


def test_directories_are_made_and_told_apart(tmp_path):
    file = tmp_path / "run" / "checkpoints" / "file"
    names.ensure_directory_exists(str(file))
    assert names.file_exists(str(file.parent)) and not names.file_exists(str(file))
    names.ensure_directory_exists(file, check_parent=False)
    assert file.is_dir()
    iteration = tmp_path / "iter_0000003"
    iteration.mkdir()
    assert names.is_checkpoint_iteration_directory(str(iteration))
    assert not names.is_checkpoint_iteration_directory(str(tmp_path))
    assert not names.is_hf_checkpoint_dir(str(iteration))
    (iteration / "config.json").write_text("{}")
    (iteration / "model.safetensors").touch()
    assert names.is_hf_checkpoint_dir(str(iteration))


def test_a_checkpoint_exists_once_the_tracker_says_so(tmp_path):
    assert not names.checkpoint_exists(None)
    assert not names.checkpoint_exists(str(tmp_path))
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    assert names.checkpoint_exists(str(tmp_path))


def test_a_train_state_is_read_anew_each_time(tmp_path):
    path = names.get_checkpoint_train_state_filename(str(tmp_path))
    torch.save(TrainState(step=6, consumed_train_samples=48, do_train=True).state_dict(), path)
    first = names.read_train_state(path)
    first.step += 100
    assert names.read_train_state(path) == TrainState(step=6, consumed_train_samples=48, do_train=True)
    names.read_train_state.cache_clear()


def test_a_run_config_is_plain_data_read_anew_each_time(tmp_path):
    path = tmp_path / names.CONFIG_FILE
    path.write_text("model:\n  _target_: os.system\n  num_layers: 2\n")
    config = names.read_run_config(str(path))
    assert config == {"model": {"_target_": "os.system", "num_layers": 2}}
    config["model"].clear()
    assert names.read_run_config(str(path))["model"]["num_layers"] == 2
    names.read_run_config.cache_clear()


@pytest.mark.parametrize(
    ("content", "expected"), [("- 1", "expected a mapping of sections"), ("a: [", "isn't readable YAML")]
)
def test_a_damaged_run_config_names_the_file(tmp_path, content, expected):
    path = tmp_path / names.CONFIG_FILE
    path.write_text(content)
    with pytest.raises(ValueError, match=expected) as error:
        names.read_run_config(path)
    assert str(path) in str(error.value)


def test_a_missing_or_damaged_train_state_names_the_file(tmp_path):
    path = tmp_path / names.TRAIN_STATE_FILE
    with pytest.raises(FileNotFoundError, match="train_state.pt"):
        names.read_train_state(path)
    path.write_bytes(b"no train state")
    with pytest.raises(ValueError, match="can't be read as plain data"):
        names.read_train_state(path)
    torch.save({"step": torch.tensor(1)}, path)
    with pytest.raises(ValueError, match="lacks"):
        names.read_train_state(path)


def test_the_hugging_face_model_of_a_checkpoint_is_the_one_it_names(tmp_path):
    iteration = tmp_path / "iter_0000000"
    iteration.mkdir()
    (iteration / names.CONFIG_FILE).write_text("model:\n  hf_model_id: some/model\n")
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        names.get_hf_model_id_from_checkpoint(str(iteration))
    (iteration / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    (iteration / ".metadata").touch()
    (iteration / "__0_0.distcp").touch()
    assert names.get_hf_model_id_from_checkpoint(str(iteration)) == "some/model"
