# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What a cell of the sync's matrix runs on: tiny models in every layout, optimizers on them, and their steps."""

import functools
import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron.bridge.checkpoint import model_checkpoint
from tests.rigs.on_ranks import forget_last_forward, weights_of
from tests.rigs.tiny import BF16_STATE, GATHERED_LATE, fp32_norm_layer_spec, tiny_config

SIZES = {
    "num_layers": 1,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "vocab_size": 64,
    "seq_length": 16,
    "share_embeddings_and_output_weights": False,
}
EXPERTS = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 32,
    "moe_token_dispatcher_type": "alltoall",
    "expert_model_parallel_size": 2,
    "expert_tensor_parallel_size": 1,
}
LAYOUTS = {
    "TP1": {},
    "TP2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "TP2 without SP": {"tensor_model_parallel_size": 2},
    "PP2": {"num_layers": 2, "pipeline_model_parallel_size": 2, "share_embeddings_and_output_weights": True},
    "PP2 VP2": {
        "num_layers": 4,
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2,
        "overlap_p2p_comm": True,
        "batch_p2p_comm": False,
    },
    "two instances": {},
}
STEPS = 3


@dataclass(frozen=True)
class Model:
    """What decides the weights and how ranks share them."""

    precision: str = "bf16"
    """bf16, fp16, or bf16+fp32: norms kept in FP32."""
    kind: str = "dense"
    """dense, or experts (expert parallel 2)."""
    layout: str = "TP1"
    gathered_late: bool = False
    """Whether data-parallel ranks gather weights in the next forward pass."""


@dataclass(frozen=True)
class Cell:
    """A model and how its optimizer is offloaded."""

    model: Model
    precision_aware: bool = False
    fraction: float = 1.0
    overlap: bool = False
    """Of the copies with the steps on the host."""
    overlapped_step: bool = False
    """Whether the step returns early."""
    streamed: float = 0.0
    in_bf16: bool = False
    """Whether the host keeps moments and gradients in BF16."""

    @property
    def splits_masters(self) -> bool:
        """Some of those that can."""
        can_split = self.precision_aware and not self.streamed and self.model.precision != "fp16"
        return can_split and self.fraction == 0.5 and (self.overlap or self.overlapped_step)

    def __str__(self) -> str:
        mode = "precision_aware" if self.precision_aware else "fp32_shards"
        mode += "+BF16" if self.in_bf16 else ""
        overlap = "overlapped_step" if self.overlapped_step else "overlap" if self.overlap else "serial"
        model = f"{self.model.precision}-{self.model.kind}-{self.model.layout}".replace(" ", "_")
        streamed = f"-streamed-{self.streamed}" if self.streamed else ""
        gathered = "-gathered_late" if self.model.gathered_late else ""
        return f"{model}-{mode}-{self.fraction}-{overlap}{streamed}{gathered}"


class Run(NamedTuple):
    """A run with its weights in place, ready to step."""

    cfg: Any
    model: list[Any]
    optimizer: Any
    scheduler: Any
    train_step: Any


class Trace(NamedTuple):
    """What a run's steps did: the one at learning rate 0, then the real ones."""

    losses: list[float]
    """Empty where gradients were replayed."""
    weights: list[dict[str, torch.Tensor]]
    gradients: list[list[torch.Tensor]]
    """Of every step that was taken, as they lay in the buffers when the optimizer stepped."""


def config(directory: Path, model: Model, *, offload: dict[str, Any], checkpoint: dict[str, Any]) -> Any:
    """The configuration of a run, resolved and checked."""
    from megatron.bridge.training.config import runtime_config_update
    from megatron.bridge.training.config.mixed_precision import get_mixed_precision_config

    fields = {**SIZES, **(EXPERTS if model.kind == "experts" else {}), **LAYOUTS[model.layout]}
    if model.precision == "bf16+fp32":
        fields["transformer_layer_spec"] = fp32_norm_layer_spec
    checkpoint = {"save": None, **checkpoint}
    for option in ("load", "save", "pretrained_checkpoint", "non_persistent_local_ckpt_dir"):
        if checkpoint.get(option):
            checkpoint[option] = str(directory / checkpoint[option])
    cfg = tiny_config(
        directory,
        model=fields,
        optimizer=offload,
        train={"micro_batch_size": 4 if model.layout.startswith("TP2") else 2, "global_batch_size": 4},
        tokenizer={"vocab_size": SIZES["vocab_size"]},
        ddp=GATHERED_LATE if model.gathered_late else {},
        checkpoint=checkpoint,
    )
    cfg.mixed_precision = get_mixed_precision_config("fp16_mixed" if model.precision == "fp16" else "bf16_mixed")
    cfg.mixed_precision.initial_loss_scale = 2.0**8  # a real scale, and no step overflows
    cfg.mixed_precision.grad_reduce_in_fp32 = True  # precision-aware mode wants it for FP16
    if model.layout == "two instances":
        cfg.ddp.num_distributed_optimizer_instances = 2
    runtime_config_update(cfg)
    return cfg


def offload_options(cell: Cell) -> dict[str, Any]:
    return {
        "optimizer_cpu_offload": True,
        "optimizer_offload_fraction": cell.fraction,
        "overlap_cpu_optimizer_d2h_h2d": cell.overlap or cell.overlapped_step,
        "overlap_cpu_optimizer_step": cell.overlapped_step,
        "use_precision_aware_optimizer": cell.precision_aware,
        "optimizer_streamed_fraction": cell.streamed,
        "optimizer_split_masters": cell.splits_masters,
        **(BF16_STATE if cell.in_bf16 else {}),
    }


class Rig:
    """Process groups and models for all cells of one model: it is built once, optimizers again and again."""

    def __init__(self, directory: Path, model: Model) -> None:
        from megatron.bridge.training.initialize import initialize_megatron

        self.directory, self.model = directory, model
        self._pretrained: dict[str, torch.Tensor] = {}
        cfg = config(directory, model, offload={}, checkpoint={})
        self._groups = initialize_megatron(cfg)
        self.whole = self._build(cfg)

    def _build(self, cfg: Any) -> list[Any]:
        return cfg.model.provide_distributed_model(ddp_config=cfg.ddp, pg_collection=self._groups)

    @functools.cached_property
    def frozen(self) -> list[Any]:
        """Base weights loaded and half of them frozen by a hook, as for adapters: before any optimizer exists."""
        cfg = config(self.directory, self.model, offload={}, checkpoint={})
        pretrained = self.directory / "pretrained"

        def load_and_freeze(chunks: list[Any]) -> None:
            model_checkpoint.load_model_weights(chunks, pretrained)
            for chunk in chunks:
                for name, param in chunk.named_parameters():
                    param.requires_grad_("linear_proj" in name or "norm" in name or "linear_fc2" in name)

        cfg.model.register_pre_wrap_hook(load_and_freeze)
        return self._build(cfg)

    def load_weights(self, chunks: list[Any]) -> None:
        """The weights of the checkpoint, which is read once."""
        if not self._pretrained:
            model_checkpoint.load_model_weights(chunks, self.directory / "pretrained")
            self._pretrained = weights_of(chunks)
            return
        with torch.no_grad():
            for index, chunk in enumerate(chunks):
                for name, param in chunk.named_parameters():
                    param.copy_(self._pretrained[f"{index}.{name}"])

    def close(self) -> None:
        """Let models and groups go."""
        forget_last_forward([*self.whole, *vars(self).get("frozen", [])])
        vars(self).clear()
        gc.collect()


def start(cfg: Any, model: list[Any]) -> Run:
    """A new optimizer on the model's weights of now."""
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.micro_batches import bind_forward_step
    from megatron.bridge.training.optim import setup_optimizer
    from megatron.bridge.training.setup import SetupOutput, set_schedule_functions
    from megatron.bridge.training.state import GlobalState
    from megatron.bridge.training.train import train_step

    optimizer, scheduler = setup_optimizer(cfg.optimizer, cfg.scheduler, model, cfg.dist.use_gloo_process_groups)
    set_schedule_functions(model, optimizer, cfg)
    state = GlobalState(cfg)
    bound = bind_forward_step(forward_step, state)
    batches = _micro_batches(cfg.train.micro_batch_size)
    output = SetupOutput(state, model, optimizer, scheduler, None, None, None, None, None)
    return Run(cfg, model, optimizer, scheduler, lambda: train_step(output, bound, batches))


def _micro_batches(rows_each: int) -> list[dict[str, torch.Tensor]]:
    """This rank's part of one global batch of 4 sequences."""
    from megatron.core import mpu

    size, rank = mpu.get_data_parallel_world_size(), mpu.get_data_parallel_rank()
    length, vocab = SIZES["seq_length"], SIZES["vocab_size"]
    rows = torch.arange(4)[:, None] * 7 + torch.arange(length + 1)[None] * torch.tensor([[1], [2], [3], [5]])
    batches = [
        {
            "tokens": part[:, :-1],
            "labels": part[:, 1:],
            "loss_mask": torch.ones(rows_each, length),
            "position_ids": torch.arange(length).repeat(rows_each, 1),
        }
        for part in (rows % vocab).split(rows_each)
    ]
    return batches[rank::size]


class Stepper:
    """Takes a run's steps: trains and keeps the gradients, or replays those of the run that it must equal.

    With the same weights before each step, which is checked, the gradients would be the same.
    """

    def __init__(self, run: Run, replayed: list[list[torch.Tensor]] | None) -> None:
        self._run, self._replayed = run, None if replayed is None else iter(replayed)
        self._buffers = [buffer for chunk in run.model for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
        self.gradients: list[list[torch.Tensor]] = []
        self.losses: list[float] = []

    def step(self) -> None:
        optimizer = self._run.optimizer
        if self._replayed is not None:
            optimizer.zero_grad()
            for chunk in self._run.model:
                for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
                    group.param_gather_dispatched = False  # as the end of a backward pass does
            for buffer, gradient in zip(self._buffers, next(self._replayed), strict=True):
                buffer.grad_data.copy_(gradient)
            updated, _, _ = optimizer.step()
            self._run.scheduler.step(increment=4)
        else:
            stock_step = optimizer.step

            def recording_step() -> Any:
                self.gradients.append([buffer.grad_data.clone() for buffer in self._buffers])
                return stock_step()

            optimizer.step = recording_step
            result = self._run.train_step()
            del optimizer.step
            updated = result.updated
            self.losses.append(result.losses["lm loss"])
        assert updated, "a step was skipped: the loss scale is too high for this model"

    def settle(self) -> None:
        """Wait for the weights of the last step, where they are late."""
        from megatron.bridge.training.cpu_offload.overlapped_steps import wait_for_weights

        wait_for_weights(self._run.cfg, self._run.model, self._run.optimizer)

    def trace(self, *, only_last: bool = False) -> Trace:
        """One step with learning rate 0, then the real ones.

        Args:
            only_last: Look at the weights after the last step alone, so that no other is waited for.
        """
        for group in self._run.optimizer.param_groups:
            group["lr"] = 0.0
        weights = []
        for step in range(1 + STEPS):
            self.step()
            if step == STEPS or not only_last:
                self.settle()
                weights.append(weights_of(self._run.model))
        return Trace(self.losses, weights, self.gradients)
