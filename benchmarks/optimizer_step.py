# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
r"""A step of the offloaded optimizer, against Core's own and against what the machine can do.

    python -m benchmarks.optimizer_step
    python -m benchmarks.optimizer_step --small 20000 --ranks 2

Three optimizers are timed in turn, in one process, on the same sizes and gradients: stock Core's
`HybridDeviceOptimizer`; the same class as `setup_optimizer` builds it; and the limit, torch's fused AdamW over one flat
buffer, with one copy of all gradients to the host and one of all weights back. The sizes are many small parameters, and
those of one data-parallel rank of SmolLM2-135M, at the places in its buffers that Core gives them, and a few large
ones. All of the optimizer is offloaded.
"""

import argparse
import logging
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple

import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

from benchmarks.figures import Figure, interleaved, ratios, run
from megatron.bridge.core_repairs import install, offload_step
from megatron.bridge.offload_engine.shards import make_contiguous
from megatron.bridge.planning.memory import planned_run
from megatron.bridge.recipes.smollm2 import smollm2_135m_sft_config
from megatron.bridge.training.optim import setup_optimizer
from megatron.bridge.utils import device

SMALL_ELEMENTS = 2048
LARGE, LARGE_ELEMENTS = 8, 1 << 21
OPTIONS = {"lr": 1e-4, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}


class Places(NamedTuple):
    """Where the parameters of each group lie in a rank's buffer: (first element, elements)."""

    groups: list[list[tuple[int, int]]]

    @property
    def elements(self) -> int:
        """Of the buffer."""
        return max(start + size for group in self.groups for start, size in group)


def build_parser() -> argparse.ArgumentParser:
    """Options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", type=int, default=4000, help=f"parameters of {SMALL_ELEMENTS} elements")
    parser.add_argument("--ranks", type=int, default=8, help="data-parallel ranks that share SmolLM2-135M")
    parser.add_argument("--repeats", type=int, default=21)
    return parser


def measure(arguments: argparse.Namespace) -> list[Figure]:
    """Time both sizes in both modes, with overlap and without."""
    logging.disable(logging.INFO)
    small = Places([[(at * SMALL_ELEMENTS, SMALL_ELEMENTS) for at in range(arguments.small)]])
    sizes = {
        f"{arguments.small} parameters of {SMALL_ELEMENTS}": (small, 1 / 1.5),
        f"SmolLM2-135M, a rank of {arguments.ranks}": (_smollm2(arguments.ranks), 1.0),
        f"{LARGE} parameters of {LARGE_ELEMENTS}": (
            Places([[(at * LARGE_ELEMENTS, LARGE_ELEMENTS) for at in range(LARGE)]]),
            1.05,
        ),
    }
    figures = []
    for name, (places, at_most) in sizes.items():
        for aware in (False, True):
            for overlap in (False, True):
                mode = ("precision-aware" if aware else "FP32 shards") + (", overlap" if overlap else "")
                figures += _figures(f"{name}, {mode}", places, at_most, arguments.repeats, aware=aware, overlap=overlap)
    return figures


def _figures(
    what: str, places: Places, at_most: float, repeats: int, *, aware: bool, overlap: bool
) -> tuple[Figure, Figure]:
    ours = install._repaired_class(HybridDeviceOptimizer, offload_step.REPAIRS[:1])
    rows = {
        "ours": _stepper(ours, places, aware=aware, overlap=overlap, lay_shards=make_contiguous),
        "stock": _stepper(HybridDeviceOptimizer, places, aware=aware, overlap=overlap),
        "limit": _limit(places, aware=aware),
    }
    taken = interleaved(rows, repeats, settle=device.synchronize)
    what = f"optimizer step, {what}"
    note = f"at best {', '.join(f'{name} {1e3 * min(seconds):.1f} ms' for name, seconds in taken.items())}"
    why = "; beyond it, some 1 µs of Python a parameter"
    ratio, to_limit = ratios(taken["ours"], taken["stock"]), ratios(taken["ours"], taken["limit"])
    return (
        Figure(what, "stock HybridDeviceOptimizer", ratio, at_most, note=note),
        Figure(what, "one flat AdamW and two copies", to_limit, 1.2, fails_above=3.0, note=note + why),
    )


def _stepper(
    hybrid_class: type,
    places: Places,
    *,
    aware: bool,
    overlap: bool,
    lay_shards: Callable[[list[torch.Tensor]], None] | None = None,
) -> Callable[[], None]:
    """A hybrid optimizer's step. Its parameters and gradients lie as Core has them.

    Precision-aware these are views of the weights' buffer; else FP32 tensors, one for each parameter, which
    `lay_shards` may move. The gradients are views of the gradients' buffer.
    """
    weights = _on_device(places.elements, torch.bfloat16 if aware else torch.float32)
    gradients = _on_device(places.elements, torch.float32)
    groups = []
    for group in places.groups:
        params = [weights[start : start + size] for start, size in group]
        if not aware:
            params = [param.clone() for param in params]
            if lay_shards is not None:
                lay_shards(params)
        for param, (start, size) in zip(params, group, strict=True):
            setattr(param, "decoupled_grad" if aware else "grad", gradients[start : start + size])
        groups.append({"params": params})
    hybrid = hybrid_class(
        groups,
        offload_fraction=1.0,
        cpu_optimizer_cls=torch.optim.AdamW,
        gpu_optimizer_cls=torch.optim.AdamW,
        param_update_in_fp32=True,
        overlap_cpu_optimizer_d2h_h2d=overlap,
        fused=True,
        **OPTIONS,
    )

    def step() -> None:
        hybrid.step()
        device.synchronize()

    return step


def _limit(places: Places, *, aware: bool) -> Callable[[], None]:
    """The two copies and the kernel, each called once for everything."""
    elements = sum(size for group in places.groups for _, size in group)
    weights = _on_device(elements, torch.bfloat16 if aware else torch.float32)
    gradients = _on_device(elements, torch.float32)
    pinned = not device.is_simulated()
    master, master.grad = (torch.zeros(elements, device="cpu", pin_memory=pinned) for _ in range(2))
    adam = torch.optim.AdamW([master], fused=True, **OPTIONS)

    def step() -> None:
        master.grad.copy_(gradients, non_blocking=True)
        device.synchronize()
        adam.step()
        weights.copy_(master, non_blocking=True)
        device.synchronize()

    return step


def _on_device(elements: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(elements, device=device.current_device()) * 1e-3).to(dtype)


def _smollm2(ranks: int) -> Places:
    """Those of the first data-parallel rank.

    Planned in a process of its own: a plan simulates its device, and this process may compute on a real one.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return Places(pool.submit(_plan_smollm2, ranks).result())


def _plan_smollm2(ranks: int) -> list[list[tuple[int, int]]]:
    """The places, from Core's own optimizer on tensors without memory."""
    logging.disable(logging.INFO)
    cfg = smollm2_135m_sft_config()
    cfg.optimizer.optimizer_cpu_offload, cfg.optimizer.optimizer_offload_fraction = True, 1.0
    cfg.train.micro_batch_size, cfg.train.global_batch_size = 1, ranks
    with planned_run(cfg, ranks, 0) as planned:
        optimizer, _ = setup_optimizer(planned.cfg.optimizer, planned.cfg.scheduler, planned.model)
        (distributed_optimizer,) = optimizer.chained_optimizers
        owned = {
            param: distributed_optimizer._get_model_param_range_map(param)["gbuf_world"]
            for param in distributed_optimizer.model_param_group_index_map
        }
        groups: dict[int, list[tuple[int, int]]] = {}
        first = 0
        for param in sorted(owned, key=lambda param: owned[param].start):
            group, _ = distributed_optimizer.model_param_group_index_map[param]
            groups.setdefault(group, []).append((first, owned[param].size))
            first += -(-owned[param].size // 64) * 64  # as Core pads
        return list(groups.values())


if __name__ == "__main__":
    run(measure, build_parser())
