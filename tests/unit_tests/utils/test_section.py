# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A name that nobody knows can't be set on a section; what has a reason to be set can."""

import copy
import pickle
from dataclasses import dataclass

import pytest

from megatron.bridge.data.config import DatasetProvider
from megatron.bridge.data.sft_options import PackedSequenceSpecs
from megatron.bridge.peft.lora import LoRA
from megatron.bridge.training.config import TrainingConfig, runtime_config_update
from megatron.bridge.training.mixed_precision import bf16_mixed
from tests.rigs.config_examples import make_config

TYPOS = [
    ("optimizr", "ConfigContainer has no option optimizr: did you mean optimizer? "),
    ("train.micro_batchsize", "TrainingConfig has no option micro_batchsize: did you mean micro_batch_size? "),
    ("optimizer.learning", "OptimizerConfig has no option learning: "),
    ("ddp.overlap_grad_reduced", "did you mean overlap_grad_reduce? "),
    ("model.num_layer", "has no option num_layer: did you mean num_layers? "),
    ("dataset.seq_lenght", "did you mean seq_length? "),
    ("tokenizer.model", "TokenizerConfig has no option model: "),
    ("mixed_precision.fp_16", "did you mean fp16? "),
    ("peft.alfa", "LoRA has no option alfa: did you mean alpha? "),
    *((f"{section}.brand_new", "has no option brand_new: set one of its fields") for section in (
        "validation", "scheduler", "rng", "dist", "rerun_state_machine", "logger", "checkpoint", "profiling",
        "comm_overlap", "dataset.offline_packing_specs",
    )),
]  # fmt: skip


@pytest.fixture(scope="module")
def cfg():
    cfg = make_config("profiling={}", "comm_overlap={}")
    cfg.mixed_precision = bf16_mixed()
    cfg.peft, cfg.dataset.offline_packing_specs = LoRA(), PackedSequenceSpecs()
    return cfg


@pytest.mark.parametrize(("option", "message"), TYPOS, ids=lambda part: part.split(":")[0])
def test_a_name_that_nobody_knows_is_refused_at_once(cfg, option, message):
    *sections, name = option.split(".")
    section = cfg
    for part in sections:
        section = getattr(section, part)
    with pytest.raises(AttributeError) as error:
        setattr(section, name, 4)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not hasattr(section, name)


@dataclass
class OwnTraining(TrainingConfig):
    """A script's section, with a field of its own."""

    my_option: int = 3


class OwnData(DatasetProvider):
    """A script's data, which keeps things between its methods."""

    def build_datasets(self, context):
        def note():
            self.length = len(self.rows)

        self.rows = [1, 2]
        note()
        return None, None, None

    @property
    def first(self):
        return self._first

    @first.setter
    def first(self, value):
        self._first = self.chosen = value


def test_a_scripts_own_section_may_have_more():
    train, data = OwnTraining(train_iters=3, my_option=4), OwnData()
    train.my_option = 5
    data.build_datasets(None)
    data.first = 7
    assert (train.my_option, data.length, data.chosen) == (5, 2, 7)
    for section in (train, data):
        with pytest.raises(AttributeError, match="has no option brand_new"):
            section.brand_new = 1


def test_private_names_and_what_a_class_has_can_be_set():
    train = TrainingConfig()
    train._seen, train.finalize = 1, lambda: None
    again = pickle.loads(pickle.dumps(copy.deepcopy(TrainingConfig(train_iters=3))))
    assert train._seen == 1 and again == TrainingConfig(train_iters=3)
    with pytest.raises(AttributeError):
        again.train_itres = 1


def test_a_hook_in_a_methods_place_is_called(cfg):
    model, seen = copy.deepcopy(cfg.model), []
    model.register_pre_wrap_hook = seen.append
    model.register_pre_wrap_hook("hook")
    assert seen == ["hook"]


def test_core_may_set_what_its_version_needs_once_it_has_the_section():
    cfg = make_config()
    runtime_config_update(cfg)
    for section in (cfg.model, cfg.optimizer, cfg.ddp):
        for copied in (section, copy.copy(section), copy.deepcopy(section)):
            copied.set_by_core_at_run_time = 1
