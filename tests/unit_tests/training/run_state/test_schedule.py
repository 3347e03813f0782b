# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Param groups whose rates a provider chose, after a resume; the resume matrix does the schedule with whole runs."""

from pathlib import Path

import pytest

from megatron.bridge.training.run_state.schedule import load_optimizer
from tests.unit_tests.training.run_state.test_optimizer_chain import group, saved

PLAIN, FAST = group(default_config=True), group(max_lr=5e-3, default_config=False)


class Optimizer:
    """Finds a checkpoint's groups as Core 0.16.1 does: not by their rates."""

    def __init__(self, *groups):
        self.param_groups = [dict(one) for one in groups]

    def load_state_dict(self, state):
        def key(one):
            return one["wd_mult"], one["lr_mult"], one["is_expert_parallel"], one["is_decoupled_lr"]

        found = {key(one): one for one in state["optimizer"]["param_groups"]}
        self.param_groups = [dict(found[key(one)]) for one in self.param_groups]


def test_groups_that_only_their_rates_tell_apart_keep_them():
    optimizer = Optimizer(PLAIN, FAST)
    load_optimizer(optimizer, None, {"optimizer": saved(dict(PLAIN, step=3), dict(FAST, step=3))}, Path("iter_3"))
    assert optimizer.param_groups == [dict(PLAIN, step=3), dict(FAST, step=3)]


def test_a_rate_that_only_the_checkpoint_has_is_refused():
    decoupled = dict(FAST, is_decoupled_lr=True, min_lr=0.0)
    with pytest.raises(ValueError, match=r"iter_3 \(checkpoint.load\) has other .* \[\(0.005, 0.0\)\] -> none; set"):
        load_optimizer(Optimizer(PLAIN), None, {"optimizer": saved(PLAIN, decoupled)}, Path("iter_3"))
