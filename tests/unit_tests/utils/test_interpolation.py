# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""`~` and `${...}` in a configuration's texts."""

from pathlib import Path

import pytest

from megatron.bridge.data.config import GPTDatasetConfig
from megatron.bridge.training.config import runtime_config_update
from megatron.bridge.utils.interpolation import expand_home, resolve_interpolations
from tests.rigs.config_examples import make_config

PATHS = [
    *[f"checkpoint.{name}" for name in ("save", "load", "pretrained_checkpoint")],
    *[f"checkpoint.non_persistent_{name}_ckpt_dir" for name in ("global", "local")],
    *[f"logger.{name}" for name in ("tensorboard_dir", "metrics_file", "rank_log_dir", "wandb_save_dir")],
    *["logger.save_config_filepath", "dataset.dataset_root", "dataset.path_to_cache", "dataset.hf_dataset"],
    *["tokenizer.tokenizer_model", "tokenizer.chat_template", "model.hf_model_id"],
]


@pytest.fixture(autouse=True)
def home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("WHERE", "/data")
    monkeypatch.delenv("NOT_SET", raising=False)


def value_of(cfg, option):
    section, name = option.split(".")
    return getattr(getattr(cfg, section), name)


@pytest.mark.parametrize("option", PATHS)
def test_every_path_may_begin_at_home_or_in_a_variable(option):
    for text, expected in (("~/x", "/home/me/x"), ("${oc.env:WHERE}/x", "/data/x"), ("a~b/~", "a~b/~")):
        cfg = make_config("profiling={}", f"{option}={text}")
        for _ in range(2):
            resolve_interpolations(cfg)
            assert value_of(cfg, option) == expected
    cfg = make_config("profiling={}", option + "=${oc.env:NOT_SET}/x")
    with pytest.raises(ValueError, match=rf"{option}=.*\${{oc.env:NOT_SET}} names nothing"):
        resolve_interpolations(cfg)


def test_paths_in_lists_variables_and_path_objects():
    cfg = make_config("env_vars.CACHE=${oc.env:WHERE}/cache")
    cfg.dataset = GPTDatasetConfig(seq_length=32, blend=(["~/a", "${oc.env:WHERE}/b"], None), split="1,0,0")
    cfg.checkpoint.save = Path("~/x")
    resolve_interpolations(cfg)
    assert cfg.dataset.blend == (["/home/me/a", "/data/b"], None)
    assert cfg.checkpoint.save == Path("/home/me/x")
    assert cfg.env_vars == {"CACHE": "/data/cache"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("${oc.env:NOT_SET,~/else}", "/home/me/else"),
        ("${oc.env:NOT_SET,${oc.env:WHERE}}/x", "/data/x"),
        ("${checkpoint.save}/tb", "/home/me/run/tb"),
        ("run-${train.train_iters}", "run-20"),
        ("~", "/home/me"),
        ("~tilde", "~tilde"),
    ],
)
def test_what_may_be_named(text, expected):
    cfg = make_config("checkpoint.save=~/run")
    cfg.logger.tensorboard_dir = text
    resolve_interpolations(cfg)
    assert cfg.logger.tensorboard_dir == expected


@pytest.mark.parametrize(
    "text",
    ["${HOME}/x", "${checkpoint.sav}", "${checkpoint.load}/x", "${now:%Y}", "${}", "${x", "${logger.tensorboard_dir}"],
)
def test_what_names_nothing_is_refused_before_the_run(text):
    cfg = make_config()
    cfg.logger.tensorboard_dir = text
    with pytest.raises(ValueError, match=r"^logger\.tensorboard_dir="):
        runtime_config_update(cfg)


def test_a_home_of_nobody_is_refused():
    with pytest.raises(ValueError, match="there is no user 'nobody-at-all'"):
        expand_home("~nobody-at-all/x")


def test_templates_are_left_as_they_are():
    template = "{% for message in messages %}${{ message.price }}{% endfor %}"
    cfg = make_config()
    cfg.tokenizer.chat_template = template
    cfg.dataset.dataset_kwargs = {"prompt_template": "~ ${input} {output}"}
    resolve_interpolations(cfg)
    assert cfg.tokenizer.chat_template == template
    assert cfg.dataset.dataset_kwargs == {"prompt_template": "~ ${input} {output}"}
