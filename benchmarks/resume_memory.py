# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""How much memory a resume takes, against the run that it resumes: two ranks, each job in processes of its own.

    python -m benchmarks.resume_memory                     # 73 million parameters, all of the optimizer offloaded
    python -m benchmarks.resume_memory --fraction 0.5 --precision-aware

The figures are the peak resident memory of the larger rank, beside what importing takes. On a machine without CUDA,
"device" memory is host memory and counted with it.
"""

import argparse
import logging
import multiprocessing
import os
import resource
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.figures import Figure, run
from megatron.bridge.data.config import DatasetProvider
from megatron.bridge.recipes.smollm2 import smollm2_135m_sft_config
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain
from megatron.bridge.utils import device

RANKS, SEQ_LENGTH, SAVED_AT = 2, 32, 2
FORMATS = {"dp_reshardable": False, "fully_reshardable": True}


@dataclass
class RandomTokens(DatasetProvider):
    """Data enough for some steps."""

    vocab_size: int = 0

    def build_datasets(self, context: Any) -> tuple[Any, Any, Any]:
        """64 sequences of random tokens; no validation."""
        rows = torch.randint(self.vocab_size, (64, SEQ_LENGTH + 1), generator=torch.Generator().manual_seed(1))
        return (
            [{"tokens": row[:-1], "labels": row[1:], "loss_mask": torch.ones(SEQ_LENGTH)} for row in rows],
            None,
            None,
        )


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-layers", type=int, default=13)
    parser.add_argument("--fraction", type=float, default=1.0, help="of the optimizer on the CPU; 0: no offload")
    parser.add_argument("--precision-aware", action="store_true")
    parser.add_argument("--format", nargs="+", choices=tuple(FORMATS), default=["dp_reshardable"])
    return parser


def measure(arguments: argparse.Namespace) -> list[Figure]:
    """Run the jobs of each format."""
    figures = []
    for name in arguments.format:
        with tempfile.TemporaryDirectory() as directory:
            options = {"save": directory, "dist_ckpt_optim_fully_reshardable": FORMATS[name]}
            imports, run_peak = _peaks(arguments, SAVED_AT + 2, {"save": None})
            _, saving = _peaks(arguments, SAVED_AT, options)
            _, resumed = _peaks(arguments, SAVED_AT + 2, {"save": None, "load": directory})
        note = f"{resumed:.0f} MB against {run_peak:.0f} MB, of each {imports:.0f} MB after the imports"
        figures += [
            Figure(f"memory of a resume, {name}", "the run it continues", (resumed / run_peak,), 1.2, note=note),
            Figure(f"memory of a run that saves, {name}", "one that doesn't", (saving / run_peak,), 1.2),
        ]
    return figures


def _peaks(arguments: argparse.Namespace, steps: int, checkpoint: dict[str, Any]) -> tuple[float, float]:
    """Peak memory in MB after the imports and at the end of a job: the rank's with the higher end."""
    context = multiprocessing.get_context("spawn")
    peaks = context.Queue()
    with tempfile.TemporaryDirectory() as store:
        ranks = [
            context.Process(target=_job, args=(rank, f"{store}/ranks", arguments, steps, checkpoint, peaks))
            for rank in range(RANKS)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
    if any(process.exitcode for process in ranks):
        raise RuntimeError("a rank failed; its traceback is above")
    return max((peaks.get() for _ in ranks), key=lambda pair: pair[1])


def _job(
    rank: int, store: str, arguments: argparse.Namespace, steps: int, checkpoint: dict[str, Any], peaks: Any
) -> None:
    logging.disable(logging.INFO)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_RANK=str(rank))
    backend = device.enter_device().backend
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=RANKS)
    imports = _peak_megabytes()
    cfg = smollm2_135m_sft_config()
    cfg.model.num_layers, cfg.model.seq_length = arguments.num_layers, SEQ_LENGTH
    cfg.train.micro_batch_size, cfg.train.global_batch_size, cfg.train.train_iters = 1, 4, steps
    cfg.scheduler.lr_warmup_iters, cfg.scheduler.lr_decay_iters = 1, 100
    cfg.validation.eval_at_start, cfg.validation.eval_iters = False, 0
    cfg.optimizer.optimizer_cpu_offload = arguments.fraction > 0
    cfg.optimizer.optimizer_offload_fraction = arguments.fraction
    cfg.optimizer.use_precision_aware_optimizer = arguments.precision_aware
    cfg.dataset = RandomTokens(vocab_size=cfg.model.vocab_size)
    cfg.tokenizer.tokenizer_type, cfg.tokenizer.vocab_size = "NullTokenizer", cfg.model.vocab_size
    cfg.logger.tensorboard_dir = cfg.checkpoint.load = None
    for option, value in checkpoint.items():
        setattr(cfg.checkpoint, option, value)
    pretrain(cfg, forward_step)
    peaks.put((imports, _peak_megabytes()))


def _peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    run(measure, build_parser())
