# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What save_checkpoint and load_checkpoint cost beside Core's own save and load of the same state, in one process.

    python -m benchmarks.checkpoint_speed                     # 74 million parameters, all of the optimizer offloaded
    python -m benchmarks.checkpoint_speed --num-layers 30     # SmolLM2-135M's shape

"Core" only plans, writes and reads: without checksums, train state, tracker, renaming at the end, comparison of shapes,
or guard. Both write into a new directory, flush it to disk, and remove the previous one when the new one is complete.
Files are in memory (/dev/shm, if there is one), so that no disk's noise is measured and nothing hides the work.
"""

import argparse
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from megatron.core import __version__ as core_version
from megatron.core import dist_checkpointing

from benchmarks.figures import Figure, interleaved, ratios, run
from megatron.bridge.recipes.smollm2 import smollm2_135m_sft_config
from megatron.bridge.training import checkpointing
from megatron.bridge.training.config import runtime_config_update
from megatron.bridge.training.initialize import initialize_megatron
from megatron.bridge.training.optim import setup_optimizer
from megatron.bridge.training.state import GlobalState
from megatron.bridge.utils import device

AT_MOST = 1.05
MEMORY = Path("/dev/shm")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-layers", type=int, default=13)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--directory", type=Path, default=MEMORY if MEMORY.is_dir() else None, help="where files lie (default: memory)"
    )
    return parser


def measure(arguments: argparse.Namespace) -> list[Figure]:
    """Build one run, and time its saves and loads in turn with Core's."""
    logging.disable(logging.INFO)
    device.enter_device()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        job = _Run(Path(directory), arguments.num_layers)
        rows = {
            "Core's save": job.core_save,
            "save_checkpoint": job.save,
            "Core's load": job.core_load,
            "load_checkpoint": job.load,
            "load_checkpoint, verify_integrity=false": job.load_unverified,
        }
        seconds = interleaved({name: _to_the_end(work) for name, work in rows.items()}, arguments.repeats)
        size = sum(file.stat().st_size for file in (Path(directory) / "ours").rglob("*") if file.is_file())
    figures = []
    for name, taken in seconds.items():
        if not name.startswith("Core's"):
            core = "Core's save" if "save" in name else "Core's load"
            note = f"{size / 1e6:.0f} MB, megatron-core {core_version}, torch {torch.__version__}"
            against = f"dist_checkpointing.{core.split()[-1]} of the same state"
            figures.append(Figure(name, against, ratios(taken, seconds[core]), AT_MOST, note=note))
    return figures


def _to_the_end(work: Any) -> Any:
    def timed() -> None:
        work()
        device.synchronize()

    return timed


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
        self.state, self.cores, self.number = GlobalState(cfg), directory / "core", 0

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
        """Core's, of the same state, of the next step; the one before goes when it is complete."""
        self.number += 1
        before, directory = self.cores / str(self.number - 1), self.cores / str(self.number)
        directory.mkdir(parents=True)
        dist_checkpointing.save(self._content(), str(directory))
        shutil.rmtree(before, ignore_errors=True)

    def core_load(self) -> None:
        """Core's, of the same state, put in place by the same methods."""
        template = self._content(is_loading=True)
        loaded = dist_checkpointing.load(template, str(self.cores / str(self.number)))
        self.model[0].module.load_state_dict(loaded["model"], strict=False)
        self.optimizer.load_state_dict(loaded["optimizer"])

    def _content(self, *, is_loading: bool = False) -> dict[str, Any]:
        metadata = {"distrib_optim_sharding_type": "dp_reshardable", "chained_optim_avoid_prefix": True}
        weights = {"model": self.model[0].module.sharded_state_dict(metadata=metadata)}
        options = {"is_loading": True} if is_loading else {}
        optimizer = self.optimizer.sharded_state_dict(weights["model"], metadata=metadata, **options)
        return {**weights, "optimizer": optimizer}


if __name__ == "__main__":
    run(measure, build_parser())
