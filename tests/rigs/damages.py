# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Damage a checkpoint, one file at a time, and load it as a run does: found and the file named, or without effect.

    python -m tests.rigs.damages                          # 500 damages in each mode, each in a load of its own
    python -m tests.rigs.damages --damages 50 --seed 3

A damage is a flipped bit or a cut, in any file of the checkpoint. The load is `load_checkpoint` with weights, an
offloaded optimizer, its schedule, random states and train state. Before each load all of these are spoiled, so that
what it doesn't restore shows. `make fuzz` does this too.
"""

import argparse
import os
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.fuzz.data_readers import fast_disk
from tests.rigs.on_ranks import build_training, fill_weights, take_step, weights_of
from tests.rigs.optimizer_state import slices_of
from tests.rigs.stored import unequal
from tests.rigs.tiny import tiny_config
from tests.unit_tests.data.conftest import write_tokenizer

DOCUMENTED = (ValueError, FileNotFoundError, RuntimeError)
STEP = 3
MODES = {
    "as it is": "each file is compared",
    "tensors not compared": "checkpoint.verify_integrity=false",
    "no manifest": "as in a checkpoint of another program",
}


@dataclass
class Tally:
    """What became of the damages of one mode."""

    refused: int = 0
    without_effect: int = 0
    unnoticed: Counter[str] = field(default_factory=Counter)
    """Loads of something else, by file. There may be none where every file is compared."""

    @property
    def loads(self) -> int:
        return self.refused + self.without_effect + self.unnoticed.total()


class Rig:
    """A checkpoint of a tiny run, and a model with an optimizer to load it into again and again; on one rank."""

    def __init__(self, directory: Path) -> None:
        from megatron.bridge.data.config import TokenizerConfig
        from megatron.bridge.data.tokenizer import build_tokenizer
        from megatron.bridge.training.checkpointing import save_checkpoint
        from megatron.bridge.training.state import GlobalState

        self.root = directory / "checkpoints"
        self.cfg = tiny_config(
            directory,
            model={"num_layers": 1, "hidden_size": 32, "ffn_hidden_size": 32},
            optimizer={"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5},
            checkpoint={"save": str(self.root), "load": str(self.root)},
        )
        self.model, self.optimizer, self.scheduler = build_training(self.cfg)
        fill_weights(self.model, seed=1)
        take_step(self.model, self.optimizer)
        self.scheduler.step(increment=8 * STEP)
        state = GlobalState(self.cfg)
        state.train_state.step, state.train_state.consumed_train_samples = STEP, 8 * STEP
        tokenizer = TokenizerConfig(tokenizer_model=str(write_tokenizer(directory / "tokenizer")))
        state.tokenizer = build_tokenizer(tokenizer)
        save_checkpoint(state, self.model, self.optimizer, self.scheduler, 1.5)
        self.saved = self._content(state)
        self.files = sorted(path for path in self.root.rglob("*") if path.is_file() and path.stat().st_size)

    def _content(self, state: Any) -> dict[tuple, Any]:
        """All that a load restores."""
        from megatron.bridge.training.run_state.rng import current_states

        slices = slices_of(self.model, self.optimizer)
        return {
            **{("weight", name): weight for name, weight in weights_of(self.model).items()},
            **{("optimizer", one.name, kind): tensor for one in slices for kind, tensor in one.tensors.items()},
            ("optimizer", "step"): [one.step for one in slices],
            ("schedule",): self.scheduler.state_dict(),
            ("train state",): dict(vars(state.train_state)),
            ("random states",): current_states(),
        }

    @torch.no_grad()
    def _spoil(self) -> None:
        """Leave nothing as it was saved."""
        fill_weights(self.model, seed=2)
        for child in self.optimizer.chained_optimizers:
            for part in child.optimizer.sub_optimizers:
                for tensor in [param for group in part.param_groups for param in group["params"]]:
                    tensor.fill_(7)
                for state in part.state.values():
                    for tensor in state.values():
                        tensor.fill_(7)
        self.scheduler.num_steps = 0
        random.seed(0)
        torch.manual_seed(0)

    def load(self) -> set[str]:
        """Load the checkpoint; returns which parts then differ from what was saved."""
        from megatron.bridge.training.checkpointing import load_checkpoint
        from megatron.bridge.training.state import GlobalState

        self._spoil()
        state = GlobalState(self.cfg)
        load_checkpoint(state, self.model, self.optimizer, self.scheduler)
        return unequal(self._content(state), self.saved)


def damaged(content: bytes, draw: random.Random) -> bytes:
    """One bit flipped, or, three times in ten, the end cut off."""
    at = draw.randrange(len(content))
    if draw.random() < 0.3:
        return content[:at]
    return content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]


def try_damages(
    rig: Rig, *, damages: int, seed: int, mode: str = "as it is", progress: Callable[[], None] = lambda: None
) -> Tally:
    """Damage one file after another, load, and put it right.

    Args:
        rig: The checkpoint.
        damages: How many.
        seed: Of the damages.
        mode: One of `MODES`.
        progress: Called before each.

    Raises:
        AssertionError: An error that isn't documented, of several lines, or that doesn't name the file; or a load of
            something else where all files are compared.
    """
    draw, tally = random.Random(seed), Tally()
    rig.cfg.checkpoint.verify_integrity = mode != "tensors not compared"
    manifest = next(path for path in rig.files if path.name == "manifest.json")
    aside = rig.root / "manifest.aside"
    if mode == "no manifest":
        manifest.rename(aside)
    try:
        for _ in range(damages):
            progress()
            path = draw.choice([path for path in rig.files if path.exists()])
            whole = path.read_bytes()
            path.write_bytes(damaged(whole, draw))
            try:
                _count(tally, rig, path, mode)
            finally:
                path.write_bytes(whole)
    finally:
        if aside.exists():
            aside.rename(manifest)
    differing = rig.load()
    assert not differing, f"put right, the checkpoint loads otherwise than it was saved: {sorted(differing)}"
    return tally


def _count(tally: Tally, rig: Rig, path: Path, mode: str) -> None:
    """Load, and judge the result."""
    try:
        differing = rig.load()
    except DOCUMENTED as error:
        message = str(error)
        assert message and "\n" not in message, f"{path.name}: not one line: {error!r}"
        assert type(error) in DOCUMENTED, f"{path.name}: a bare {error!r}"
        assert path.name in message or mode == "no manifest", f"{path.name} is not named: {error!r}"
        tally.refused += 1
        return
    if not differing:
        tally.without_effect += 1
        return
    may_pass = {"as it is": (), "tensors not compared": (".distcp",), "no manifest": (".distcp", ".metadata", ".yaml")}
    assert path.name.endswith(may_pass[mode]), f"{path.name} was damaged and loaded, with other {sorted(differing)}"
    tally.unnoticed[path.suffix or path.name] += 1


def run(*, damages: int, seed: int, progress: Callable[[], None] = lambda: None) -> dict[str, Tally]:
    """All modes.

    Args:
        damages: How many in each.
        seed: Of the damages.
        progress: Called before each.
    """
    os.environ["TQDM_DISABLE"] = "1"
    directory = Path(tempfile.mkdtemp(prefix="damages_", dir=fast_disk()))
    tallies = {}
    try:
        rig = Rig(directory)
        for mode in MODES:
            tallies[mode] = try_damages(rig, damages=damages, seed=seed, mode=mode, progress=progress)
    finally:
        shutil.rmtree(directory)
    return tallies


def main() -> None:
    """Parse, damage, print."""
    parser = argparse.ArgumentParser(prog="python -m tests.rigs.damages", description=__doc__.splitlines()[0])
    parser.add_argument("--damages", type=int, default=500, help="in each mode (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="of the damages (default: the time)")
    arguments = parser.parse_args()
    seed = int(time.time()) if arguments.seed is None else arguments.seed
    print(f"seed {seed}")
    started = time.monotonic()
    for mode, tally in run(damages=arguments.damages, seed=seed).items():
        print(f"{mode}: {tally}")
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
