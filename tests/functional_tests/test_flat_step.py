# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The offloaded step in buckets against Core's own, tensor by tensor: the same bits, whatever a run does."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

from tests.rigs.ranks import run_on_ranks

SIZES = (64, 128, 1, 63, 4096, 65, 64 * 37, 100, 256, 2048)
"""Elements: with and without a tail after the kernel's vectors."""

STEPS = 4


def _hybrid(hybrid_class: type, *, aware: bool, overlap: bool, fraction: float = 1.0, **options: Any) -> Any:
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
        gpu_optimizer_cls=torch.optim.AdamW,
        param_update_in_fp32=True,
        overlap_cpu_optimizer_d2h_h2d=overlap,
        lr=1e-2,
        **{"fused": True, **options},
    )


def _params(hybrid: Any) -> list[torch.Tensor]:
    return [param for group in hybrid.param_groups for param in group["params"]]


def _take_step(hybrid: Any, step: int, without: tuple[int, ...] = ()) -> None:
    """One step on gradients that depend on the step alone, neighbours in memory on every second one."""
    from megatron.bridge.utils.device import current_device

    params = _params(hybrid)
    generator = torch.Generator().manual_seed(step)
    gradients = torch.randn(sum(SIZES), generator=generator).to(current_device()).to(params[0].dtype).split(SIZES)
    for at, (param, gradient) in enumerate(zip(params, gradients, strict=True)):
        param.grad = None if at in without else gradient if step % 2 else gradient.clone()
    hybrid.param_groups[0]["lr"] *= 0.9
    hybrid.step()


def _seen(hybrid: Any) -> dict[str, torch.Tensor]:
    """A copy of everything that a step changes."""
    seen = {}
    for at, param in enumerate(_params(hybrid)):
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


def _compared(run: str, *, aware: bool, overlap: bool) -> tuple[int, list[str]]:
    """How often a bucket was stepped on as one, and in what the bits are not Core's."""
    from megatron.bridge.core_repairs import install, master_lookup, offload_step, state_device
    from megatron.bridge.offload_engine.adam import Bucket

    of_run = RUNS[run]
    core = install._repaired_class(HybridDeviceOptimizer, (*master_lookup.REPAIRS, *state_device.REPAIRS))
    entered, step_lists = [], Bucket.step_lists
    Bucket.step_lists = lambda bucket: entered.append(bucket) or step_lists(bucket)
    torch.set_num_threads(2)
    try:
        expected = _states(core, of_run, aware=aware, overlap=overlap)
        found = _states(install._repaired_class(core, offload_step.REPAIRS[:1]), of_run, aware=aware, overlap=overlap)
    finally:
        torch.set_num_threads(1)
        Bucket.step_lists = step_lists
    return len(entered), [
        f"step {step}: {name}"
        for step, (one, other) in enumerate(zip(expected, found, strict=True))
        for name in sorted({*one, *other})
        if name not in one or name not in other or not torch.equal(one[name], other[name])
    ]


def _states(hybrid_class: type, run: Run, *, aware: bool, overlap: bool) -> list[dict[str, torch.Tensor]]:
    """What is there after each step."""
    hybrid, seen = _hybrid(hybrid_class, aware=aware, overlap=overlap, **run.options), []
    for step in range(STEPS):
        _take_step(hybrid, step, run.without_gradient if step in (0, 2) else ())
        if step == 1 and run.after_two_steps:
            run.after_two_steps(hybrid)
        seen.append(_seen(hybrid))
    return seen


@pytest.mark.parametrize("overlap", [False, True], ids=["serial", "overlap"])
@pytest.mark.parametrize("aware", [False, True], ids=["default", "precision-aware"])
def test_the_bits_are_those_of_cores_own_step(aware, overlap):
    for name, run in RUNS.items():
        ((flat_steps, differing),) = run_on_ranks(_compared, 1, name, aware=aware, overlap=overlap)
        assert (flat_steps, differing) == (run.flat_steps, []), name


def _pinned_slab() -> tuple[bool, bool, float]:
    """Whether a slab's tensors and its run are pinned, and what a copy to the device and back changes."""
    from megatron.bridge.offload_engine.host_memory import Slab
    from megatron.bridge.utils.device import current_device

    slab = Slab([torch.Size([1000]), torch.Size([64])], pinned=True)
    values = torch.randn(1000, device=current_device())
    slab.tensors[0].copy_(values, non_blocking=True)
    torch.cuda.synchronize()
    return slab.tensors[1].is_pinned(), slab.run(0, 1).is_pinned(), float((slab.tensors[0] - values.cpu()).abs().max())


@pytest.mark.gpu
def test_memory_of_exact_size_is_pinned():
    assert run_on_ranks(_pinned_slab, 1) == [(True, True, 0.0)]
