# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The schedule of a resumed run: that of the checkpoint, or, if the configuration says so, that of this run.

Core keeps a schedule in its scheduler and in each param group (`max_lr`, `min_lr`, …), and the group's values win. Up
to 0.16.1 a load replaces the run's groups by the checkpoint's, so that an override has no effect. Later versions can't
match a group whose rates differ, and fail with KeyError. All versions refuse a run that was merely made longer.
"""

from pathlib import Path
from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron.bridge.training.run_state.optimizer_chain import GROUP_KEYS, ParamGroup, identity, match_optimizer_chain

OPTIONS = {
    "max_lr": "optimizer.lr",
    "min_lr": "optimizer.min_lr",
    "lr_warmup_steps": "the warm-up's samples (scheduler.lr_warmup_iters)",
    "lr_decay_steps": "the decay's samples (scheduler.lr_decay_iters, else train.train_iters)",
    "lr_decay_style": "scheduler.lr_decay_style",
    "start_wd": "scheduler.start_weight_decay",
    "end_wd": "scheduler.end_weight_decay",
    "wd_incr_steps": "the weight decay's samples (train.train_iters)",
    "wd_incr_style": "scheduler.weight_decay_incr_style",
}
"""The options behind Core's names, for errors."""


def load_optimizer(
    optimizer: Any, scheduler: OptimizerParamScheduler | None, loaded: dict[str, Any], path: Path
) -> None:
    """Restore an optimizer and its schedule.

    Args:
        optimizer: Megatron optimizer.
        scheduler: Its schedule, or None.
        loaded: The loaded state, with `optimizer` and `opt_param_scheduler`.
        path: The checkpoint, for errors.

    Raises:
        ValueError: The checkpoint's schedule is not this run's, and the configuration doesn't say which to follow.
    """
    saved_schedule = None
    if scheduler is not None:
        saved_schedule = _without_what_has_no_effect(loaded["opt_param_scheduler"], scheduler.state_dict())
        _check_schedule_is_decided(scheduler, saved_schedule, path)
    saved = match_optimizer_chain(optimizer, loaded["optimizer"])
    saved_groups = _param_groups(saved)
    saved_rates = _rates(saved_groups)
    _check_rates_of_single_parameters(saved_groups, optimizer.param_groups, scheduler, path)
    _set_rates(saved_groups, _rates(optimizer.param_groups))
    own_groups = [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    _tell_groups_apart(optimizer.param_groups, own_groups)
    if scheduler is None:
        return
    if scheduler.use_checkpoint_opt_param_scheduler:
        _set_rates(optimizer.param_groups, saved_rates)
    scheduler.load_state_dict(saved_schedule)
    scheduler.step(0)  # Core sets the groups before it has read the weight decay


def _check_schedule_is_decided(scheduler: OptimizerParamScheduler, saved: dict[str, Any], path: Path) -> None:
    if scheduler.override_opt_param_scheduler or scheduler.use_checkpoint_opt_param_scheduler:
        return
    ours = scheduler.state_dict()
    differing = [key for key in OPTIONS if key in saved and saved[key] != ours[key]]
    if differing:
        changes = ", ".join(f"{OPTIONS[key]} {saved[key]} -> {ours[key]}" for key in differing)
        raise ValueError(
            f"{path} (checkpoint.load) was saved under another schedule than this run's: {changes}; set "
            "scheduler.override_opt_param_scheduler=true to follow this run's, or "
            "scheduler.use_checkpoint_opt_param_scheduler=true to follow the checkpoint's"
        )


def _check_rates_of_single_parameters(
    saved: list[ParamGroup], own: list[ParamGroup], scheduler: OptimizerParamScheduler | None, path: Path
) -> None:
    """Refuse a resume in which other parameters have a learning rate of their own, or another one that nobody chose."""
    saved_rates, own_rates = (
        {_identity(group): (group.get("max_lr"), group.get("min_lr")) for group in groups if _is_decoupled(group)}
        for groups in (saved, own)
    )
    is_decided = scheduler is None or (
        scheduler.override_opt_param_scheduler or scheduler.use_checkpoint_opt_param_scheduler
    )
    if saved_rates == own_rates or (is_decided and saved_rates.keys() == own_rates.keys()):
        return
    shown = " -> ".join(str(sorted(set(rates.values())) or "none") for rates in (saved_rates, own_rates))
    remedy = "set them as they were, or checkpoint.load_optim=false"
    if saved_rates.keys() == own_rates.keys():
        remedy = "set them as they were, or scheduler.override_opt_param_scheduler=true to follow this run's"
    raise ValueError(
        f"{path} (checkpoint.load) has other learning rates of single parameters than this run "
        f"(optimizer_config_override_provider, optimizer.decoupled_lr): (highest, lowest) {shown}; {remedy}"
    )


def _is_decoupled(group: ParamGroup) -> bool:
    return bool(group.get("is_decoupled_lr"))


def _without_what_has_no_effect(saved: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """The saved schedule with this run's lengths where a length has no effect, as for a constant learning rate."""
    saved = dict(saved)
    if saved.get("start_wd") == saved.get("end_wd") == ours["start_wd"] == ours["end_wd"]:
        saved["wd_incr_steps"] = ours["wd_incr_steps"]
    if saved.get("lr_decay_style") == ours["lr_decay_style"] == "constant":
        saved["lr_decay_steps"] = ours["lr_decay_steps"]
    return saved


def _param_groups(optimizer_state: Any) -> list[ParamGroup]:
    """The param groups in a saved optimizer, at any depth of a chain."""
    if not isinstance(optimizer_state, dict):
        return []
    if isinstance(optimizer_state.get("param_groups"), list):
        return optimizer_state["param_groups"]
    return [group for value in optimizer_state.values() for group in _param_groups(value)]


def _identity(group: ParamGroup) -> tuple:
    """The key of a param group without its rates."""
    return (*identity(group), bool(group.get("is_expert_parallel")))


def _rates(groups: list[ParamGroup]) -> dict[tuple, dict[str, float]]:
    """The rates of each group, by `_identity`; without groups that differ only in their rates."""
    rates: dict[tuple, dict[str, float]] = {}
    ambiguous = set()
    for group in groups:
        own = {key: group[key] for key in GROUP_KEYS if group.get(key) is not None}
        if rates.setdefault(_identity(group), own) != own:
            ambiguous.add(_identity(group))
    return {identity: own for identity, own in rates.items() if identity not in ambiguous}


def _tell_groups_apart(loaded: list[ParamGroup], own: list[ParamGroup]) -> None:
    """Give groups that differ only in their rates their own again: up to 0.16.1 Core loads the last of them into each.

    Args:
        loaded: The optimizer's groups after the load.
        own: The same groups before it, in the same order.
    """
    clear = _rates(own).keys()
    for group, before in zip(loaded, own, strict=True):
        if _identity(before) not in clear:
            group.update({key: before[key] for key in (*GROUP_KEYS, "default_config") if key in before})


def _set_rates(groups: list[ParamGroup], rates: dict[tuple, dict[str, float]]) -> None:
    """Give each group the rates of its counterpart. Groups that differ only in their rates keep them."""
    alike = rates.keys() & _rates(groups).keys()
    for group in groups:
        if _identity(group) in alike:
            for key in GROUP_KEYS:
                group.pop(key, None)
            group.update(rates[_identity(group)])
