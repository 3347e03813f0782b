# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Runs of a hybrid optimizer by itself: its steps, what happens between them, and all that they change."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

SIZES = (64, 128, 1, 63, 4096, 65, 64 * 37, 100, 256, 2048)
"""Elements: with and without a tail after the kernel's vectors."""

STEPS = 4


def hybrid_of(hybrid_class: type, *, aware: bool, overlap: bool, fraction: float = 1.0, **options: Any) -> Any:
    """A hybrid optimizer over neighbours in a buffer, as Core's distributed optimizer has them, in two groups."""
    from megatron.bridge.utils.device import current_device

    dtype = torch.bfloat16 if aware else torch.float32
    torch.manual_seed(1)
    buffer = torch.randn(sum(SIZES), device=current_device()).to(dtype)
    weights = list(buffer.split(SIZES))
    groups = [{"params": weights[:7], "weight_decay": 0.1}, {"params": weights[7:], "weight_decay": 0.0, "lr": 0.02}]
    return hybrid_class(
        groups,
        offload_fraction=fraction,
        cpu_optimizer_cls=torch.optim.AdamW,
        param_update_in_fp32=True,
        overlap_cpu_optimizer_d2h_h2d=overlap,
        lr=1e-2,
        **{"gpu_optimizer_cls": torch.optim.AdamW, "fused": True, **options},
    )


def params_of(hybrid: Any) -> list[torch.Tensor]:
    """All that it was given."""
    return [param for group in hybrid.param_groups for param in group["params"]]


def take_step(hybrid: Any, step: int, without: tuple[int, ...] = ()) -> None:
    """One step on gradients that depend on the step alone, neighbours in memory on every second one."""
    from megatron.bridge.utils.device import current_device

    params = params_of(hybrid)
    generator = torch.Generator().manual_seed(step)
    gradients = torch.randn(sum(SIZES), generator=generator).to(current_device()).to(params[0].dtype).split(SIZES)
    for at, (param, gradient) in enumerate(zip(params, gradients, strict=True)):
        param.grad = None if at in without else gradient if step % 2 else gradient.clone()
    hybrid.param_groups[0]["lr"] *= 0.9
    hybrid.step()
    for param in params:
        if param.grad is not None:
            param.grad.fill_(7.0)  # the next backward pass may write there


def seen_of(hybrid: Any) -> dict[str, torch.Tensor]:
    """A copy of everything that a step changes."""
    seen = {}
    for at, param in enumerate(params_of(hybrid)):
        stepped_on = hybrid.param_to_inner_param[param]
        seen[f"{at} weight"], seen[f"{at} master"] = param.detach().clone(), stepped_on.detach().clone()
        seen |= {f"{at} {name}": torch.as_tensor(value).clone() for name, value in hybrid.state.get(param, {}).items()}
    return seen


def _reload(hybrid: Any) -> None:
    """What a resume does to a running optimizer: its state comes back in tensors of its own."""
    hybrid.load_state_dict(copy.deepcopy(hybrid.state_dict()))


def _count_apart(hybrid: Any) -> None:
    """One parameter's counter, as no run has it."""
    next(iter(hybrid.state.values()))["step"].fill_(7.0)


def _take_moments_out(hybrid: Any) -> None:
    """Moments and counters as a local checkpoint leaves them: others, in the dicts that there are."""
    for state in hybrid.state.values():
        moments = {name: state[name] * 0.5 for name in ("exp_avg", "exp_avg_sq")}
        state.update(moments, step=state["step"].clone())


class Run(NamedTuple):
    """A run, and how often in it a bucket is stepped on as one. Each group is a bucket."""

    flat_steps: int
    options: dict[str, Any] = {}
    after_two_steps: Callable[[Any], None] | None = None
    without_gradient: tuple[int, ...] = ()
    """Parameters that have none in the first and the third step."""


RUNS = {
    "plain": Run(2 * STEPS),
    "half": Run(STEPS, {"fraction": 0.5}),
    "reloaded": Run(2 * STEPS, {}, _reload),
    "half, reloaded": Run(STEPS, {"fraction": 0.5}, _reload),
    "moments elsewhere": Run(2 * STEPS, {}, _take_moments_out),
    "counters apart": Run(2 + STEPS, {}, _count_apart),
    "no gradient": Run(STEPS, {}, None, (0, 2, 5)),
    "not fused": Run(0, {"fused": None}),
    "amsgrad": Run(0, {"amsgrad": True}),
    "maximize": Run(2 * STEPS, {"maximize": True}),
}


def states_after_steps(hybrid_class: type, run: Run, *, aware: bool, overlap: bool) -> list[dict[str, torch.Tensor]]:
    """What is there after each step."""
    hybrid, seen = hybrid_of(hybrid_class, aware=aware, overlap=overlap, **run.options), []
    for step in range(STEPS):
        last_use = {f"{at} before": param.clone() for at, param in enumerate(params_of(hybrid))}
        take_step(hybrid, step, run.without_gradient if step in (0, 2) else ())
        if step == 1 and run.after_two_steps:
            run.after_two_steps(hybrid)
        seen.append({**last_use, **seen_of(hybrid)})
    return seen


def differing_states(expected: list[dict[str, torch.Tensor]], found: list[dict[str, torch.Tensor]]) -> list[str]:
    """What hasn't the same bits, after which step."""
    return [
        f"step {step}: {name}"
        for step, (one, other) in enumerate(zip(expected, found, strict=True))
        for name in sorted({*one, *other})
        if name not in one or name not in other or not torch.equal(one[name], other[name])
    ]
