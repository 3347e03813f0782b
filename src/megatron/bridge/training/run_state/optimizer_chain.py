# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A checkpoint's optimizer state, in as many optimizers as this run has.

Where experts are spread over ranks, Core gives them an optimizer of their own, and a checkpoint then lists several.
In the fully_reshardable format tensors are found by the parameters' names whichever optimizer steps on them; the rest
(param groups, loss scaler) is found by the optimizer's number, and dies with KeyError or "Expected 2 entries" where a
run has another number of them.
"""

from typing import Any

from megatron.core.optimizer.optimizer import ChainedOptimizer, Float16OptimizerWithFloat16Params, FP32Optimizer

ParamGroup = dict[str, Any]

GROUP_KEYS = ("max_lr", "min_lr", "start_wd", "end_wd")
"""A group's own rates."""


def match_optimizer_chain(optimizer: Any, saved: dict[Any, Any]) -> dict[Any, Any]:
    """What was read of a checkpoint's optimizer, for the optimizers of this run.

    Args:
        optimizer: This run's Megatron optimizer.
        saved: Core's load of its template and the checkpoint, put together: the tensors as in this run's optimizers,
            all else as in the checkpoint's. Of one optimizer its state, of several their states by number.

    Raises:
        ValueError: The checkpoint has no param group like one of this run's.
    """
    chain = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    if any(isinstance(one, (FP32Optimizer, Float16OptimizerWithFloat16Params)) for one in chain):
        _check_num_optimizers(saved, len(chain))
        return saved
    plain = [state for state in (saved, *(saved[key] for key in _numbers(saved))) if "optimizer" in state]
    if len(plain) == len(chain):
        return saved
    groups = [group for state in plain for group in state["optimizer"]["param_groups"]]
    common = {key: value for key, value in plain[0].items() if key != "param_state" and not isinstance(key, int)}
    states = {
        number: {
            **common,
            "optimizer": {
                **common["optimizer"],
                "param_groups": [_closest_group(groups, own) for own in one.param_groups],
            },
            # Absent where this rank trains nothing that the optimizer steps on.
            "param_state": (saved if len(chain) == 1 else saved.get(number, {})).get("param_state", {}),
        }
        for number, one in enumerate(chain)
    }
    return states[0] if len(chain) == 1 else states


def _check_num_optimizers(saved: dict[Any, Any], num_optimizers: int) -> None:
    """State that isn't distributed stands by parameter in each optimizer: it fits as many as saved it.

    Raises:
        ValueError: There are more or fewer.
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
    """Whether param groups with their options are in it, not only the numbers of their parameters."""
    groups = state.get("optimizer", state).get("param_groups", ())
    return any("wd_mult" in group or "pre_wd_mult" in group for group in groups)


def _numbers(saved: dict[Any, Any]) -> list[int]:
    return sorted(key for key in saved if isinstance(key, int))


def identity(group: ParamGroup) -> tuple:
    """What a group is, whatever its rates and its parameters; Core's earlier names begin with `pre_`."""
    multipliers = tuple(group.get(key, group.get(f"pre_{key}")) for key in ("wd_mult", "lr_mult"))
    return (*multipliers, bool(group.get("is_decoupled_lr")))


def _closest_group(groups: list[ParamGroup], own: ParamGroup) -> ParamGroup:
    """The saved group that this run's is most like; whether its parameters are spread over ranks is this run's."""
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
