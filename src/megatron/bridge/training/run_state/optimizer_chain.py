# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Load a checkpoint's optimizer state into a run with another number of optimizers.

With expert parallelism, Core uses a separate optimizer for the experts, and a checkpoint has the state of several. In
the fully_reshardable format, tensors are found by the parameters' names, whichever optimizer steps on them. All else
(param groups, loss scaler) is found by the optimizer's number. If a run has another number of optimizers, Core fails
with KeyError or "Expected 2 entries".
"""

from typing import Any

from megatron.core.optimizer.optimizer import ChainedOptimizer, Float16OptimizerWithFloat16Params, FP32Optimizer

ParamGroup = dict[str, Any]

GROUP_KEYS = ("max_lr", "min_lr", "start_wd", "end_wd")
"""The options of a param group that its learning rate and weight decay depend on."""


def match_optimizer_chain(optimizer: Any, saved: dict[Any, Any]) -> dict[Any, Any]:
    """Rearrange loaded optimizer state for the optimizers of this run.

    Args:
        optimizer: This run's Megatron optimizer.
        saved: What Core loaded: the tensors are arranged as in this run's optimizers, all else as in the checkpoint.
            The state of a single optimizer, or the states of several by number.

    Raises:
        ValueError: The checkpoint has no param group that matches one of this run's.
    """
    chain = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    if any(isinstance(one, (FP32Optimizer, Float16OptimizerWithFloat16Params)) for one in chain):
        _check_num_optimizers(saved, len(chain))
        return saved
    plain = [state for state in (saved, *(saved[key] for key in _numbers(saved))) if "optimizer" in state]
    if len(plain) == len(chain) and _kinds(plain[0]["optimizer"]["param_groups"]) == _kinds(chain[0].param_groups):
        return saved  # a single one may be that of experts, spread over ranks here and not there
    groups = [group for state in plain for group in state["optimizer"]["param_groups"]]
    common = {key: value for key, value in plain[0].items() if key != "param_state" and not isinstance(key, int)}
    states = {
        number: {
            **common,
            "optimizer": {
                **common["optimizer"],
                "param_groups": [_closest_group(groups, own) for own in one.param_groups],
            },
            # Missing if this rank trains no parameter of the optimizer.
            "param_state": (saved if len(chain) == 1 else saved.get(number, {})).get("param_state", {}),
        }
        for number, one in enumerate(chain)
    }
    return states[0] if len(chain) == 1 else states


def _check_num_optimizers(saved: dict[Any, Any], num_optimizers: int) -> None:
    """Refuse state that is not distributed if the number of optimizers differs: it is stored by optimizer.

    Raises:
        ValueError: The numbers differ.
    """
    is_one = _has_settings(saved)
    num_saved = 1 if is_one else sum(_has_settings(saved[key]) for key in _numbers(saved))
    if num_saved != num_optimizers:
        raise ValueError(
            f"the checkpoint has the state of {num_saved} optimizers and this run {num_optimizers} (experts spread "
            "over ranks have one of their own), which needs the distributed optimizer: use the checkpoint's "
            "model.expert_model_parallel_size and optimizer.use_distributed_optimizer, or set "
            "checkpoint.load_optim=false"
        )


def _has_settings(state: dict[Any, Any]) -> bool:
    """Whether a state has param groups with their options, not only the numbers of their parameters."""
    groups = state.get("optimizer", state).get("param_groups", ())
    return any("wd_mult" in group or "pre_wd_mult" in group for group in groups)


def _numbers(saved: dict[Any, Any]) -> list[int]:
    return sorted(key for key in saved if isinstance(key, int))


def identity(group: ParamGroup) -> tuple:
    """The key by which param groups are matched, without rates and parameters. Core's older names begin with `pre_`."""
    multipliers = tuple(group.get(key, group.get(f"pre_{key}")) for key in ("wd_mult", "lr_mult"))
    return (*multipliers, bool(group.get("is_decoupled_lr")))


def _kinds(groups: list[ParamGroup]) -> set[bool]:
    """Whether groups are those of experts that are spread over ranks."""
    return {bool(group.get("is_expert_parallel")) for group in groups}


def _closest_group(groups: list[ParamGroup], own: ParamGroup) -> ParamGroup:
    """The saved group that matches this run's best, with this run's value of `is_expert_parallel`."""
    alike = [group for group in groups if identity(group) == identity(own)]
    if not alike:
        raise ValueError(
            f"the checkpoint has no param group with wd_mult, lr_mult, is_decoupled_lr = {identity(own)}: found "
            f"{[identity(group) for group in groups]}; train the parameters that were trained, or set "
            "checkpoint.load_optim=false"
        )
    keys = ("is_expert_parallel", *GROUP_KEYS)
    nearest = max(alike, key=lambda group: [group.get(key) == own.get(key) for key in keys])
    return {**nearest, "is_expert_parallel": own["is_expert_parallel"]}
