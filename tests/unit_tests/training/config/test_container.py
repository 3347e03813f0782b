# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A configuration to YAML and back, and files that are refused."""

import pytest
import torch
from megatron.core.transformer.enums import AttnBackend

from megatron.bridge.training.config import ConfigContainer, ConfigFileError, runtime_config_update
from megatron.bridge.utils.yaml_io import dump_yaml
from tests.rigs.config_examples import make_config


def make_varied_config() -> ConfigContainer:
    return make_config(
        "mixed_precision=bf16_mixed",
        "model.params_dtype=bfloat16",
        "model.attention_backend=unfused",
        "model.window_size=[4,4]",
        "checkpoint.save=a/b",
        "profiling.profile_ranks=[0,1]",
        "env_vars.NAME=value",
        "dataset.dataset_kwargs.chat=true",
    )


def test_yaml_round_trip(tmp_path):
    cfg = make_varied_config()
    text = cfg.to_yaml(tmp_path / "run_config.yaml")
    assert (tmp_path / "run_config.yaml").read_text() == text
    read = ConfigContainer.from_yaml(tmp_path / "run_config.yaml")
    assert read == cfg and read is not cfg
    assert type(read.model) is type(cfg.model)
    assert read.model.activation_func is torch.nn.functional.silu
    assert read.model.attention_backend is AttnBackend.unfused
    assert read.model.params_dtype is torch.bfloat16
    assert read.model.window_size == (4, 4)
    assert read.to_dict() == cfg.to_dict()
    assert ConfigContainer.from_dict(cfg.to_dict()) == cfg


def test_yaml_of_a_run_in_progress_reads_back_and_works():
    cfg = make_varied_config()
    runtime_config_update(cfg)
    cfg.model.grad_scale_func = lambda loss: loss  # as the training loop hangs it in
    cfg.model.finalize_model_grads_func = cfg.validate
    read = ConfigContainer.from_dict(cfg.to_dict())
    assert read.model.grad_scale_func is None
    assert read.model.init_method.keywords == cfg.model.init_method.keywords
    runtime_config_update(read)
    assert read.derive(1) == cfg.derive(1)
    assert read.to_dict() == cfg.to_dict()


def test_yaml_has_the_known_form():
    saved = make_varied_config().to_dict()
    assert saved["_target_"] == "megatron.bridge.training.config.ConfigContainer"
    assert saved["train"]["_target_"] == "megatron.bridge.training.config.TrainingConfig"
    assert saved["optimizer"]["_target_"] == "megatron.bridge.training.config.OptimizerConfig"
    assert saved["dataset"]["_target_"] == "megatron.bridge.training.config.GPTSFTDatasetConfig"
    assert saved["model"]["params_dtype"] == {"_target_": "torch.bfloat16", "_call_": False}
    assert saved["model"]["activation_func"] == {"_target_": "torch.nn.functional.silu", "_call_": False}
    assert "data_parallel_size" not in saved and "lr_decay_steps" not in saved["scheduler"]


def test_a_short_yaml_needs_no_targets_for_known_sections(tmp_path):
    path = tmp_path / "short.yaml"
    path.write_text(
        "train: {micro_batch_size: 1, train_iters: 3}\n"
        "model: {num_layers: 1, hidden_size: 8, num_attention_heads: 1, seq_length: 8}\n"
        "optimizer: {lr: 1e-4}\n"
        "scheduler: {}\n"
        "dataset: {seq_length: 8, dataset_root: data}\n"
        "logger: {}\n"
        "tokenizer: {tokenizer_model: here}\n"
        "checkpoint: {}\n"
    )
    cfg = ConfigContainer.from_yaml(path)
    assert cfg.optimizer.lr == 1e-4
    cfg.validate(1)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda saved: saved["train"].update(train_itres=3),
            "config.train.train_itres is unknown: did you mean train_iters",
        ),
        (
            lambda saved: saved["train"].update(train_iters="many"),
            r"config.train.train_iters is many \(str\): expected int",
        ),
        (lambda saved: saved["train"].update(_target_="os.system"), "config.train._target_ is os.system: expected"),
        (lambda saved: saved.update(peft={"_target_": "builtins.exec"}), "config.peft._target_ is builtins.exec"),
        (lambda saved: saved.pop("model"), "config can't be a ConfigContainer.*'model'"),
        (lambda saved: saved.update(_target_="megatron.bridge.training.config.RNGConfig"), "config"),
    ],
)
def test_a_bad_yaml_says_where(edit, message, tmp_path):
    saved = make_config().to_dict()
    edit(saved)
    path = tmp_path / "bad.yaml"
    dump_yaml(saved, path)
    with pytest.raises(ConfigFileError, match=message) as error:
        ConfigContainer.from_yaml(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_a_yaml_of_another_version_can_be_read_with_what_is_known(caplog):
    saved = make_config().to_dict()
    saved["model"]["of_the_future"] = 1
    with pytest.raises(ConfigFileError, match="config.model.of_the_future"):
        ConfigContainer.from_dict(saved)
    assert ConfigContainer.from_dict(saved, strict=False) == make_config()
    assert "config.model.of_the_future is unknown" in caplog.text


def test_a_lambda_is_not_saved_and_reading_says_so():
    cfg = make_config()
    cfg.model.activation_func = lambda x: x
    saved = cfg.to_dict()
    with pytest.raises(ConfigFileError, match="config.model.activation_func was <function .*set it in Python"):
        ConfigContainer.from_dict(saved)
    assert ConfigContainer.from_dict(saved, strict=False).model.activation_func is torch.nn.functional.silu


def test_print_yaml(capsys):
    make_config().print_yaml()
    assert "micro_batch_size: 2" in capsys.readouterr().out
