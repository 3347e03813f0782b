# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Log a summary at the start of a run (what runs where) and one at its end (its results), on rank 0."""

import logging
import time
from collections.abc import Iterator
from typing import Any

import torch

from megatron.bridge.checkpoint import iterations
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.training.monitoring.finite_steps import reasons_to_skip
from megatron.bridge.training.monitoring.metrics import metrics_file_of
from megatron.bridge.training.monitoring.state_memory import StateBytes, count_state
from megatron.bridge.training.monitoring.whole_model import sum_over_parameters
from megatron.bridge.training.state import GlobalState
from megatron.bridge.utils.device import peak_memory_bytes
from megatron.bridge.utils.exit_codes import PREEMPTED
from megatron.bridge.utils.parallel_sizes import PARALLEL_SIZES, SHARE_A_COPY

logger = logging.getLogger(__name__)


class RunSummary(Callback):
    """Collects the steps of this process for the summary at the end."""

    reads_weights = False

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._steps = self._skipped = 0
        self._step_seconds = self._tokens = 0.0
        self._losses: dict[str, float] = {}

    def on_train_step_end(self, context: CallbackContext) -> None:
        taken = context.taken_step
        self._steps += 1
        self._skipped += taken.is_skipped
        self._step_seconds += taken.seconds
        self._tokens += taken.tokens_per_second * taken.seconds
        self._losses = taken.losses

    def log_end(self, state: GlobalState) -> None:
        """Log the run's results, also after an error: how many steps it took, and what is saved."""
        step, last = state.train_state.step, state.derived.train_iters
        rows = {"steps": f"{step} of {last}, {self._steps} of them since this start"}
        if self._skipped:
            rows["skipped"] = f"{self._skipped} of these steps changed nothing: {reasons_to_skip(state)}"
        if self._steps:
            rows["last loss"] = ", ".join(f"{name} {value:.4f}" for name, value in self._losses.items())
            rows["speed"] = (
                f"{self._step_seconds / self._steps:.3f} s a step, {self._tokens / self._step_seconds:,.0f} tokens/s"
            )
        rows["time"] = f"{time.monotonic() - self._began:.1f} s since the start, set-up and saves included"
        rows["peak memory"] = f"{_size(peak_memory_bytes())} (rank 0)"
        if state.cfg.checkpoint.save is not None:
            tracker = iterations.read_tracker(state.cfg.checkpoint.save)
            rows["checkpoint"] = "none" if tracker is None else f"{state.cfg.checkpoint.save}, step {tracker.iteration}"
        _log_block("run ended" if step >= last else "run stopped", rows)


def log_start(state: GlobalState, model: list[Any], optimizer: Any) -> None:
    """Log what runs where. Call on all ranks, which count the parameters together."""
    cfg = state.cfg
    total, trained = count_parameters(model)
    rows = {
        "model": _model(cfg, total, trained),
        "ranks": _ranks(cfg, state.derived.world_size, state.derived.data_parallel_size),
        "precision": _precision(cfg),
        "optimizer": _optimizer(cfg),
        "memory": _memory(count_state(model, optimizer, kind=cfg.optimizer.optimizer)),
        "steps": f"{state.train_state.step} -> {state.derived.train_iters}, {state.derived.global_batch_size} samples "
        f"each: {state.derived.num_microbatches} micro-batches of {state.derived.micro_batch_size} on each "
        "data-parallel rank",
        **_steps_left_out(state),
        **state.data_report,
        "checkpoints": _checkpoints(cfg),
        "figures": _figures(cfg),
        "stops": _stops(cfg, state.derived.world_size),
    }
    _log_block("run starts", rows)


def _steps_left_out(state: GlobalState) -> dict[str, str]:
    """A row for train.iterations_to_skip, if it is set."""
    steps = sorted(set(state.cfg.train.iterations_to_skip))
    if not steps:
        return {}
    done, last = state.train_state.step, state.derived.train_iters
    never = [step for step in steps if not done < step <= last]
    text = ", ".join(map(str, steps)) + " (train.iterations_to_skip)"
    return {
        "left out": text
        + (f"; without effect: {', '.join(map(str, never))}, not among the steps to come" * bool(never))
    }


def count_parameters(model: list[Any]) -> tuple[int, int]:
    """(all, trained) parameters of the whole model, each counted once. Collective."""
    sums = sum_over_parameters(model, lambda param: torch.tensor([param.numel(), param.numel() * param.requires_grad]))
    total, trained = map(int, sums.tolist())
    return total, trained


def _model(cfg: ConfigContainer, total: int, trained: int) -> str:
    model = cfg.model
    experts = f", {model.num_moe_experts} experts" if model.num_moe_experts else ""
    name = type(model).__name__.removesuffix("ModelProvider")
    return (
        f"{name}, {model.num_layers} layers of {model.hidden_size}{experts}, vocabulary {model.vocab_size}; "
        f"{total:,} parameters, {trained:,} trained"
    )


def _ranks(cfg: ConfigContainer, world_size: int, data_parallel_size: int) -> str:
    axes, experts = [PARALLEL_SIZES[short] for short in SHARE_A_COPY], cfg.model.expert_model_parallel_size
    sizes = {"data": data_parallel_size, **{axis.word: getattr(cfg.model, axis.field) for axis in axes}}
    product = " x ".join(f"{name} {size}" for name, size in sizes.items())
    return f"{world_size}: {product}" + (f", experts over {experts}" if experts > 1 else "")


def _precision(cfg: ConfigContainer) -> str:
    kind = "bf16" if cfg.model.bf16 else "fp16" if cfg.model.fp16 else "fp32"
    gradients = "fp32" if cfg.ddp.grad_reduce_in_fp32 or kind == "fp32" else kind
    return f"weights {kind}{', fp8 products' if cfg.model.fp8 else ''}, gradients reduced in {gradients}"


def _optimizer(cfg: ConfigContainer) -> str:
    text = f"{cfg.optimizer.optimizer}, lr {cfg.optimizer.lr:g} {cfg.scheduler.lr_decay_style}"
    if not cfg.optimizer.optimizer_cpu_offload:
        return text
    text += f", offload fraction {cfg.optimizer.optimizer_offload_fraction:g}"
    streamed = cfg.optimizer.optimizer_streamed_fraction
    return f"{text}, {streamed:.0%} of it streamed through the device" if streamed else text


def _memory(state: StateBytes) -> str:
    """Memory of rank 0 from the first step on, without activations."""
    on_device = {
        "weights": state.weights,
        "gradients": state.gradients,
        "masters": state.masters,
        "moments": state.moments,
    }
    on_host = state.host_masters + state.host_moments + state.host_gradients
    parts = ", ".join(f"{name} {_size(size)}" for name, size in on_device.items() if size)
    host = f"; on the host {_size(on_host)}" if on_host else ""
    return f"rank 0 holds {_size(sum(on_device.values()))} on the device ({parts}) and activations{host}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


def _checkpoints(cfg: ConfigContainer) -> str:
    options = cfg.checkpoint
    if options.save is None:
        return "none are saved (checkpoint.save)"
    text = f"{options.save}, " + (f"every {options.save_interval} steps and " if options.save_interval else "") + "last"
    if options.most_recent_k and options.most_recent_k > 0:
        text += f"; the newest {options.most_recent_k} are kept"
    text += "; written in the background" if options.async_save else ""
    resumes = "a new start resumes from there" if options.load == options.save else "checkpoint.load is elsewhere"
    return f"{text}; {resumes}"


def _figures(cfg: ConfigContainer) -> str:
    def places() -> Iterator[str]:
        file, options = metrics_file_of(cfg), cfg.logger
        if file is not None:
            yield str(file.path)
        if options.tensorboard_dir:
            yield f"TensorBoard in {options.tensorboard_dir}"
        if options.wandb_project:
            yield f"Weights & Biases, project {options.wandb_project}"
        if options.mlflow_experiment:
            yield f"MLflow, experiment {options.mlflow_experiment}"

    return ", ".join(places()) or "the log alone (set checkpoint.save or logger.metrics_file)"


def _stops(cfg: ConfigContainer, world_size: int) -> str:
    train, reasons = cfg.train, ["after its last step"]
    if train.exit_duration_in_mins:
        reasons.append(f"after {train.exit_duration_in_mins} minutes")
    if train.exit_signal_handler:
        reasons.append(f"at {train.exit_signal.name}, saved, with exit code {PREEMPTED}")
    if world_size > 1:
        reasons.append(f"after {cfg.dist.distributed_timeout_minutes} minutes without a sign of life from a rank")
    return "; ".join(reasons)


def _log_block(title: str, rows: dict[str, str]) -> None:
    width = max(map(len, rows))
    logger.info("%s\n%s", title, "\n".join(f"  {name:{width}}  {text}" for name, text in rows.items()))
