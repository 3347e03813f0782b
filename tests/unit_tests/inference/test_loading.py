# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Which Hugging Face model a command line means. Loading itself: `tests/functional_tests/test_generate.py`."""

from argparse import Namespace

import pytest

from megatron.bridge.checkpoint.iterations import CONFIG_FILE, DCP_METADATA_FILE, METADATA_FILE
from megatron.bridge.inference.loading import resolve_hf_model_path


def checkpoint(directory, model):
    iteration = directory / "iter_0000003"
    iteration.mkdir()
    (iteration / CONFIG_FILE).write_text(f"model: {model}\n")
    (iteration / METADATA_FILE).write_text('{"sharded_backend": "torch_dist"}')
    for name in (DCP_METADATA_FILE, "__0_0.distcp"):
        (iteration / name).touch()
    return directory


def resolved(hf=None, megatron=None):
    return resolve_hf_model_path(Namespace(hf_model_path=hf, megatron_model_path=megatron))


def test_the_named_model_counts_before_the_checkpoints(tmp_path):
    path = checkpoint(tmp_path, "{hf_model_id: org/name}")
    assert resolved(hf="my/model") == resolved(hf="my/model", megatron=path) == "my/model"


def test_a_checkpoint_says_which_model_it_came_from(tmp_path):
    assert resolved(megatron=checkpoint(tmp_path, "{hf_model_id: org/name}") / "iter_0000003") == "org/name"


def test_a_checkpoint_that_does_not_say_it_is_named(tmp_path):
    with pytest.raises(ValueError, match="doesn't say which Hugging Face model it came from: pass --hf-model-path"):
        resolved(megatron=checkpoint(tmp_path, "{num_layers: 2}") / "iter_0000003")


def test_something_must_be_named(tmp_path):
    with pytest.raises(ValueError, match="no model is named: pass --hf-model-path or --megatron-model-path"):
        resolved()
    with pytest.raises(FileNotFoundError):
        resolved(megatron=tmp_path / "none")
