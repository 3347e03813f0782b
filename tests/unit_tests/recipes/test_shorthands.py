# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The short options of run_recipe.py: each sets the option that it names, and key=value has the last word."""

import argparse
import re
import runpy
from pathlib import Path

import pytest

from megatron.bridge.recipes.build import RecipeRequest
from megatron.bridge.recipes.shorthands import add_shorthands, overrides_of

ROOT = Path(__file__).parents[3]


def overrides(*arguments):
    parser = argparse.ArgumentParser()
    add_shorthands(parser)
    return overrides_of(parser.parse_args([str(argument) for argument in arguments]))


def build(*arguments, **fields):
    return RecipeRequest(recipe="qwen3_30b_a3b_sft_config", overrides=overrides(*arguments), **fields).build()


def test_each_sets_its_option():
    cfg = build(
        *("-ms", 7, "-gb", 64, "-mb", 2, "-tp", 4, "-pp", 2, "-vp", 3, "-ep", 8, "-etp", 1, "-cp", 1),
        *("--lr", "1e-4", "--min_lr", "1e-5", "--warmup-iters", 3, "--pretrained_checkpoint", "1e3"),
        *("--save_dir", "it's here", "--load-dir", "there", "--save-interval", 5),
    )
    assert (cfg.train.train_iters, cfg.train.global_batch_size, cfg.train.micro_batch_size) == (7, 64, 2)
    model = cfg.model
    assert (model.tensor_model_parallel_size, model.pipeline_model_parallel_size) == (4, 2)
    assert (model.virtual_pipeline_model_parallel_size, model.context_parallel_size) == (3, 1)
    assert (model.expert_model_parallel_size, model.expert_tensor_parallel_size) == (8, 1)
    assert (cfg.optimizer.lr, cfg.optimizer.min_lr, cfg.scheduler.lr_warmup_iters) == (1e-4, 1e-5, 3)
    checkpoint = cfg.checkpoint
    assert (checkpoint.pretrained_checkpoint, checkpoint.save, checkpoint.load) == ("1e3", "it's here", "there")
    assert checkpoint.save_interval == 5


def test_nothing_is_set_that_was_not_asked_for():
    assert overrides() == []


def test_key_value_has_the_last_word():
    request = RecipeRequest(recipe="smollm2_135m_sft_config", overrides=[*overrides("-ms", 7), "train.train_iters=9"])
    assert request.build().train.train_iters == 9


@pytest.mark.parametrize(
    ("file", "option"),
    [
        ("training.jsonl", "dataset.dataset_root"),
        ("dataset_dict.json", "dataset.hf_dataset"),
        ("state.json", "dataset.hf_dataset"),
    ],
)
def test_a_dataset_is_what_its_directory_holds(tmp_path, file, option):
    (tmp_path / file).touch()
    assert overrides("--dataset", tmp_path)[-1] == f"{option}='{tmp_path}'"


@pytest.mark.parametrize("name", ["squad", "somebody/something"])
def test_a_dataset_may_be_one_of_the_hub(name):
    assert build("--dataset", name).dataset.hf_dataset == name


def test_a_dataset_that_is_not_there_is_said_in_one_line():
    with pytest.raises(
        ValueError, match=r"^--dataset squat: there is no such directory; .*save_to_disk.*squad"
    ) as error:
        overrides("--dataset", "squat")
    assert "\n" not in str(error.value)


def test_deterministic_kernels():
    cfg = build(deterministic=True)
    assert cfg.model.deterministic_mode and not cfg.model.cross_entropy_loss_fusion and cfg.env_vars


def test_the_command_takes_them(capsys):
    main = runpy.run_path(str(ROOT / "scripts" / "training" / "run_recipe.py"))["main"]
    command = "--model smollm2_135m --mode sft --dry-run -sl 128 -ms 11 --lr 3e-4 --save_dir out train.train_iters=12"
    assert main(command.split()) == 0
    shown = capsys.readouterr().out
    for line in ("train_iters: 12", "lr: 0.0003", "save: out", "seq_length: 128"):
        assert re.search(rf"^ +{line}$", shown, re.MULTILINE), line
