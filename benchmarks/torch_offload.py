# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Torch's own ways of offloading an optimizer, on the model, the batches and the options of a run of ours.

* FSDP2: `fully_shard` of each layer with `CPUOffloadPolicy`. FP32 parameters, gradients and Adam's state are on the
  host; weights cross in FP32 for each forward and backward pass, and are rounded to bf16 on the device.
* torchao: `CPUOffloadOptimizer` over FP32 parameters on the device, under bf16 autocast. Gradients cross during each
  backward pass, and each parameter has an optimizer on the host. It can't clip: what has crossed is stepped on as it
  is. Adam hardly depends on the scale of all gradients together, so its losses are still compared.

Ours keeps bf16 weights and FP32 masters, so losses differ by rounding. They must agree within `tolerance()`.
"""

import argparse
import importlib
import importlib.util
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

from benchmarks.training_step import UNCOUNTED, bare_model, config, model_shape
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain
from megatron.bridge.utils import device

LR = 1e-3
"""So large that losses show whether the optimizer steps as ours does."""

SIMULATED_TOLERANCE, GPU_TOLERANCE = 2e-4, 2e-3
"""Between losses of the same step, relative. 3e-5 was seen on the simulated accelerator, and 9e-4 with a learning rate
of 0."""


def tolerance() -> float:
    """How far apart the losses may be, relative, on this process's device."""
    return SIMULATED_TOLERANCE if device.is_simulated() else GPU_TOLERANCE


class Taped(Callback):
    """Keeps what a run started from, and what each step saw and gave; then lets another loop take the same steps."""

    def __init__(self, shape: dict[str, int], others: dict[str, type["TorchLoop"]]) -> None:
        """
        Args:
            shape: Of the model.
            others: The loops that take the same steps, by name.
        """
        self._shape, self._others = shape, others
        self._steps: list[list[dict[str, Any]]] = [[]]
        self.losses: list[float] = []
        self.seconds: dict[str, float] = {}
        """Of a step of each loop, the median of those that count."""

    def watch(self, forward_step: Callable[..., Any]) -> Callable[..., Any]:
        """A forward step that keeps the micro-batches it takes."""

        def watched(state: Any, data_iterator: Any, model: Any) -> Any:
            self._steps[-1].append(next(data_iterator))
            return forward_step(state, iter(self._steps[-1][-1:]), model)

        return watched

    def on_train_start(self, context: CallbackContext) -> None:
        """Keep the weights."""
        state = context.model[0].module.module.state_dict()
        self._weights = {name: one.to("cpu").clone() for name, one in state.items() if isinstance(one, torch.Tensor)}

    def on_train_step_end(self, context: CallbackContext) -> None:
        """Keep the loss."""
        self.losses.append(context.loss_dict["lm loss"])
        self._steps.append([])

    def on_train_end(self, context: CallbackContext) -> None:
        """Let the others take the same steps."""
        cfg = context.state.cfg
        for name, loop in self._others.items():
            one, seconds = loop(self._shape, self._weights, cfg), []
            for at, (batches, expected) in enumerate(zip(self._steps, self.losses, strict=False), start=1):
                device.synchronize()
                started = time.perf_counter()
                loss = one.step(batches)
                device.synchronize()
                seconds.append(time.perf_counter() - started)
                if not math.isclose(loss, expected, rel_tol=tolerance()):
                    raise RuntimeError(f"step {at}: {name} has loss {loss}, ours {expected}, beyond {tolerance():g}")
            self.seconds[name] = median(seconds[UNCOUNTED:])


class TorchLoop:
    """A bare loop over the run's model with FP32 parameters."""

    def __init__(self, shape: dict[str, int], weights: dict[str, torch.Tensor], cfg: Any) -> None:
        """
        Args:
            shape: Of the model.
            weights: To start from, on the host.
            cfg: The run's configuration, whose optimizer it follows.
        """
        self.options = cfg.optimizer
        self.model = bare_model(shape, cfg.model.seq_length)
        self.model.load_state_dict(weights, strict=False)
        self.model.float().train()
        self.prepare()
        self.optimizer = self.build_optimizer()

    def prepare(self) -> None:
        """Wrap the model."""

    def build_optimizer(self) -> Any:
        """Over `groups()`."""
        raise NotImplementedError

    def groups(self) -> list[dict[str, Any]]:
        """Matrices decay, vectors don't, as in Core."""
        params = list(self.model.parameters())
        return [
            {"params": [one for one in params if one.dim() > 1], "weight_decay": self.options.weight_decay},
            {"params": [one for one in params if one.dim() == 1], "weight_decay": 0.0},
        ]

    def adam_options(self) -> dict[str, Any]:
        """Those of the run."""
        betas = self.options.adam_beta1, self.options.adam_beta2
        return {"lr": self.options.lr, "betas": betas, "eps": self.options.adam_eps, "fused": True}

    def losses(self, batch: dict[str, Any]) -> torch.Tensor:
        """Of each token of a micro-batch."""
        return self.model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])

    def before_last_backward(self, is_last: bool) -> None:
        """Told before each micro-batch whether it is the step's last."""

    def step(self, batches: list[dict[str, Any]]) -> float:
        """One step; returns its loss."""
        where = device.current_device()
        num_tokens = sum(int(batch["loss_mask"].sum()) for batch in batches)
        total = 0.0
        for at, batch in enumerate(batches):
            batch = {name: value.to(where) for name, value in batch.items() if value is not None}
            self.before_last_backward(at + 1 == len(batches))
            loss = (self.losses(batch).float() * batch["loss_mask"]).sum() / num_tokens
            loss.backward()
            total = total + loss.detach()
        self.clip()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(total)

    def clip(self) -> None:
        """To the run's norm of all gradients."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip_grad)


class Fsdp2(TorchLoop):
    """`fully_shard` with `CPUOffloadPolicy`."""

    def prepare(self) -> None:
        """Shard each layer, and then the rest."""
        options = {
            "mesh": init_device_mesh("cpu" if device.is_simulated() else "cuda", (1,)),
            "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
            "offload_policy": CPUOffloadPolicy(pin_memory=not device.is_simulated()),
        }
        for layer in self.model.decoder.layers:
            fully_shard(layer, **options)
        fully_shard(self.model, **options)

    def build_optimizer(self) -> Any:
        """Torch's fused AdamW on the host."""
        return torch.optim.AdamW(self.groups(), **self.adam_options())

    def before_last_backward(self, is_last: bool) -> None:
        """Gradients are reduced, and go to the host, once a step."""
        self.model.set_requires_gradient_sync(is_last)


class Torchao(TorchLoop):
    """torchao's `CPUOffloadOptimizer`, under autocast. It needs CUDA, and hasn't run yet."""

    def prepare(self) -> None:
        """Move to the device."""
        self.model.to(device.current_device())

    def build_optimizer(self) -> Any:
        """Built after the model is on the device: it keeps a copy of each parameter on the host."""
        offload = importlib.import_module("torchao.optim").CPUOffloadOptimizer
        return offload(self.groups(), torch.optim.AdamW, **self.adam_options())

    def clip(self) -> None:
        """Not possible: the gradients are on the host already."""

    def losses(self, batch: dict[str, Any]) -> torch.Tensor:
        """Products in bf16."""
        with torch.autocast("cuda", torch.bfloat16):
            return super().losses(batch)


def seconds_of_others(arguments: argparse.Namespace, found: dict[str, type[TorchLoop]]) -> dict[str, float]:
    """Seconds of a step of torch's own, by name.

    Args:
        arguments: Of `offloaded_run`. A run of ours without offload, whose losses theirs must meet, comes first.
        found: The loops, from `others`.

    Raises:
        RuntimeError: A loss differs.
    """
    shape, steps = model_shape(arguments.hidden_size, num_layers=arguments.num_layers), arguments.steps + UNCOUNTED
    taped = Taped(shape, found)
    with tempfile.TemporaryDirectory() as directory:
        cfg = config(shape, arguments.seq_length, steps, Path(directory), micro_batches=arguments.micro_batches)
        cfg.optimizer.lr = cfg.optimizer.min_lr = LR
        pretrain(cfg, taped.watch(forward_step), callbacks=[taped])
    return taped.seconds


def others(*, with_torchao: bool = False) -> dict[str, type[TorchLoop]]:
    """The loops, by name.

    Raises:
        ValueError: torchao is asked for and can't run here.
    """
    found: dict[str, type[TorchLoop]] = {"FSDP2, CPUOffloadPolicy": Fsdp2}
    if not with_torchao:
        return found
    if device.is_simulated():
        raise ValueError("--torchao: its CPUOffloadOptimizer needs CUDA, and torch finds no CUDA device; leave it out")
    if importlib.util.find_spec("torchao") is None:
        raise ValueError('--torchao: torchao isn\'t installed; pip install -e ".[bench]", or leave it out')
    return {**found, "torchao, CPUOffloadOptimizer": Torchao}
