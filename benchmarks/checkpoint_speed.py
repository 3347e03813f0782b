# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What save_checkpoint and load_checkpoint cost beside Core's own save and load of the same state, in one process.

    python benchmarks/checkpoint_speed.py                     # 74 million parameters, all of the optimizer offloaded
    python benchmarks/checkpoint_speed.py --num-layers 30     # SmolLM2-135M's shape

Each repeat takes every row once, one after the other; medians, with the smallest and the largest. Files are in the page
cache when they are read. "Core" plans, writes and reads alone: no checksums, train state, tracker or names that come
last, no look at shapes, no guard.
"""

import argparse
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from megatron.core import __version__ as core_version
from megatron.core import dist_checkpointing

from megatron.bridge.recipes.smollm2 import smollm2_135m_sft_config
from megatron.bridge.training import checkpointing
from megatron.bridge.training.config import runtime_config_update
from megatron.bridge.training.initialize import initialize_megatron
from megatron.bridge.training.optim import setup_optimizer
from megatron.bridge.training.state import GlobalState
from megatron.bridge.utils import device


def main() -> None:
    """Build one run, time its saves and loads, print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-layers", type=int, default=13)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    device.enter_device()
    with tempfile.TemporaryDirectory() as directory:
        run = _Run(Path(directory), arguments.num_layers)
        rows = {
            "Core's save": run.core_save,
            "save_checkpoint": run.save,
            "Core's load": run.core_load,
            "load_checkpoint": run.load,
            "load_checkpoint, verify_integrity=false": run.load_unverified,
        }
        seconds = _interleaved(rows, arguments.repeats)
        size = sum(file.stat().st_size for file in (Path(directory) / "ours").rglob("*") if file.is_file())
    print(f"torch {torch.__version__}, megatron-core {core_version}, {size / 1e6:.0f} MB on disk")
    print("what | median, s | smallest | largest | / Core's")
    for name, taken in seconds.items():
        core = seconds["Core's save" if "save" in name else "Core's load"]
        ratio = median(mine / cores for mine, cores in zip(taken, core, strict=True))
        print(f"{name} | {median(taken):.3f} | {min(taken):.3f} | {max(taken):.3f} | {ratio:.2f}")


class _Run:
    """A model and its offloaded optimizer, after one save by each."""

    def __init__(self, directory: Path, num_layers: int) -> None:
        cfg = smollm2_135m_sft_config()
        cfg.model.num_layers = num_layers
        cfg.tokenizer.tokenizer_type, cfg.tokenizer.vocab_size = "NullTokenizer", cfg.model.vocab_size
        cfg.dataset.dataset_root = str(directory)
        cfg.checkpoint.save = cfg.checkpoint.load = str(directory / "ours")
        cfg.checkpoint.most_recent_k = 1
        cfg.logger.tensorboard_dir = None
        runtime_config_update(cfg)
        initialize_megatron(cfg)
        self.model = cfg.model.provide_distributed_model(ddp_config=cfg.ddp)
        self.optimizer, self.scheduler = setup_optimizer(cfg.optimizer, cfg.scheduler, self.model)
        self.state, self.cores = GlobalState(cfg), directory / "core"

    def save(self) -> None:
        """Ours, of the next step; the one before goes when it is complete."""
        self.state.train_state.step += 1
        checkpointing.save_checkpoint(self.state, self.model, self.optimizer, self.scheduler)

    def load(self) -> None:
        """Ours, of everything."""
        checkpointing.load_checkpoint(self.state, self.model, self.optimizer, self.scheduler)

    def load_unverified(self) -> None:
        """Ours, without comparing the tensor files' checksums."""
        self.state.cfg.checkpoint.verify_integrity = False
        self.load()
        self.state.cfg.checkpoint.verify_integrity = True

    def core_save(self) -> None:
        """Core's, of the same state."""
        shutil.rmtree(self.cores, ignore_errors=True)
        self.cores.mkdir()
        dist_checkpointing.save(self._content(), str(self.cores))

    def core_load(self) -> None:
        """Core's, of the same state, put in place by the same methods."""
        template = self._content(is_loading=True)
        loaded = dist_checkpointing.load(template, str(self.cores))
        self.model[0].module.load_state_dict(loaded["model"], strict=False)
        self.optimizer.load_state_dict(loaded["optimizer"])

    def _content(self, *, is_loading: bool = False) -> dict[str, Any]:
        metadata = {"distrib_optim_sharding_type": "dp_reshardable", "chained_optim_avoid_prefix": True}
        weights = {"model": self.model[0].module.sharded_state_dict(metadata=metadata)}
        options = {"is_loading": True} if is_loading else {}
        optimizer = self.optimizer.sharded_state_dict(weights["model"], metadata=metadata, **options)
        return {**weights, "optimizer": optimizer}


def _interleaved(rows: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each row, each repeat taking all of them in turn, and writing back what one has written
    before the next begins. A first repeat isn't counted.
    """
    taken: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(repeats + 1):
        for name, work in rows.items():
            device.synchronize()
            os.sync()
            started = time.perf_counter()
            work()
            device.synchronize()
            taken[name].append(time.perf_counter() - started)
    return {name: seconds[1:] for name, seconds in taken.items()}


if __name__ == "__main__":
    main()
