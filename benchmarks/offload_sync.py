# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
r"""What the sync after a load costs, against the published three-level recipe and against one plain copy of the bytes
that it writes. Also what its guard costs, against the load. All of the optimizer is offloaded.

    python -m benchmarks.offload_sync                                  # SmolLM2-135M's shape
    python -m benchmarks.offload_sync --num-layers 8 --hidden-size 2048 --ffn-hidden-size 8192 \
        --num-attention-heads 16 --num-query-groups 4                  # 0.6 billion parameters, 15 GB of memory

Random weights of the shape asked for. On a machine without CUDA "device" and "host" are both host memory.
"""

import argparse
import logging
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.figures import Figure, interleaved, ratios, run
from megatron.bridge.checkpoint.model_checkpoint import save_model_checkpoint
from megatron.bridge.recipes.smollm2 import smollm2_135m_sft_config
from megatron.bridge.training.checkpointing import (
    check_hybrid_optimizer_param_copies,
    load_checkpoint,
    sync_hybrid_optimizer_param_copies,
)
from megatron.bridge.training.config import runtime_config_update
from megatron.bridge.training.cpu_offload.param_copies import find_hybrid_optimizers
from megatron.bridge.training.initialize import initialize_megatron
from megatron.bridge.training.optim import setup_optimizer
from megatron.bridge.training.state import GlobalState
from megatron.bridge.utils import device, distributed

SHAPE = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "vocab_size")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shape = smollm2_135m_sft_config().model
    for name in SHAPE:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(shape, name))
    parser.add_argument("--fraction", type=float, default=1.0, help="of the optimizer on the CPU (%(default)s)")
    parser.add_argument("--repeats", type=int, default=9)
    return parser


def measure(arguments: argparse.Namespace) -> list[Figure]:
    """Both modes, each on a model and an optimizer of its own."""
    logging.disable(logging.INFO)
    device.enter_device()
    return [figure for precision_aware in (True, False) for figure in _mode(arguments, precision_aware)]


def _mode(arguments: argparse.Namespace, precision_aware: bool) -> list[Figure]:
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "pretrained").mkdir()
        cfg = _config(arguments, directory, precision_aware)
        initialize_megatron(cfg)
        model = cfg.model.provide_distributed_model(ddp_config=cfg.ddp)
        save_model_checkpoint(model, f"{directory}/pretrained", run_config={"model": cfg.to_dict()["model"]})
        optimizer, scheduler = setup_optimizer(cfg.optimizer, cfg.scheduler, model)
        load = partial(load_checkpoint, GlobalState(cfg), model, optimizer, scheduler)
        figures = _figures(arguments.repeats, load, optimizer, "precision-aware" if precision_aware else "FP32 shards")
    distributed.destroy_model_parallel()
    return figures


def _config(arguments: argparse.Namespace, directory: str, precision_aware: bool) -> Any:
    cfg = smollm2_135m_sft_config()
    for name in SHAPE:
        setattr(cfg.model, name, getattr(arguments, name))
    cfg.model.kv_channels = arguments.hidden_size // arguments.num_attention_heads
    cfg.optimizer.use_precision_aware_optimizer = precision_aware
    cfg.optimizer.optimizer_offload_fraction = arguments.fraction
    cfg.tokenizer.tokenizer_type, cfg.tokenizer.vocab_size = "NullTokenizer", arguments.vocab_size
    cfg.dataset.dataset_root = directory
    cfg.checkpoint.save = cfg.checkpoint.load = None
    cfg.checkpoint.pretrained_checkpoint = f"{directory}/pretrained"
    runtime_config_update(cfg)
    return cfg


def _figures(repeats: int, load: Callable[[], Any], optimizer: Any, mode: str) -> list[Figure]:
    sync = partial(sync_hybrid_optimizer_param_copies, optimizer)
    rows = {
        "load": load,
        "sync": sync,
        "recipe": partial(_three_levels, optimizer),
        "plain": _plain_copy(optimizer),
        "guard": partial(_guard, optimizer),
    }
    seconds = interleaved({name: partial(_finished, work) for name, work in rows.items()}, repeats, settle=lambda: None)
    largest = 4 * max(param.numel() for child in find_hybrid_optimizers(optimizer) for param in _params(child))
    peaks = tuple(_extra_peak_bytes(sync) / largest for _ in range(3))
    times = {name: median(taken) for name, taken in seconds.items()}
    sizes = f"{sync().num_bytes / 1e6:.0f} MB of copies in {times['sync'] * 1e3:.0f} ms"
    # On a GPU the recipe's FP32 copies cross the link one after the other.
    aim = 0.6 if mode == "precision-aware" else 1.0 if device.is_simulated() else 0.65
    guarded = f"{times['guard'] * 1e3:.1f} ms after a load of {times['load']:.2f} s from the page cache"
    if device.is_simulated():
        observed = partial(check_hybrid_optimizer_param_copies, optimizer, exact=True)
        (taken,) = interleaved({"guard": observed}, repeats, settle=lambda: None).values()
        guarded += f"; {median(taken) * 1e3:.1f} ms where the simulation looks at each of its calls"
    return [
        Figure(f"sync, {mode}", "the three-level recipe", ratios(seconds["sync"], seconds["recipe"]), aim, note=sizes),
        Figure(f"sync, {mode}", "one plain copy of its bytes", ratios(seconds["sync"], seconds["plain"]), 1.2),
        Figure(f"extra peak memory of the sync, {mode}", "the largest parameter in FP32", peaks, 1.0),
        Figure(
            f"guard, {mode}",
            "the load",
            _percent(seconds["guard"], seconds["load"]),
            1.0,
            "%",
            fails_above=4.0,
            note=guarded,
        ),
    ]


def _guard(optimizer: Any) -> None:
    """As where there is a GPU: nobody looks at its calls."""
    with device.bypass_simulation():
        check_hybrid_optimizer_param_copies(optimizer, exact=True)


def _finished(work: Callable[[], Any]) -> None:
    work()
    device.synchronize()


def _percent(parts: tuple[float, ...], wholes: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(100 * ratio for ratio in ratios(parts, wholes))


def _params(child: Any) -> list[torch.Tensor]:
    return [param for groups in (child.model_float16_groups, child.model_fp32_groups) for ps in groups for param in ps]


def _extra_peak_bytes(work: Callable[[], Any]) -> int:
    """Memory that the work takes beyond what was taken before it: on the device, or of the process where Linux says."""
    if not device.is_simulated():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak restarts from what is resident
    before = _peak_resident_bytes()
    work()
    return _peak_resident_bytes() - before


def _peak_resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def _plain_copy(optimizer: Any) -> Callable[[], Any]:
    """The least that can be done: the same bytes, from one 16-bit tensor into one of FP32 on each side of the link."""
    copies = {}
    for child in find_hybrid_optimizers(optimizer):
        found = [shard for shards in child.shard_fp32_from_float16_groups for shard in shards if shard is not None]
        found += child.optimizer.gpu_params_map_cpu_copy.values()
        found += child.optimizer.param_to_fp32_param.values()
        copies |= {id(copy): copy for copy in found}
    sizes = {side: sum(copy.numel() for copy in copies.values() if copy.is_cuda is side) for side in (True, False)}
    source = torch.randn(max(sizes.values()), device=device.current_device(), dtype=torch.bfloat16)
    on_device = torch.empty(sizes[True], device=device.current_device())
    on_host = torch.empty(sizes[False], device="cpu", pin_memory=not device.is_simulated())
    targets = [target for target in (on_device, on_host) if target.numel()]

    def copy() -> None:
        for target in targets:
            target.copy_(source[: target.numel()], non_blocking=True)

    return copy


@torch.no_grad()
def _three_levels(optimizer: Any) -> None:
    """The published recipe: walk the FP32 shards, then the CPU copies, then the FP32 copies, each by itself."""
    for child in find_hybrid_optimizers(optimizer):
        for params, shards in zip(child.model_float16_groups, child.shard_fp32_from_float16_groups, strict=True):
            for param, shard in zip(params, shards, strict=True):
                if shard is not None:
                    owned = child._get_model_param_range_map(param)["param"]
                    shard.data.copy_(param.view(-1)[owned.start : owned.end])
        for given, clone in child.optimizer.gpu_params_map_cpu_copy.items():
            clone.data.copy_(given.data)
        for given, copy in child.optimizer.param_to_fp32_param.items():
            copy.data.copy_(given)


if __name__ == "__main__":
    run(measure, build_parser())
