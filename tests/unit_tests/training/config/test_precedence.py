# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What the user sets in one section isn't dropped by another that writes there too."""

import dataclasses

import pytest
import torch

from megatron.bridge.training.config import (
    ConfigContainer,
    DistributedDataParallelConfig,
    MixedPrecisionConfig,
    OptimizerConfig,
    runtime_config_update,
)
from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides
from tests.rigs.config_examples import make_config

KEPT = [
    ("bf16_mixed", "ddp.grad_reduce_in_fp32", False),
    ("fp16_mixed", "ddp.grad_reduce_in_fp32", True),
    ("fp16_mixed", "optimizer.initial_loss_scale", 1024.0),
    ("fp16_mixed", "optimizer.loss_scale_window", 7.0),
    ("fp16_mixed", "optimizer.min_loss_scale", 2.0),
    ("fp16_mixed", "optimizer.hysteresis", 4),
]
REFUSED = [
    ("bf16_mixed", ["model.bf16=false"], "model.bf16=False contradicts mixed_precision=bf16_mixed"),
    ("bf16_mixed", ["model.fp16=true", "model.bf16=false"], "contradicts mixed_precision=bf16_mixed"),
    ("bf16_mixed", ["model.params_dtype=float32"], "model.params_dtype=torch.float32 contradicts"),
    ("fp16_mixed", ["optimizer.fp16=false"], "optimizer.fp16=False contradicts mixed_precision=fp16_mixed"),
    ("fp32", ["model.bf16=true"], "choose another mixed_precision"),
    (
        "bf16_mixed",
        ["mixed_precision.grad_reduce_in_fp32=false", "ddp.grad_reduce_in_fp32=true"],
        "set mixed_precision.grad_reduce_in_fp32 alone",
    ),
]


def _value(cfg, option):
    section, name = option.split(".")
    return getattr(getattr(cfg, section), name)


@pytest.mark.parametrize("way", ["command line", "file", "python"])
@pytest.mark.parametrize(("preset", "option", "value"), KEPT)
def test_a_value_set_in_a_section_counts(preset, option, value, way, tmp_path, caplog):
    caplog.set_level("INFO")
    cfg = make_config(f"mixed_precision={preset}")
    section, name = option.split(".")
    text = str(value).lower()
    if way == "command line":
        process_config_with_overrides(cfg, None, [f"{option}={text}"])
    elif way == "file":
        (tmp_path / "more.yaml").write_text(f"{section}:\n  {name}: {text}\n")
        process_config_with_overrides(cfg, tmp_path / "more.yaml")
    else:
        setattr(getattr(cfg, section), name, value)
    for _ in range(2):  # a second update changes nothing
        runtime_config_update(cfg)
        assert _value(cfg, option) == value and getattr(cfg.mixed_precision, name) == value
    assert f"{option}={value} is kept" in caplog.text

    again = ConfigContainer.from_dict(cfg.to_dict())
    runtime_config_update(again)
    assert _value(again, option) == value


def test_a_value_given_to_a_constructor_counts():
    cfg = make_config()
    sections = {entry.name: getattr(cfg, entry.name) for entry in dataclasses.fields(cfg) if entry.init}
    sections["ddp"] = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=False)
    sections["mixed_precision"] = "bf16_mixed"
    cfg = ConfigContainer(**sections)
    runtime_config_update(cfg)
    assert cfg.model.bf16 and cfg.ddp.grad_reduce_in_fp32 is False


@pytest.mark.parametrize(("preset", "overrides", "error"), REFUSED)
def test_a_format_of_one_section_alone_is_refused(preset, overrides, error):
    cfg = make_config(f"mixed_precision={preset}", *overrides)
    with pytest.raises(ValueError, match=error):
        runtime_config_update(cfg)


def test_a_value_that_agrees_is_no_conflict_and_follows():
    cfg = make_config("mixed_precision=bf16_mixed", "model.bf16=true", "ddp.grad_reduce_in_fp32=true")
    runtime_config_update(cfg)
    saved = ConfigContainer.from_dict(cfg.to_dict())  # names each number format; they follow mixed_precision
    saved.mixed_precision = "fp16_mixed"
    runtime_config_update(saved)
    assert (saved.model.fp16, saved.model.bf16, saved.optimizer.params_dtype) == (True, False, torch.float16)
    assert saved.ddp.grad_reduce_in_fp32 is False


@pytest.mark.parametrize("in_file", [False, True])
def test_one_field_of_a_named_mixed_precision_can_be_set(in_file, tmp_path):
    cfg = make_config("mixed_precision=bf16_mixed")
    if in_file:
        (tmp_path / "more.yaml").write_text("mixed_precision:\n  grad_reduce_in_fp32: false\n")
        process_config_with_overrides(cfg, tmp_path / "more.yaml")
    else:
        process_config_with_overrides(cfg, None, ["mixed_precision.grad_reduce_in_fp32=false"])
    runtime_config_update(cfg)
    assert cfg.model.bf16 and cfg.ddp.grad_reduce_in_fp32 is False
    assert cfg.mixed_precision.params_dtype is torch.bfloat16


def test_without_mixed_precision_the_fields_count():
    cfg = make_config("mixed_precision=null", "ddp.grad_reduce_in_fp32=false", "model.bf16=true", "optimizer.bf16=true")
    runtime_config_update(cfg)
    assert cfg.model.bf16 and cfg.ddp.grad_reduce_in_fp32 is False


def test_two_choices_in_python_are_refused():
    cfg = make_config()
    cfg.ddp.grad_reduce_in_fp32 = True
    cfg.mixed_precision = MixedPrecisionConfig(bf16=True, params_dtype=torch.bfloat16, grad_reduce_in_fp32=False)
    with pytest.raises(ValueError, match=r"ddp\.grad_reduce_in_fp32=True contradicts mixed_precision"):
        runtime_config_update(cfg)


@pytest.mark.parametrize("section", ["ddp", "optimizer"])
def test_what_ddp_and_optimizer_share_can_be_set_in_one_of_them(section):
    cfg = make_config(f"{section}.use_distributed_optimizer=false")
    runtime_config_update(cfg)
    assert cfg.ddp.use_distributed_optimizer is cfg.optimizer.use_distributed_optimizer is False

    other = {"ddp": "optimizer", "optimizer": "ddp"}[section]
    cfg = make_config(f"{section}.use_distributed_optimizer=false", f"{other}.use_distributed_optimizer=true")
    with pytest.raises(ValueError, match="are both set, and are one choice"):
        runtime_config_update(cfg)


def test_the_optimizers_constructor_is_enough():
    cfg = make_config()
    cfg.optimizer, cfg.ddp = OptimizerConfig(lr=1e-4, use_distributed_optimizer=True), DistributedDataParallelConfig()
    runtime_config_update(cfg)
    assert cfg.ddp.use_distributed_optimizer
