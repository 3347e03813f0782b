# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The formula against torch's own count of a real forward pass."""

import math
from fractions import Fraction

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.rigs.families import MODELS
from tests.rigs.ranks import run_on_ranks
from tests.rigs.tiny import tiny_config
from tests.unit_tests.models.tiny_llama import SMALL

BATCH, SEQ = 2, 128
"""Of two chunks of a Gated DeltaNet layer."""
FAMILIES = (
    *("deepseek_v2", "deepseek_v3", "gemma3", "gemma4", "gemma4_e2b", "glm4_moe", "gpt_oss", "qwen3_next"),
    *("qwen3_5", "mixtral", "gemma4_experts"),
)


def _of_triangle(_matrix, sides, *_, **__):
    """A triangular system costs half of the product with the matrix."""
    return math.prod(sides) * sides[-2]


def _part_kept(config, layer):
    """The part of the scores that a layer's mask keeps, where a token counts half of its score with itself."""
    from megatron.core.transformer.utils import is_layer_window_attention

    slides = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer)
    window = config.window_size[0] + 1 if slides else SEQ
    kept = sum(Fraction(min(row, window) + min(row + 1, window), 2) for row in range(SEQ))
    return kept / SEQ**2


def _counted(provider):
    """Operations of a forward and backward pass, by torch's count of the forward pass."""
    provider.perform_initialization = False
    (model,) = provider.provide_distributed_model(wrap_with_ddp=False)
    tokens = torch.arange(BATCH * SEQ).view(BATCH, SEQ) % 90
    positions = torch.arange(SEQ).expand(BATCH, SEQ)
    solving = {torch.ops.aten.linalg_solve_triangular: _of_triangle}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=solving) as counter:
        model(tokens, positions, None, labels=tokens)
    counts = counter.get_flop_counts()
    total = Fraction(sum(counts["Global"].values()))
    for module, of_module in counts.items():
        if module.endswith(".core_attention"):
            layer = int(module.split(".layers.")[1].split(".")[0]) + 1
            total -= sum(of_module.values()) * (1 - _part_kept(provider, layer))
    return 3 * total


def _formula_and_count(provider):
    from megatron.bridge.training.monitoring.flops import train_step_flops

    counted = _counted(provider)
    return train_step_flops(provider, [(BATCH, SEQ)]), counted


def _of_groups(directory, groups):
    return _formula_and_count(tiny_config(directory, model={"num_query_groups": groups}).model)


def _of_family(name):
    import transformers

    from megatron.bridge import AutoBridge

    model = MODELS[name]
    config = getattr(transformers, model.architecture).config_class(**{**SMALL, **model.options})
    config.architectures = [model.architecture]
    return _formula_and_count(AutoBridge.from_hf_config(config).to_megatron_provider(load_weights=False))


def test_formula_is_the_count_of_a_real_pass(tmp_path):
    for groups in (1, 2, 4):
        formula, count = run_on_ranks(_of_groups, 1, tmp_path, groups)[0]
        assert formula == count > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_of_other_kinds_are_counted_as_they_are(name):
    """Latent attention, windows, shared keys, Gated DeltaNet, experts, shared ones and dense layers before them."""
    formula, count = run_on_ranks(_of_family, 1, name)[0]
    assert formula == count > 0
