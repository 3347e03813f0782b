# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Which class saves and loads a run."""

import pytest

from megatron.bridge.training.checkpointing import (
    CheckpointManager,
    DefaultCheckpointManager,
    create_checkpoint_manager,
    load_checkpoint,
    save_checkpoint,
)
from megatron.bridge.training.config import CheckpointConfig


class Recording:
    def __init__(self, checkpoint_config):
        self.config = checkpoint_config

    def save(self, ctx): ...
    def load(self, ctx): ...
    def finalize_async_saves(self, state, blocking=False, terminate=False): ...


class Unfinished:
    def save(self, ctx): ...


def test_the_default_manager_and_one_by_name():
    default = create_checkpoint_manager(CheckpointConfig())
    assert type(default) is DefaultCheckpointManager and isinstance(default, CheckpointManager)
    config = CheckpointConfig(custom_manager_class=f"{__name__}.Recording")
    own = create_checkpoint_manager(config)
    assert type(own) is Recording and own.config is config


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("torch.not_there.Manager", "import torch.not_there in the script"),
        ("Manager", "name it as module.Class"),
        ("no_such_package.Manager", "name it as module.Class"),
        (f"{__name__}.Unfinished", r"has no load\(\)"),
    ],
)
def test_a_class_that_is_not_imported_or_no_manager_is_refused(name, says):
    with pytest.raises(ValueError, match=f"custom_manager_class='{name}'.*{says}"):
        create_checkpoint_manager(CheckpointConfig(custom_manager_class=name))


@pytest.mark.parametrize("name", ["pipeline_rank", "tensor_rank", "preprocess_common_state_dict_fn", "module_name"])
def test_a_save_refuses_by_name_what_only_megatron_bridge_does(name):
    with pytest.raises(ValueError, match=f"{name}=0 is not supported"):
        save_checkpoint(None, [], None, None, **{name: 0})
    if name == "module_name":
        with pytest.raises(ValueError, match=f"{name}=0 is not supported"):
            load_checkpoint(None, [], None, None, module_name=0)
