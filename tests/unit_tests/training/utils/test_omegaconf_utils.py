# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A configuration through OmegaConf and back, step by step as scripts do it."""

import pytest
import torch
from omegaconf import OmegaConf

from megatron.bridge.recipes import find_recipe
from megatron.bridge.training.utils.omegaconf_utils import (
    OverridesError,
    apply_overrides,
    create_omegaconf_dict_config,
    parse_hydra_overrides,
)
from megatron.bridge.utils.yaml_io import to_yaml_dict


@pytest.fixture
def cfg():
    cfg = find_recipe("smollm2_135m_sft_config")()
    cfg.dataset.dataset_kwargs = {"add_bos": True, "add_eos": False}
    return cfg


def put_back(cfg, conf, excluded=None):
    apply_overrides(cfg, OmegaConf.to_container(conf, resolve=True), excluded)


def test_nothing_changed_changes_nothing(cfg):
    before = to_yaml_dict(cfg)
    conf, excluded = create_omegaconf_dict_config(cfg)
    put_back(cfg, conf, excluded)
    assert to_yaml_dict(cfg) == before and excluded == {}


def test_a_file_and_then_a_command_line(cfg):
    conf, excluded = create_omegaconf_dict_config(cfg)
    conf = OmegaConf.merge(conf, OmegaConf.create({"train": {"train_iters": 7}, "optimizer": {"lr": 1e-3}}))
    conf = parse_hydra_overrides(
        conf, ["train.train_iters=9", "checkpoint.save=null", "+dataset.dataset_kwargs.label_key=answer"]
    )
    put_back(cfg, conf, excluded)
    assert (cfg.train.train_iters, cfg.optimizer.lr, cfg.checkpoint.save) == (9, 1e-3, None)
    assert cfg.dataset.dataset_kwargs == {"add_bos": True, "add_eos": False, "label_key": "answer"}


def test_entries_are_removed_and_sections_made(cfg):
    conf, _ = create_omegaconf_dict_config(cfg)
    conf = parse_hydra_overrides(
        conf, ["~dataset.dataset_kwargs.add_eos", "profiling.profile_step_start=3", "model.num_layers=2"]
    )
    put_back(cfg, conf)
    assert cfg.dataset.dataset_kwargs == {"add_bos": True}
    assert cfg.profiling.profile_step_start == 3 and cfg.model.num_layers == 2


def test_what_has_no_form_in_yaml_keeps_its_value(cfg):
    def spec(config):
        return None

    cfg.model.transformer_layer_spec = spec
    conf, excluded = create_omegaconf_dict_config(cfg)
    assert excluded == {"model.transformer_layer_spec": spec}
    put_back(cfg, parse_hydra_overrides(conf, []), excluded)
    assert cfg.model.transformer_layer_spec is spec


def test_functions_and_dtypes_survive(cfg):
    cfg.model.params_dtype, activation = torch.bfloat16, cfg.model.activation_func
    conf, _ = create_omegaconf_dict_config(cfg)
    put_back(cfg, parse_hydra_overrides(conf, ["model.hidden_size=64"]))
    assert cfg.model.params_dtype is torch.bfloat16 and cfg.model.activation_func is activation


def test_the_given_conf_is_not_changed(cfg):
    conf, _ = create_omegaconf_dict_config(cfg)
    before = OmegaConf.to_container(conf)
    parse_hydra_overrides(conf, ["train.train_iters=9"])
    assert OmegaConf.to_container(conf) == before


def test_a_bool_is_no_number(cfg):
    cfg.train.train_iters = 1
    with pytest.raises(ValueError, match="train.train_iters"):
        apply_overrides(cfg, {"train": {"train_iters": True}})


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.train_iter=9", "there is no train.train_iter; did you mean train_iters"),
        ("trainer.lr=9", "there is no trainer.lr"),
        ("train.train_iters.x=9", "there is no train.train_iters.x"),
        ("~train.nothing", "there is no train.nothing"),
        ("train.train_iters", "can't be read: expected key=value"),
    ],
)
def test_an_override_of_nothing_is_refused(cfg, override, says):
    conf, _ = create_omegaconf_dict_config(cfg)
    with pytest.raises(OverridesError, match=says):
        parse_hydra_overrides(conf, [override])


def test_a_wrong_type_or_an_added_option_that_is_none_is_refused(cfg):
    conf, _ = create_omegaconf_dict_config(cfg)
    with pytest.raises(ValueError, match="train.train_iters"):
        put_back(cfg, parse_hydra_overrides(conf, ["train.train_iters=many"]))
    with pytest.raises(ValueError, match="unknown option train.foo"):
        put_back(cfg, parse_hydra_overrides(conf, ["+train.foo=1"]))
