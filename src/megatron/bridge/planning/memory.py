# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Estimate the memory of a run on any number of ranks, in one process.

Core builds one rank's model, data-parallel buffers and optimizer from tensors without memory, so shards, padding and
the offloaded part are those of a real run. Activations are estimated by a formula (models/activation_memory.py). Not
counted: CUDA's and NCCL's own memory, fragmentation, and buffers of communication.
"""

import copy
import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from megatron.bridge.data.config import GPTDatasetConfig, MockGPTDatasetConfig, TokenizerConfig
from megatron.bridge.models.activation_memory import stage_bytes
from megatron.bridge.models.context_parallel import building_without_context_parallelism
from megatron.bridge.planning.world import planned_world
from megatron.bridge.training.config import ConfigContainer, runtime_config_update
from megatron.bridge.training.config.optimizer import AUTO, PRECISION_AWARE_DTYPES
from megatron.bridge.training.initialize import initialize_megatron
from megatron.bridge.training.monitoring.state_memory import StateBytes, count_state
from megatron.bridge.training.optim import setup_optimizer
from megatron.bridge.training.setup import set_schedule_functions
from megatron.bridge.utils.parallel_sizes import PARALLEL_SIZES

GIB = 1 << 30
WITHOUT_OFFLOAD: dict[str, Any] = {
    "optimizer_cpu_offload": False,
    "optimizer_offload_fraction": 0.0,
    "optimizer_streamed_fraction": 0.0,
    "optimizer_split_masters": False,
    "use_precision_aware_optimizer": False,
}
UNLIMITED = 1 << 60
"""A budget for everything."""
_SOME_DIRECTORY = "."
"""Placeholder for directories that only a run reads. The checks of a configuration require existing ones."""


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Memory of one rank at the peak of a step, in bytes."""

    state: StateBytes
    activations: int
    """Kept by the forward passes for the backward passes."""
    logits: int
    """For the loss, on the last pipeline stage."""

    @property
    def device_bytes(self) -> int:
        """Everything on the device."""
        state = self.state
        return state.weights + state.gradients + state.masters + state.moments + self.activations + self.logits

    @property
    def host_bytes(self) -> int:
        """Everything that offload keeps on the host. All but the moments is pinned memory."""
        return self.state.host_masters + self.state.host_moments + self.state.host_gradients


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """The memory of one rank as configured, and with other offload fractions."""

    rank: int
    world_size: int
    layout: str
    """The parallel sizes, as text."""
    as_configured: MemoryEstimate
    without_offload: MemoryEstimate
    all_offloaded: MemoryEstimate | None
    """None: the configuration can't offload."""
    budget_bytes: int
    """Device memory that a run may use."""
    smallest_fraction: float | None
    """The smallest `optimizer_offload_fraction`, in steps of 0.01, with which the rank fits; None if there is none."""
    is_precision_aware: bool
    """Whether `smallest_fraction` is for precision-aware mode."""


def plan_memory(cfg: ConfigContainer, *, world_size: int, budget_bytes: int, rank: int | None = None) -> MemoryPlan:
    """Plan one rank's memory. Use a separate process: none of a run may be set up before, nor trained on a GPU after.

    Args:
        cfg: What a recipe returns; data, tokenizer and checkpoint may be left open. It isn't changed.
        world_size: Ranks of the run.
        budget_bytes: Device memory that a run may use.
        rank: Which rank. None: the first one of the first, second or last pipeline stage, whichever needs most. The
            first stage keeps most micro-batches in flight, the last has the logits, and either may have fewer layers.

    Raises:
        ValueError: The configuration can't work on that many ranks.
    """
    if rank is not None:
        return _plan_rank(cfg, world_size, rank, budget_bytes)
    plans = [_plan_rank(cfg, world_size, rank, budget_bytes) for rank in ranks_to_compare(cfg, world_size)]
    return max(plans, key=lambda plan: plan.as_configured.device_bytes)


def ranks_to_compare(cfg: ConfigContainer, world_size: int) -> list[int]:
    """The first rank of the first, second and last pipeline stage: one of them needs most."""
    stages = cfg.model.pipeline_model_parallel_size
    return sorted({stage * (world_size // stages) for stage in (0, min(1, stages - 1), stages - 1)})


def _plan_rank(cfg: ConfigContainer, world_size: int, rank: int, budget_bytes: int) -> MemoryPlan:
    with planned_run(cfg, world_size, rank) as run:
        without = run.estimate(**WITHOUT_OFFLOAD)
        if run.cfg.optimizer.use_distributed_optimizer:
            offloaded = run.estimate(optimizer_cpu_offload=True, optimizer_offload_fraction=1.0)
            fraction, aware = run.smallest_fraction(budget_bytes, without)
        else:
            offloaded, fraction, aware = None, (0.0 if without.device_bytes <= budget_bytes else None), False
        return MemoryPlan(
            rank=rank,
            world_size=world_size,
            layout=run.layout(world_size),
            as_configured=run.as_configured(budget_bytes),
            without_offload=without,
            all_offloaded=offloaded,
            budget_bytes=budget_bytes,
            smallest_fraction=fraction,
            is_precision_aware=aware,
        )


def resolve(cfg: ConfigContainer, *, world_size: int) -> tuple[ConfigContainer, list[str]]:
    """The configuration as a run on `world_size` ranks would complete it, and the options that still must be set.

    Args:
        cfg: What a recipe returns. It isn't changed.
        world_size: Ranks of the run.

    Raises:
        ValueError: As for `runtime_config_update`.
    """
    resolved = copy.deepcopy(cfg)
    resolved.env_vars = {}  # they are for the run, not for this process
    left_open = {
        "dataset.dataset_root": getattr(cfg.dataset, "dataset_root", "none needed")
        or getattr(cfg.dataset, "hf_dataset", None),
        "tokenizer.tokenizer_model": cfg.tokenizer.tokenizer_type == "NullTokenizer" or cfg.tokenizer.tokenizer_model,
        "checkpoint.pretrained_checkpoint": isinstance(cfg.dataset, GPTDatasetConfig)
        or cfg.checkpoint.pretrained_checkpoint,
    }
    resolved.tokenizer.tokenizer_model = cfg.tokenizer.tokenizer_model or _SOME_DIRECTORY
    resolved.checkpoint.pretrained_checkpoint = cfg.checkpoint.pretrained_checkpoint or _SOME_DIRECTORY
    with planned_world(world_size), _quiet():
        runtime_config_update(resolved)
    resolved.tokenizer.tokenizer_model, resolved.env_vars = cfg.tokenizer.tokenizer_model, cfg.env_vars
    resolved.checkpoint.pretrained_checkpoint = cfg.checkpoint.pretrained_checkpoint
    return resolved, [option for option, value in left_open.items() if not value]


def as_plannable(cfg: ConfigContainer) -> ConfigContainer:
    """A copy without everything that only a run needs: data, tokenizer, weights, and gloo process groups."""
    plan = copy.copy(cfg)
    for section in ("model", "optimizer", "ddp", "scheduler", "train", "validation", "checkpoint", "dist", "logger"):
        setattr(plan, section, copy.deepcopy(getattr(cfg, section)))
    plan.dataset = MockGPTDatasetConfig(seq_length=cfg.model.seq_length)
    plan.tokenizer = TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=cfg.model.vocab_size)
    plan.checkpoint.pretrained_checkpoint, plan.checkpoint.load = _SOME_DIRECTORY, None
    plan.checkpoint.finetune = False
    plan.dist.use_gloo_process_groups = False
    plan.env_vars = {}
    return plan


class PlannedRun:
    """The model of a planned rank, for which several optimizers can be compared."""

    def __init__(self, cfg: ConfigContainer, model: list[Any]) -> None:
        self.cfg = cfg
        self.model = model

    def estimate(self, **optimizer_options: Any) -> MemoryEstimate:
        """The memory as configured, or with other options of the optimizer."""
        options = dataclasses.replace(self.cfg.optimizer, **optimizer_options)
        if not options.use_precision_aware_optimizer:
            in_fp32: dict[str, Any] = dict.fromkeys(PRECISION_AWARE_DTYPES, torch.float32)
            options = dataclasses.replace(options, **in_fp32)
        options.finalize()
        # The steps of an epoch aren't known without the data, and Core refuses a warm-up that is longer than the run.
        derived = dataclasses.replace(self.cfg.derive(), lr_warmup_steps=0)
        optimizer, _ = setup_optimizer(options, self.cfg.scheduler, self.model, derived=derived)
        set_schedule_functions(self.model, optimizer, self.cfg)  # they say when gradients can cross to the host
        activations, logits = stage_bytes(
            self.cfg.model,
            self.model,
            micro_batch_size=self.cfg.train.required_micro_batch_size(),
            num_micro_batches=self.cfg.derive().num_microbatches,
        )
        state = count_state(self.model, optimizer, kind=options.optimizer)
        return MemoryEstimate(state=state, activations=activations, logits=logits)

    def as_configured(self, budget_bytes: int) -> MemoryEstimate:
        """The memory as configured; `optimizer_offload_fraction="auto"` stands for the smallest one that fits.

        Args:
            budget_bytes: For "auto", where `optimizer.optimizer_device_memory_gib` sets no other.
        """
        options = self.cfg.optimizer
        if options.optimizer_offload_fraction != AUTO:
            return self.estimate()
        if options.optimizer_device_memory_gib is not None:
            budget_bytes = int(options.optimizer_device_memory_gib * GIB)
        enough = self._smallest_hundredths(budget_bytes, options.use_precision_aware_optimizer)
        return self.estimate(optimizer_offload_fraction=(100 if enough is None else enough) / 100)

    def smallest_fraction(self, budget_bytes: int, without: MemoryEstimate) -> tuple[float | None, bool]:
        """The smallest offload fraction that fits the budget, and whether it needs precision-aware mode."""
        if without.device_bytes <= budget_bytes:
            return 0.0, False
        for aware in sorted({self.cfg.optimizer.use_precision_aware_optimizer, True}):
            enough = self._smallest_hundredths(budget_bytes, aware)
            if enough is not None:
                return enough / 100, aware
        return None, False

    def _smallest_hundredths(self, budget_bytes: int, is_precision_aware: bool) -> int | None:
        if not self._fits(100, budget_bytes, is_precision_aware):
            return None
        too_little, enough = -1, 100
        while enough - too_little > 1:
            middle = (too_little + enough) // 2
            fits = self._fits(middle, budget_bytes, is_precision_aware)
            too_little, enough = (too_little, middle) if fits else (middle, enough)
        return enough

    def _fits(self, hundredths: int, budget_bytes: int, is_precision_aware: bool) -> bool:
        estimate = self.estimate(
            optimizer_cpu_offload=True,
            optimizer_offload_fraction=hundredths / 100,
            use_precision_aware_optimizer=is_precision_aware,
        )
        return estimate.device_bytes <= budget_bytes

    def layout(self, world_size: int) -> str:
        """TP, PP, DP, with context parallelism CP and, with experts, EP."""
        sizes = {short: getattr(self.cfg.model, size.field) for short, size in PARALLEL_SIZES.items()}
        sizes["DP"] = self.cfg.derive(world_size).data_parallel_size
        shown = ["TP", "PP", *(["CP"] if self.cfg.model.context_parallel_size > 1 else []), "DP"]
        shown += ["EP", "ETP"] if self.cfg.model.num_moe_experts else []
        return ", ".join(f"{short} {sizes[short]}" for short in shown)


@contextmanager
def planned_run(cfg: ConfigContainer, world_size: int, rank: int) -> Iterator[PlannedRun]:
    """The rank's model, wrapped for data parallelism, built from tensors without memory."""
    plan = as_plannable(cfg)
    with planned_world(world_size, rank), _quiet(), building_without_context_parallelism():
        runtime_config_update(plan)
        pg_collection = initialize_megatron(plan)
        peft = plan.peft
        model = plan.model.provide_distributed_model(
            ddp_config=plan.ddp,
            pg_collection=pg_collection,
            pre_wrap_hook=None if peft is None else lambda chunks: peft(chunks, training=True),
        )
        yield PlannedRun(plan, model)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the log lines of the many optimizers that a plan builds."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(before)


def as_table(plan: MemoryPlan) -> str:
    """A plan as text, in GiB, with advice."""
    columns = {"as configured": plan.as_configured, "without offload": plan.without_offload}
    if plan.all_offloaded is not None:
        columns["all offloaded"] = plan.all_offloaded
    rows = (
        ("device", "weights", lambda one: one.state.weights),
        ("", "gradients", lambda one: one.state.gradients),
        ("", "FP32 masters", lambda one: one.state.masters),
        ("", "moments", lambda one: one.state.moments),
        ("", "activations", lambda one: one.activations),
        ("", "logits", lambda one: one.logits),
        ("", "sum", lambda one: one.device_bytes),
        ("host", "FP32 masters", lambda one: one.state.host_masters),
        ("", "moments", lambda one: one.state.host_moments),
        ("", "gradients", lambda one: one.state.host_gradients),
        ("", "sum", lambda one: one.host_bytes),
    )
    state = plan.as_configured.state
    lines = [
        f"rank {plan.rank} of {plan.world_size} ({plan.layout}): {state.num_parameters:,} parameters, "
        f"{state.num_trained:,} of them trained",
        f"{'GiB':<24}" + "".join(f"{title:>17}" for title in columns),
    ]
    for side, name, read in rows:
        lines.append(f"{side:<8}{name:<16}" + "".join(f"{read(one) / GIB:>17.2f}" for one in columns.values()))
    return "\n".join([*lines, _advice(plan)])


def _advice(plan: MemoryPlan) -> str:
    budget = f"{plan.budget_bytes / GIB:.1f} GiB"
    if plan.smallest_fraction is None:
        return f"{budget} a device: too little with all of the optimizer offloaded; use more tensor or pipeline ranks"
    if plan.smallest_fraction == 0:
        return f"{budget} a device: fits without offload"
    mode = " optimizer.use_precision_aware_optimizer=true" if plan.is_precision_aware else ""
    return (
        f"{budget} a device: fits with optimizer.optimizer_cpu_offload=true{mode} "
        f"optimizer.optimizer_offload_fraction={plan.smallest_fraction:g} or more"
    )
