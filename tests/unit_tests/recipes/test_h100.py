# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Recipes by the names that tell a machine."""

import pytest
from megatron.bridge.recipes.llama.h100 import llama31_8b_pretrain_2gpu_h100_bf16_config as on_two
from megatron.bridge.recipes.qwen.h100 import qwen25_500m_peft_1gpu_h100_bf16_config as adapters

from megatron.bridge.recipes.llama import h100


def test_a_name_with_a_machine_is_the_recipe():
    cfg = on_two()
    assert (cfg.model.num_layers, cfg.model.tensor_model_parallel_size) == (32, 2)
    assert cfg.mixed_precision == "bf16_mixed" and not cfg.model.deterministic_mode
    assert adapters(peft_scheme="dora").peft.__class__.__name__ == "DoRA"


def test_a_deterministic_one_is_made_so():
    cfg = h100.llama3_70b_pretrain_32gpu_h100_bf16_deterministic_config()
    assert cfg.model.deterministic_mode and cfg.env_vars["NCCL_ALGO"] == "Ring"


def test_what_the_machine_cannot_do_is_refused_when_it_is_called():
    with pytest.raises(NotImplementedError, match="recipes compute in bf16; take llama3_8b_pretrain_config"):
        h100.llama3_8b_pretrain_2gpu_h100_nvfp4_config()
    with pytest.raises(ValueError, match="for 1 GPUs, and llama31_8b_pretrain_config shares the model among 2"):
        h100.llama31_8b_pretrain_1gpu_h100_bf16_config()


@pytest.mark.parametrize("name", ["llama9_8b_sft_1gpu_h100_bf16_config", "llama3_8b_sft_config", "nothing"])
def test_there_are_no_other_names(name):
    with pytest.raises(AttributeError, match=name):
        getattr(h100, name)
