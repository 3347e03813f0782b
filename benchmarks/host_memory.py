# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
r"""Host memory that an offloaded optimizer takes, against what it must hold.

    python -m benchmarks.host_memory
    python -m benchmarks.host_memory --num-layers 30            # all of SmolLM2-135M: 2.2 GB

Each figure is from processes of its own, of one rank, with all of the optimizer offloaded. The peak of resident memory
while the optimizer is built and takes two steps, less what was resident before (imports, weights, gradients), is
divided by the need: 16 bytes a parameter, for master, two moments and gradient. On the simulated accelerator device
memory is resident too. So in the default mode the FP32 shards that stay on the device, 4 bytes a parameter, are
subtracted, and clipping and the gathering of weights, which work on the device, are left out. Pinned memory is plain
memory there. The note counts, from their sizes, what torch's pinned tensors would add to Core's own.
"""

import argparse
import logging
import multiprocessing
import os
import resource
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure, run

MB = 1 << 20


def build_parser() -> argparse.ArgumentParser:
    """Options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-layers", type=int, default=6, help="of SmolLM2-135M")
    parser.add_argument("--repeats", type=int, default=2)
    return parser


def measure(arguments: argparse.Namespace) -> list[Figure]:
    """Measure both modes, Core's own optimizer beside ours, and state in BF16."""
    figures = []
    for aware in (False, True):
        ours = [_in_a_process(arguments.num_layers, aware, False) for _ in range(arguments.repeats)]
        (stock, need, rounded) = _in_a_process(arguments.num_layers, aware, True)
        figures.append(
            Figure(
                f"host memory, {'precision-aware' if aware else 'FP32 shards'}",
                "masters, moments and gradients",
                tuple(peak / need for peak, need, _ in ours),
                1.1,
                note=f"need {need / MB:.0f} MB; stock {stock / need:.2f}x, and {rounded / need:.2f}x more where pinned "
                "tensors are rounded up to powers of two",
            )
        )
    low = [_in_a_process(arguments.num_layers, True, False, bf16=True) for _ in range(arguments.repeats)]
    figures.append(
        Figure(
            "host memory, precision-aware, moments and gradients in BF16",
            "the same in FP32",
            tuple(peak / full for peak, full, _ in low),
            0.7,
            note="10 of 16 bytes a parameter",
        )
    )
    return figures


def _in_a_process(num_layers: int, aware: bool, stock: bool, *, bf16: bool = False) -> tuple[int, int, int]:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_process, args=(sender, num_layers, aware, stock, bf16))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


def _measure_process(sender: Any, num_layers: int, aware: bool, stock: bool, bf16: bool) -> None:
    """Send the bytes that the optimizer took at its peak, those that it must hold, and what rounding up would add."""
    logging.disable(logging.INFO)
    import torch

    from megatron.bridge.core_repairs import install
    from megatron.bridge.recipes.smollm2 import smollm2_135m_sft_config
    from megatron.bridge.training.config import runtime_config_update
    from megatron.bridge.training.initialize import initialize_megatron
    from megatron.bridge.training.optim import setup_optimizer

    cfg = smollm2_135m_sft_config()
    cfg.model.num_layers = num_layers
    cfg.tokenizer.tokenizer_type, cfg.tokenizer.vocab_size = "NullTokenizer", cfg.model.vocab_size
    cfg.checkpoint.save = cfg.checkpoint.load = None
    cfg.checkpoint.pretrained_checkpoint = cfg.dataset.dataset_root = "."
    cfg.optimizer.optimizer_cpu_offload, cfg.optimizer.optimizer_offload_fraction = True, 1.0
    cfg.optimizer.use_precision_aware_optimizer = aware
    if bf16:
        for name in ("exp_avg_dtype", "exp_avg_sq_dtype", "main_grads_dtype"):
            setattr(cfg.optimizer, name, torch.bfloat16)
    runtime_config_update(cfg)
    initialize_megatron(cfg)
    model = cfg.model.provide_distributed_model(ddp_config=cfg.ddp)
    params = [param for chunk in model for param in chunk.parameters()]
    for param in params:
        param.main_grad.fill_(1e-3)
    before = _resident_bytes()
    if stock:
        install.REPAIRS = ()
    optimizer, _ = setup_optimizer(cfg.optimizer, cfg.scheduler, model)
    for _ in range(2):
        for child in optimizer.chained_optimizers:
            child.prepare_grads()
            child.optimizer.step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    hybrids = [child.optimizer for child in optimizer.chained_optimizers]
    sizes = [param.numel() for hybrid in hybrids for param in hybrid.gpu_params_map_cpu_copy]
    shards = 0 if aware else 4 * sum(sizes)
    pinned = [4 * size for size in sizes]  # gradients, and by default masters
    rounded = sum((1 << (num_bytes - 1).bit_length()) - num_bytes for num_bytes in pinned)
    sender.send((peak - shards, 16 * sum(sizes), rounded * (1 if aware else 2)))


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    run(measure, build_parser())
