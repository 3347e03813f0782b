# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Every rule passes on configurations that work and speaks up, naming option and way out, on one that doesn't."""

import copy
import dataclasses
import importlib.util
import logging

import pytest
from megatron.core.dist_checkpointing import tensor_aware_state_dict

from megatron.bridge.models.gemma4 import Gemma4ModelProvider
from megatron.bridge.training.config import runtime_config_update
from megatron.bridge.training.config.rules import RULES
from tests.rigs.config_examples import make_config
from tests.unit_tests.training.config.rule_cases import BAD
from tests.unit_tests.training.config.working_configs import GOOD, OFFLOAD

HAS_TRANSFORMER_ENGINE = importlib.util.find_spec("transformer_engine") is not None


@pytest.mark.parametrize("name", GOOD)
def test_every_rule_passes_on_a_config_that_works(name, monkeypatch):
    overrides, world_size = GOOD[name]
    cfg = make_config(*overrides)
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    runtime_config_update(cfg)
    for rule in RULES:
        rule(cfg, world_size)


CASES = [(name, *case) for name, cases in BAD.items() for case in cases]
BY_NAME = {rule.__name__: rule for rule in RULES}


LOCAL = ("checkpoint.non_persistent_ckpt_type=local", "checkpoint.non_persistent_local_ckpt_dir=local")


def test_local_checkpoints_without_their_package_are_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(tensor_aware_state_dict, "HAVE_NVRX", False)
    with pytest.raises(ValueError, match="needs the package nvidia-resiliency-ext, which is not installed") as error:
        make_config(*LOCAL).validate(1)
    assert 'pip install "megatron-bridge[local]"' in str(error.value) and "\n" not in str(error.value)
    monkeypatch.setattr(tensor_aware_state_dict, "HAVE_NVRX", True)
    make_config(*LOCAL).validate(1)


def test_the_table_has_a_bad_config_for_every_rule():
    elsewhere = {"check_trackers_are_installed"}  # in test_metrics.py, which hides the packages
    assert BAD.keys() == BY_NAME.keys() - elsewhere


@pytest.mark.parametrize(("rule", "overrides", "world_size", "message"), CASES)
def test_a_rule_names_the_option_and_the_way_out(rule, overrides, world_size, message):
    cfg = make_config(*overrides)
    before = copy.deepcopy(cfg)

    with pytest.raises((ValueError, FileNotFoundError)) as error:
        BY_NAME[rule](cfg, world_size)
    assert message in str(error.value)
    assert "\n" not in str(error.value)

    with pytest.raises((ValueError, FileNotFoundError)):
        cfg.validate(world_size)
    assert dataclasses.asdict(cfg) == dataclasses.asdict(before)  # refused before anything was changed


@pytest.mark.skipif(HAS_TRANSFORMER_ENGINE, reason="Transformer Engine is installed: these work")
@pytest.mark.parametrize("option", ["model.fp8=hybrid", "model.fp4=e2m1"])
def test_fp8_without_transformer_engine_is_refused(option):
    with pytest.raises(ValueError, match="needs Transformer Engine, which is not installed"):
        make_config(option).validate(1)


@pytest.mark.skipif(HAS_TRANSFORMER_ENGINE, reason="Transformer Engine is installed: these work")
def test_precision_aware_mode_needs_transformer_engine_unless_offloaded():
    alone = make_config("optimizer.use_precision_aware_optimizer=true")
    with pytest.raises(ValueError, match="Transformer Engine"):
        alone.validate(1)

    offloaded = make_config("optimizer.use_precision_aware_optimizer=true", *OFFLOAD)
    offloaded.validate(1)
    offloaded.optimizer.finalize()


def test_delayed_fp8_weights_may_be_offloaded():
    cfg = make_config(*OFFLOAD, "model.fp8=hybrid", "model.fp8_recipe=delayed", "model.fp8_param=true")
    BY_NAME["check_offload_has_no_fp8_weights"](cfg, 1)


def test_query_groups_of_layers_without_a_window_are_shared_evenly_too():
    cfg = make_config("model.context_parallel_size=2")
    sizes = {"num_attention_heads": 8, "num_query_groups": 4, "num_global_query_groups": 1}
    exchange = {"context_parallel_size": 2, "cp_comm_type": "a2a"}
    cfg.model = Gemma4ModelProvider(num_layers=2, hidden_size=32, **sizes, **exchange)
    with pytest.raises(
        ValueError, match=r"cp_comm_type=a2a with model\.num_global_query_groups=1: expected a multiple"
    ):
        BY_NAME["check_heads_are_shared_evenly"](cfg, 2)


def test_core_pads_no_vocabulary_that_is_not_known_yet():
    BY_NAME["check_tensor_parallel_divides_vocabulary"](
        make_config("model.vocab_size=null", "model.tensor_model_parallel_size=2"), 2
    )


def test_offloading_nothing_runs_and_says_so(caplog):
    caplog.set_level(logging.INFO)
    make_config("optimizer.optimizer_cpu_offload=true").validate(1)
    assert [record for record in caplog.records if "nothing is offloaded" in record.message]

    caplog.clear()
    make_config(*OFFLOAD).validate(1)
    assert not [record for record in caplog.records if "nothing is offloaded" in record.message]


def test_a_fraction_without_offload_says_that_nothing_is_offloaded(caplog):
    caplog.set_level(logging.INFO)
    make_config("optimizer.optimizer_offload_fraction=0.5").validate(1)
    assert "optimizer.optimizer_cpu_offload=false: nothing is offloaded" in caplog.text
