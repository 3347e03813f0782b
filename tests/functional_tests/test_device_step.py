# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The offloaded optimizer's part that stays on the device: how many steps it counts, what it waits for."""

import contextlib

import megatron.core.optimizer as core_optimizer
import pytest
import torch
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

from megatron.bridge.utils.replaced import replaced
from tests.rigs.on_ranks import Recorder, build_training, differing, make_pretrained, take_step
from tests.rigs.ranks import run_on_ranks
from tests.rigs.tiny import tiny_config

STEPS, SPLIT = 5, 2


class FusedAdam(torch.optim.Optimizer):
    """AdamW that counts its steps in its param groups, and not in its state, as Transformer Engine's does."""

    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "bias_correction": bias_correction})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            beta_1, beta_2 = group["betas"]
            for param in group["params"]:
                state = self.state[param]
                for name in ("exp_avg", "exp_avg_sq"):
                    state.setdefault(name, torch.zeros_like(param))
                state["exp_avg"].lerp_(param.grad, 1 - beta_1)
                state["exp_avg_sq"].mul_(beta_2).addcmul_(param.grad, param.grad, value=1 - beta_2)
                mean = state["exp_avg"] / (1 - beta_1 ** group["step"])
                scale = (state["exp_avg_sq"] / (1 - beta_2 ** group["step"])).sqrt() + group["eps"]
                param.mul_(1 - group["lr"] * group["weight_decay"]).addcdiv_(mean, scale, value=-group["lr"])


@contextlib.contextmanager
def as_with_transformer_engine():
    """Core finds an optimizer of Transformer Engine's kind, and asks it for its steps accordingly."""
    with (
        replaced(core_optimizer, Adam=FusedAdam, USING_PYTORCH_OPTIMIZER=False),
        replaced(distrib_optimizer, HAVE_APEX_OR_TE=True, USING_TE_OPTIMIZER=True),
    ):
        yield


class _CountSteps(Recorder):
    """Also keeps the steps that each part of the optimizer counts at the end."""

    def on_train_end(self, context):
        super().on_train_end(context)
        hybrids = [child.optimizer for child in context.optimizer.chained_optimizers]
        self.device_steps = {group["step"] for hybrid in hybrids for group in hybrid.gpu_optimizer.param_groups}
        self.given_steps = {group["step"] for hybrid in hybrids for group in hybrid.param_groups}
        self.repairs = {name for hybrid in hybrids for name in type(hybrid).repairs}


def _finetune(directory, optimizer, **checkpoint):
    from megatron.bridge.training.finetune import finetune
    from megatron.bridge.training.gpt_step import forward_step

    cfg = tiny_config(
        directory,
        train_iters=STEPS,
        optimizer={"optimizer_cpu_offload": True, **optimizer},
        checkpoint={"pretrained_checkpoint": f"{directory}/pretrained", **checkpoint},
    )
    recorder = _CountSteps()
    with as_with_transformer_engine():
        finetune(cfg, forward_step, callbacks=[recorder])
    return recorder


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    path = tmp_path_factory.mktemp("device_step") / "pretrained"
    run_on_ranks(make_pretrained, 2, path)
    return path


NOTHING, HALF = {"optimizer_offload_fraction": 0.0}, {"optimizer_offload_fraction": 0.5}


@pytest.mark.parametrize(
    ("optimizer", "fully"),
    [
        pytest.param(NOTHING, False, id="nothing"),
        pytest.param(NOTHING, True, id="nothing, fully_reshardable"),
        pytest.param(HALF, False, id="half"),
        pytest.param({**HALF, "use_precision_aware_optimizer": True}, False, id="half, precision-aware"),
    ],
)
def test_a_device_optimizer_that_counts_in_its_groups_counts_on(tmp_path, pretrained, optimizer, fully):
    (tmp_path / "pretrained").symlink_to(pretrained)
    saving = {"save_interval": SPLIT, "dist_ckpt_optim_fully_reshardable": fully}
    whole = run_on_ranks(_finetune, 2, tmp_path, optimizer, **saving)
    resuming = {"save": None, "load": f"{tmp_path}/checkpoints", "ckpt_step": SPLIT}
    resumed = run_on_ranks(_finetune, 2, tmp_path, optimizer, **resuming)
    for uninterrupted, continued in zip(whole, resumed, strict=True):
        assert "step counter" in continued.repairs
        assert uninterrupted.device_steps == continued.device_steps == continued.given_steps == {STEPS}
        assert continued.losses == uninterrupted.losses[SPLIT:]
        assert differing(continued.weights_after, uninterrupted.weights_after) == {}


class _Stream:
    """A stream that writes down what waits for what."""

    def __init__(self, name, events):
        self.name, self.events = name, events

    def wait_stream(self, other):
        self.events.append(f"{self.name} waits for {other.name}")

    def wait(self, *_): ...
    def synchronize(self): ...
    def record_event(self, *_):
        return self


def _order_of_a_step(directory, *, aware):
    """What waits for what in one step, and when the device's part has stepped."""
    optimizer = {
        "optimizer_cpu_offload": True,
        "optimizer_offload_fraction": 0.5,
        "overlap_cpu_optimizer_d2h_h2d": True,
        "use_precision_aware_optimizer": aware,
    }
    model, built, _ = build_training(tiny_config(directory, optimizer=optimizer))
    events = []
    compute = _Stream("compute", events)
    for child in built.chained_optimizers:
        child.optimizer._d2h_stream = _Stream("to host", events)
        child.optimizer._h2d_stream = _Stream("to device", events)
        child.optimizer.gpu_optimizer.register_step_post_hook(lambda *_: events.append("stepped"))
    with replaced(torch.cuda, current_stream=lambda *_: compute):
        take_step(model, built)
    return events


@pytest.mark.parametrize("aware", [True, False], ids=["precision-aware", "default"])
def test_the_device_steps_when_its_gradients_are_cast(tmp_path, aware):
    for events in run_on_ranks(_order_of_a_step, 2, tmp_path, aware=aware):
        before = events[: events.index("stepped")]
        assert before[0] == "to host waits for compute"
        assert ("compute waits for to host" in before) == aware, "by default there is nothing to wait for"


def _steps_of_a_hybrid(*, overlap):
    """The weights after 50 steps of a precision-aware hybrid on large 16-bit gradients, the same each time."""
    from megatron.bridge.core_repairs import install
    from megatron.bridge.utils.device import current_device

    torch.manual_seed(1)
    sizes = (1 << 22, 1 << 22, 1 << 12)
    weights = [torch.randn(size, device=current_device()).to(torch.bfloat16) for size in sizes]
    hybrid = HybridDeviceOptimizer(
        [weight.requires_grad_() for weight in weights],
        offload_fraction=0.5,
        cpu_optimizer_cls=torch.optim.AdamW,
        gpu_optimizer_cls=torch.optim.AdamW,
        param_update_in_fp32=True,
        overlap_cpu_optimizer_d2h_h2d=overlap,
        lr=1e-2,
    )
    names = install._repair(hybrid, HybridDeviceOptimizer)
    assert ("gradient wait" in names) == overlap and hybrid.gpu_optimizer and hybrid.cpu_optimizers
    for _ in range(50):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, device=weight.device).to(weight.dtype)
        hybrid.step()
        hybrid.zero_grad()
    return [weight.detach().cpu() for weight in weights]


@pytest.mark.gpu
def test_overlap_changes_no_bit():
    (with_overlap,) = run_on_ranks(_steps_of_a_hybrid, 1, overlap=True)
    (without,) = run_on_ranks(_steps_of_a_hybrid, 1, overlap=False)
    assert all(torch.equal(first, second) for first, second in zip(with_overlap, without, strict=True))
