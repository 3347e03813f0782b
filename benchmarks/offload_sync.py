# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
r"""What the sync and its guard cost, against their load, a plain copy and the published three-level recipe.

    python benchmarks/offload_sync.py                                  # SmolLM2-135M's shape
    python benchmarks/offload_sync.py --num-layers 8 --hidden-size 2048 --ffn-hidden-size 8192 \
        --num-attention-heads 16 --num-query-groups 4                  # 0.6 billion parameters, 15 GB of memory

One process, random weights of the shape asked for, medians. Everything in a row is timed in the same process, one
after the other. On a machine without CUDA "device" and "host" are both host memory, so only the ratios to the load and
to the recipe say something there.
"""

import argparse
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from megatron.core import __version__ as core_version

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
COLUMNS = ("mode", "fraction", "copies, MB", "load, s", "sync, ms", "guard, ms", "guard/load", "plain copy, ms")
COLUMNS += ("sync/plain", "3 levels, ms", "sync/3 levels", "extra peak, MB")


def main() -> None:
    """Time each mode and print one row for it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shape = smollm2_135m_sft_config().model
    for name in SHAPE:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(shape, name))
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    print(f"torch {torch.__version__}, megatron-core {core_version}, {_where()}")
    print(" | ".join(COLUMNS))
    for precision_aware in (False, True):
        for fraction in (0.5, 1.0):
            print(" | ".join(_row(arguments, precision_aware, fraction)), flush=True)


def _where() -> str:
    device.enter_device()
    return "simulated accelerator" if device.is_simulated() else torch.cuda.get_device_name()


def _config(arguments: argparse.Namespace, directory: str, precision_aware: bool, fraction: float) -> Any:
    cfg = smollm2_135m_sft_config()
    for name in SHAPE:
        setattr(cfg.model, name, getattr(arguments, name))
    cfg.model.kv_channels = arguments.hidden_size // arguments.num_attention_heads
    cfg.optimizer.use_precision_aware_optimizer = precision_aware
    cfg.optimizer.optimizer_offload_fraction = fraction
    cfg.tokenizer.tokenizer_type, cfg.tokenizer.vocab_size = "NullTokenizer", arguments.vocab_size
    cfg.dataset.dataset_root = directory
    cfg.checkpoint.save = cfg.checkpoint.load = None
    cfg.checkpoint.pretrained_checkpoint = f"{directory}/pretrained"
    runtime_config_update(cfg)
    return cfg


def _row(arguments: argparse.Namespace, precision_aware: bool, fraction: float) -> list[str]:
    mode = ["precision-aware" if precision_aware else "FP32 shards", str(fraction)]
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "pretrained").mkdir()
        try:
            cfg = _config(arguments, directory, precision_aware, fraction)
        except ValueError as error:
            return [*mode, f"refused: {error}"]
        initialize_megatron(cfg)
        model = cfg.model.provide_distributed_model(ddp_config=cfg.ddp)
        save_model_checkpoint(model, f"{directory}/pretrained", run_config={"model": cfg.to_dict()["model"]})
        optimizer, scheduler = setup_optimizer(cfg.optimizer, cfg.scheduler, model)
        row = _measure(arguments.repeats, cfg, model, optimizer, scheduler)
    distributed.destroy_model_parallel()
    return mode + row


def _measure(repeats: int, cfg: Any, model: list[Any], optimizer: Any, scheduler: Any) -> list[str]:
    load = _seconds(3, lambda: load_checkpoint(GlobalState(cfg), model, optimizer, scheduler))
    peak = _extra_peak_bytes(lambda: sync_hybrid_optimizer_param_copies(optimizer))
    sync = _seconds(repeats, lambda: sync_hybrid_optimizer_param_copies(optimizer))
    guard = _seconds(repeats, lambda: check_hybrid_optimizer_param_copies(optimizer, exact=True))
    on_host = [
        copy for child in find_hybrid_optimizers(optimizer) for copy in child.optimizer.gpu_params_map_cpu_copy.values()
    ]
    plain = _seconds(repeats, _plain_copy(sum(copy.numel() for copy in on_host)))
    recipe = _seconds(repeats, lambda: _three_levels(optimizer))
    written = sync_hybrid_optimizer_param_copies(optimizer).num_bytes
    return [
        f"{written / 1e6:.0f}",
        f"{load:.2f}",
        f"{sync * 1e3:.1f}",
        f"{guard * 1e3:.2f}",
        f"{guard / load:.2%}",
        f"{plain * 1e3:.1f}",
        f"{sync / plain:.2f}",
        f"{recipe * 1e3:.1f}",
        f"{sync / recipe:.2f}",
        "not measured (simulated)" if peak is None else f"{peak / 1e6:.1f}",
    ]


def _seconds(repeats: int, work: Callable[[], Any]) -> float:
    """Median over the repeats, after one that isn't counted."""
    taken = []
    for _ in range(repeats + 1):
        device.synchronize()
        started = time.perf_counter()
        work()
        device.synchronize()
        taken.append(time.perf_counter() - started)
    return median(taken[1:])


def _extra_peak_bytes(work: Callable[[], Any]) -> int | None:
    """Device memory that the work takes beyond what was allocated before it; None where it is simulated."""
    if device.is_simulated():
        work()
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return torch.cuda.max_memory_allocated() - before


def _plain_copy(num_elements: int) -> Callable[[], Any]:
    """One copy of as many FP32 values as lie on the host, from the device into pinned memory."""
    source = torch.randn(num_elements, device=device.current_device())
    target = torch.empty(num_elements, device="cpu", pin_memory=not device.is_simulated())
    return lambda: target.copy_(source, non_blocking=True)


@torch.no_grad()
def _three_levels(optimizer: Any) -> None:
    """The published recipe: walk the FP32 shards, then the CPU clones, then the FP32 copies, each by itself."""
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
    main()
