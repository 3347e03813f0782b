# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The formula against torch's own count of a real forward pass."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.rigs.on_ranks import build_training
from tests.rigs.ranks import run_on_ranks
from tests.rigs.tiny import tiny_config

BATCH, SEQ = 2, 16


def _formula_and_count(directory, groups):
    from megatron.bridge.training.monitoring.flops import train_step_flops

    cfg = tiny_config(directory, model={"num_query_groups": groups})
    model, _, _ = build_training(cfg)
    tokens = torch.arange(BATCH * SEQ).view(BATCH, SEQ)
    positions = torch.arange(SEQ).expand(BATCH, SEQ)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model[0](tokens, positions, None, labels=tokens)
    counts = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    attention = sum(count for op, count in counts.items() if "bmm" in op)
    products = sum(counts.values()) - attention
    return train_step_flops(cfg.model, [(BATCH, SEQ)]), 3 * (products + attention // 2)


def test_formula_is_the_count_of_a_real_pass(tmp_path):
    for groups in (1, 2, 4):
        formula, count = run_on_ranks(_formula_and_count, 1, tmp_path, groups)[0]
        assert formula == count > 0
