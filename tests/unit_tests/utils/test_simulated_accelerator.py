# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The simulated accelerator: where a tensor says it is, what a copy is, and stock torch when it is suspended."""

import torch

from tests.rigs.ranks import run_on_ranks


def _tensors_answer_for_their_place():
    from megatron.bridge.utils import device

    made = torch.zeros(3, requires_grad=True)
    host = made.cpu()
    assert made.is_cuda and not host.is_cuda
    assert host.data_ptr() != made.data_ptr() and host.cpu() is host
    assert not host.detach().clone().float().pin_memory().is_cuda
    assert not torch.zeros(3, device="cpu").is_cuda and not torch.zeros(3).to("cpu").is_cuda
    assert host.cuda().is_cuda and host.to("cuda").is_cuda and host.to(made).is_cuda
    assert torch.zeros(3, device=device.current_device()).is_cuda
    assert made.type() == "torch.cuda.FloatTensor" and host.type() == "torch.FloatTensor"
    assert made.to(torch.bfloat16).dtype == torch.bfloat16
    host.sum().backward()
    assert torch.equal(made.grad, torch.ones(3))


def _suspended_is_stock_torch():
    from megatron.bridge.utils import simulated_accelerator

    made = torch.zeros(3)
    with simulated_accelerator.suspended():
        inside = (made.is_cuda, torch.cuda.is_initialized(), made.cpu() is made)
    return inside, (made.is_cuda, torch.cuda.is_initialized())


def _hybrid_optimizer_really_splits(fraction):
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

    params = [torch.nn.Parameter(torch.randn(8, 4)) for _ in range(4)]
    optimizer = HybridDeviceOptimizer(
        params,
        offload_fraction=fraction,
        cpu_optimizer_cls=torch.optim.AdamW,
        gpu_optimizer_cls=torch.optim.AdamW,
        param_update_in_fp32=True,
        overlap_cpu_optimizer_d2h_h2d=True,
        lr=0.1,
    )
    before = [param.detach().clone() for param in params]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, params, strict=True)]
    return len(optimizer.gpu_params_map_cpu_copy), moved


class _MakesADeviceTensor(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        return tensor * 2

    @staticmethod
    def backward(ctx, grad):
        made = torch.ones(2, device=torch.cuda.current_device())
        return grad + made.is_cuda * made


def _backward_makes_device_tensors():
    param = torch.ones(2, requires_grad=True)
    gradients = []
    for run in (torch.Tensor.backward, torch.autograd.backward):
        run(_MakesADeviceTensor.apply(param).sum())
        gradients.append(param.grad.tolist())
        param.grad = None
    (grad,) = torch.autograd.grad(_MakesADeviceTensor.apply(param).sum(), [param])
    return [*gradients, grad.tolist()]


def test_autograd_functions_make_device_tensors():
    assert run_on_ranks(_backward_makes_device_tensors, 1)[0] == [[2.0, 2.0]] * 3


def test_tensors_answer_for_their_place():
    run_on_ranks(_tensors_answer_for_their_place, 1)


def test_suspended_is_stock_torch():
    inside, after = run_on_ranks(_suspended_is_stock_torch, 1)[0]
    assert inside == (False, False, True)
    assert after == (True, True)


def test_hybrid_optimizer_splits_by_fraction():
    for fraction, expected in ((0.0, 0), (0.5, 2), (1.0, 4)):
        offloaded, moved = run_on_ranks(_hybrid_optimizer_really_splits, 1, fraction)[0]
        assert offloaded == expected
        assert all(moved)
