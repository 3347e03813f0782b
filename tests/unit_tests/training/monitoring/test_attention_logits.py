# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The largest attention logit, from what attention keeps as Transformer Engine's does."""

import math

import pytest
import torch

from megatron.bridge.training.monitoring.attention_logits import (
    check_attention_keeps_logits,
    forget_attention_logits,
    max_attention_logit,
)
from tests.rigs.ranks import run_on_ranks


def _model(logits):
    """Two layers whose attention has kept what is given for its heads."""
    layers = torch.nn.ModuleList()
    for kept in logits:
        layer = torch.nn.Module()
        layer.core_attention = torch.nn.Identity()
        layer.core_attention.current_max_attn_logits = kept if kept is None else torch.tensor(kept)
        layers.append(layer)
    return [torch.nn.ModuleDict({"layers": layers})]


def _largest(by_rank):
    import torch.distributed as dist

    model = _model(by_rank[dist.get_rank()])
    check_attention_keeps_logits(model)
    found = max_attention_logit(model)
    forget_attention_logits(model)
    return found, max_attention_logit(model)


def test_it_is_the_largest_of_all_heads_layers_and_ranks_since_the_step_began():
    for found, forgotten in run_on_ranks(_largest, 2, [[[1.0, -3.0], [2.0, 0.0]], [[5.5, 1.0], None]]):
        assert found == 5.5 and math.isnan(forgotten)


def _refused():
    model = _model([[1.0]])
    del model[0]["layers"][0].core_attention.current_max_attn_logits
    with pytest.raises(ValueError, match=r"log_max_attention_logit=true: layers.0.core_attention is a Identity, which"):
        check_attention_keeps_logits(model)


def test_attention_that_keeps_none_is_refused():
    run_on_ranks(_refused, 1)
