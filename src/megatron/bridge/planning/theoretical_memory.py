# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The memory of a run, estimated in a process of its own: before the run, in it, or in a script that trains later.

Scripts for Megatron Bridge import it as `training.utils.theoretical_memory_utils`. `memory.py` says what is counted.
"""

import contextlib
import copy
import dataclasses
import functools
import json
import logging
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron.bridge.data.config import MockGPTDatasetConfig, TokenizerConfig
from megatron.bridge.planning.memory import GIB, UNLIMITED, MemoryEstimate, planned_run, ranks_to_compare
from megatron.bridge.training.config import CheckpointConfig, ConfigContainer, LoggerConfig
from megatron.bridge.training.monitoring.state_memory import StateBytes
from megatron.bridge.utils import distributed
from megatron.bridge.utils.exit_codes import exit_code_of, exit_with
from megatron.bridge.utils.parallel_sizes import parallel_sizes, ranks_of_one_copy
from megatron.bridge.utils.yaml_io import RUNTIME_FIELDS

logger = logging.getLogger(__name__)

_HOOKS = frozenset({"_pre_wrap_hooks", "_post_wrap_hooks"})
"""Where a provider keeps a script's functions."""


@dataclass(frozen=True, kw_only=True)
class TrainingMemoryEstimate:
    """Memory of the rank that needs most, at the peak of a step."""

    rank: int
    world_size: int
    layout: str
    """The parallel sizes, as text."""
    memory: MemoryEstimate
    """Its parts."""

    @property
    def weight_and_optimizer_bytes(self) -> int:
        """Weights, gradients, masters and moments on the device."""
        return self.total_bytes - self.activation_bytes

    @property
    def activation_bytes(self) -> int:
        """What the forward passes keep on the device, logits included."""
        return self.memory.activations + self.memory.logits

    @property
    def total_bytes(self) -> int:
        """Everything on the device."""
        return self.memory.device_bytes

    @property
    def host_bytes(self) -> int:
        """What offload keeps on the host."""
        return self.memory.host_bytes


def estimate_training_memory(
    config: ConfigContainer,
    num_microbatches: int | None = None,
    *,
    world_size: int | None = None,
    rank: int | None = None,
) -> TrainingMemoryEstimate:
    """Estimate the memory of a run, without running it; it takes as long as a process needs to start.

    Args:
        config: What a recipe returns, or that of a run in progress. It isn't changed. Hooks on the model don't count.
        num_microbatches: Micro-batches of a step on each data-parallel rank. None: as configured.
        world_size: Ranks of the run. None: of this process's run, or as few as hold the model.
        rank: Which rank. None: the one that needs most, of the first, second and last pipeline stage.

    Raises:
        ValueError: The configuration can't work on that many ranks, or another process can't read it.
    """
    ranks = world_size or max(distributed.world_size(), ranks_of_one_copy(parallel_sizes(config.model)))
    request = {"world_size": ranks, "rank": rank, "num_microbatches": num_microbatches}
    try:
        sent = pickle.dumps(_sendable(config))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"the memory of this configuration can't be estimated in another process: {error}; give the model "
            "functions that have a name in a module"
        ) from error
    return _estimate_in_child(sent, json.dumps(request))


def format_training_memory_estimate(estimate: TrainingMemoryEstimate) -> str:
    """An estimate as text, one line for each part."""
    memory, state = estimate.memory, estimate.memory.state
    rows = {
        "weights": state.weights,
        "gradients": state.gradients,
        "FP32 masters": state.masters,
        "moments": state.moments,
        "activations": memory.activations,
        "logits": memory.logits,
        "sum on the device": estimate.total_bytes,
        "on the host": estimate.host_bytes,
    }
    unit, name_of_unit = (GIB, "GiB") if estimate.total_bytes > GIB else (2**20, "MiB")
    lines = [f"  {name:<18}{size / unit:>9.2f} {name_of_unit}" for name, size in rows.items() if size or "sum" in name]
    head = f"rank {estimate.rank} of {estimate.world_size} ({estimate.layout}): {state.num_parameters:,} parameters"
    return "\n".join([head, *lines])


def compute_weight_and_optimizer_memory(config: ConfigContainer, verbose: bool = False) -> int:
    """Bytes of weights, gradients and optimizer on the device, of the rank that needs most.

    Args:
        config: See `estimate_training_memory`.
        verbose: Log all parts.
    """
    return _logged(estimate_training_memory(config), verbose).weight_and_optimizer_bytes


def compute_activation_memory(
    config: ConfigContainer, num_microbatches: int | None = None, verbose: bool = False
) -> int:
    """Bytes of activations and logits, of the rank that needs most.

    Args:
        config: See `estimate_training_memory`.
        num_microbatches: See there.
        verbose: Log all parts.
    """
    return _logged(estimate_training_memory(config, num_microbatches), verbose).activation_bytes


def report_theoretical_memory(
    config: ConfigContainer, num_microbatches: int | None = None, verbose: bool = False
) -> None:
    """Log what the rank that needs most will hold on its device. In a run, rank 0 does it.

    Args:
        config: See `estimate_training_memory`.
        num_microbatches: See there.
        verbose: Log all parts.
    """
    if not distributed.is_rank_0():
        return
    estimate = _logged(estimate_training_memory(config, num_microbatches), verbose)
    logger.info(
        "theoretical memory of rank %d: weights and optimizer %.2f MiB, activations %.2f MiB, together %.2f MiB",
        estimate.rank,
        estimate.weight_and_optimizer_bytes / 2**20,
        estimate.activation_bytes / 2**20,
        estimate.total_bytes / 2**20,
    )


def _logged(estimate: TrainingMemoryEstimate, verbose: bool) -> TrainingMemoryEstimate:
    if verbose:
        logger.info("%s", format_training_memory_estimate(estimate))
    return estimate


def _sendable(config: ConfigContainer) -> ConfigContainer:
    """A copy without what memory doesn't depend on: a script's own data and hooks, and what a run hangs into it."""
    plan = copy.copy(config)
    for name in ("model", "optimizer", "ddp"):
        section = copy.copy(getattr(config, name))
        left_out = {field: None for field in RUNTIME_FIELDS & vars(section).keys()}
        vars(section).update(left_out | {field: [] for field in _HOOKS & vars(section).keys()})
        setattr(plan, name, section)
    plan.dataset = MockGPTDatasetConfig(seq_length=config.model.seq_length)
    plan.tokenizer = TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=config.model.vocab_size)
    plan.checkpoint, plan.logger, plan.profiling, plan.env_vars = CheckpointConfig(), LoggerConfig(), None, {}
    return plan


@functools.lru_cache(maxsize=8)
def _estimate_in_child(config: bytes, request: str) -> TrainingMemoryEstimate:
    """What `main` says: planning needs a process without process groups, which doesn't use a GPU later."""
    of_a_run = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in of_a_run}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[3]), *filter(None, sys.path)])
    done = subprocess.run([sys.executable, "-m", __name__, request], input=config, capture_output=True, env=environment)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or [
            f"its process ended with {done.returncode}"
        ]
        raise ValueError(f"the memory of this configuration can't be estimated: {said[-1].removeprefix('memory: ')}")
    return _read(json.loads(done.stdout))


def _read(found: dict) -> TrainingMemoryEstimate:
    memory = found["memory"]
    return TrainingMemoryEstimate(
        **found | {"memory": MemoryEstimate(**memory | {"state": StateBytes(**memory["state"])})}
    )


def estimate_here(config: ConfigContainer, request: dict) -> TrainingMemoryEstimate:
    """The estimate, made in this process, which must not train on a GPU later.

    Args:
        config: See `estimate_training_memory`.
        request: Its other arguments.
    """
    world_size = request["world_size"]
    ranks = ranks_to_compare(config, world_size) if request["rank"] is None else [request["rank"]]
    estimates = []
    for rank in ranks:
        with planned_run(config, world_size, rank) as run:
            if request["num_microbatches"] is not None:
                derived, train = run.cfg.derive(world_size), run.cfg.train
                train.global_batch_size = (
                    request["num_microbatches"] * derived.micro_batch_size * derived.data_parallel_size
                )
            estimates.append(
                TrainingMemoryEstimate(
                    rank=rank, world_size=world_size, layout=run.layout(world_size), memory=run.as_configured(UNLIMITED)
                )
            )
    return max(estimates, key=lambda estimate: estimate.total_bytes)


def main() -> int:
    """Estimate the pickled configuration on standard input; `sys.argv[1]` has the other arguments, as JSON.

    Returns:
        The exit status: 0, or 1 after an error, which is reported in one line.
    """
    return exit_code_of("memory", _answer)


def _answer() -> None:
    with contextlib.redirect_stdout(sys.stderr):
        config = pickle.load(sys.stdin.buffer)  # of the process that started this one
        estimate = estimate_here(config, json.loads(sys.argv[1]))
    sys.stdout.write(json.dumps(dataclasses.asdict(estimate)))


if __name__ == "__main__":
    exit_with(main)
