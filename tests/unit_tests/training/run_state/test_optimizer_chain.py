# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A checkpoint's param groups, in as many optimizers as a run has; the resume matrix does it with whole runs."""

from types import SimpleNamespace

import pytest
from megatron.core.optimizer.optimizer import ChainedOptimizer

from megatron.bridge.training.run_state.optimizer_chain import match_optimizer_chain


def group(*, of_experts=False, wd_mult=1.0, **rates):
    flags = {"is_expert_parallel": of_experts, "is_decoupled_lr": False}
    return {"wd_mult": wd_mult, "lr_mult": 1.0, **flags, "max_lr": 1e-3, **rates}


def saved(*groups, param_state=None):
    state = {"optimizer": {"param_groups": list(groups)}, "grad_scaler": {"scale": 8.0}}
    return state if param_state is None else {**state, "param_state": param_state}


def chain(*groups_of_each):
    return ChainedOptimizer([SimpleNamespace(param_groups=list(groups)) for groups in groups_of_each])


def test_as_many_optimizers_are_left_alone():
    one, two = saved(group(step=3), param_state="tensors"), {0: saved(group()), 1: saved(group(of_experts=True))}
    assert match_optimizer_chain(chain([group()]), one) is one
    assert match_optimizer_chain(chain([group()], [group(of_experts=True)]), two) is two


def test_one_optimizer_of_two():
    """The dense groups' settings, where both have them; the experts are parameters like any other."""
    read = {
        0: saved(group(step=3, lr=1e-4)),
        1: saved(group(of_experts=True, step=3, lr=2e-4)),
        "param_state": "tensors",
    }
    found = match_optimizer_chain(chain([group()]), read)
    assert found == saved(group(step=3, lr=1e-4), param_state="tensors")


def test_two_optimizers_of_one():
    read = {**saved(group(step=3), group(wd_mult=0.0, step=3)), 0: {"param_state": "a"}, 1: {"param_state": "b"}}
    found = match_optimizer_chain(chain([group(), group(wd_mult=0.0)], [group(of_experts=True)]), read)
    assert found == {
        0: saved(group(step=3), group(wd_mult=0.0, step=3), param_state="a"),
        1: saved(group(of_experts=True, step=3), param_state="b"),
    }


@pytest.mark.parametrize("is_spread", [True, False])
def test_experts_alone_are_spread_over_ranks_on_one_side(is_spread):
    """As with adapters of experts: one optimizer on both sides, and Core tells its groups apart by that."""
    read = saved(group(of_experts=not is_spread, step=3), param_state="tensors")
    found = match_optimizer_chain(chain([group(of_experts=is_spread)]), read)
    assert found == saved(group(of_experts=is_spread, step=3), param_state="tensors")


def test_groups_that_only_their_rates_tell_apart_keep_theirs():
    read = {0: saved(group(step=3, max_lr=1.0)), 1: saved(group(step=3, max_lr=2.0)), "param_state": "tensors"}
    found = match_optimizer_chain(chain([group(max_lr=2.0), group(max_lr=1.0)]), read)
    assert [one["max_lr"] for one in found["optimizer"]["param_groups"]] == [2.0, 1.0]


def test_a_group_that_was_not_saved_is_refused():
    read = {0: saved(group()), 1: saved(group(of_experts=True)), "param_state": "tensors"}
    with pytest.raises(
        ValueError, match=r"no param group with wd_mult, .* = \(0.0, 1.0, False\): found .*load_optim=f"
    ):
        match_optimizer_chain(chain([group(wd_mult=0.0)]), read)
