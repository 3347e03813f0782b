# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Adversarial streams: what is ordered by streams, events and the host's reads, and what isn't and is seen."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.rigs.adversarial_streams import adversarial_streams
from tests.rigs.device_queues import DEFAULT_FIRST, HOST_FIRST, ORDERS, SIDES_FIRST
from tests.rigs.ranks import run_on_ranks


def _outcomes(program: Callable[..., Any], *arguments: Any) -> dict[Any, Any]:
    """What a program comes to, by order."""
    outcomes = {}
    for order in ORDERS:
        with adversarial_streams(order):
            found = program(*arguments)
        outcomes[order] = found.tolist() if isinstance(found, torch.Tensor) else found
    return outcomes


def _down(left_out: str) -> list[float]:
    """A gradient is computed and copied to the host on a stream beside."""
    side, on_host = torch.cuda.Stream(), torch.zeros(2, device="cpu")
    gradient = torch.ones(2, device="cuda").mul_(3)
    if left_out != "the stream's wait":
        side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        on_host.copy_(gradient, non_blocking=left_out != "nothing, blocking")
    event = side.record_event()
    if "the host's wait" not in left_out:
        event.synchronize()
    return on_host.tolist()


def _up(left_out: str) -> torch.Tensor:
    """A weight is stepped on at the host, copied up on a stream beside, and read."""
    side, master = torch.cuda.Stream(), torch.full((2,), 1.0, device="cpu")
    weight = torch.zeros(2, device="cuda")
    before = weight + 0
    if left_out != "the stream's wait":
        side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        weight.copy_(master, non_blocking=True)
    event = torch.cuda.Event()
    event.record(side)
    if left_out == "the host's wait":
        master.fill_(7.0)
    if left_out != "the reader's wait":
        torch.cuda.current_stream().wait_event(event)
    read = torch.stack([before, weight * 2])
    event.synchronize()
    master.fill_(8.0)
    return read


def _let_go(left_out: str) -> list[float]:
    """A stream beside reads a tensor that the current stream has made, and that the program then lets go."""
    side, on_host = torch.cuda.Stream(), torch.zeros(2, device="cpu")
    gradient = torch.ones(2, device="cuda").mul_(3)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        on_host.copy_(gradient[:] if left_out == "a view kept" else gradient, non_blocking=True)
    if left_out == "nothing":
        gradient.record_stream(side)
    if left_out == "nothing, waiting":
        torch.cuda.current_stream().wait_stream(side)
    kept = gradient.view(2) if left_out == "a view kept" else None
    del gradient
    torch.zeros(2, device="cuda")
    side.synchronize()
    assert kept is None or kept.numel() == 2
    return on_host.tolist()


def _made_beside(waits: bool) -> float:
    """The current stream reads a tensor that a stream beside has made, and whose memory goes back to that stream."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        made = torch.full((1,), 5.0, device="cuda")
    torch.cuda.current_stream().wait_stream(side)
    read = made + 1
    if waits:
        side.wait_stream(torch.cuda.current_stream())
    del made
    torch.cuda.Event().record(side)
    side.wait_stream(side)
    return read.item()


def _queued_on(reads_after: bool) -> torch.Tensor:
    """A tensor that is read, then written by the work of a stream beside, and read again."""
    from megatron.bridge.utils.device import queued_on

    side, tensor = torch.cuda.Stream(), torch.zeros(1, device="cuda")
    before = tensor + 1
    with queued_on(side):
        tensor.fill_(5.0)
    return torch.cat([before, tensor + 1]) if reads_after else before


def _wait_for_stream() -> torch.Tensor:
    from megatron.bridge.utils.device import wait_for_stream

    side, tensor = torch.cuda.Stream(), torch.zeros(1, device="cuda")
    with torch.cuda.stream(side):
        tensor.fill_(5.0)
    wait_for_stream(side)
    return tensor + 1


def _in_program_order(reader: str) -> Any:
    """Work of the current stream alone, and all that makes the host wait for it."""
    tensor = (torch.arange(4, device="cuda") * 2)[1:]
    tensor += 1
    grown = torch.cat([tensor, torch.zeros_like(tensor)]).float()
    readers: dict[str, Callable[[], Any]] = {
        "item": lambda: grown[0].item(),
        "cpu": lambda: grown.cpu()[0].tolist(),
        "to": lambda: grown.to("cpu").sum().tolist(),
        "tolist": lambda: grown.tolist(),
        "numpy": lambda: grown.detach().numpy().sum().tolist(),
        "tensor of tensors": lambda: torch.tensor([grown[1], grown[2]]).tolist(),
        "nonzero": lambda: len(grown.nonzero()),
        "equal": lambda: torch.equal(grown, grown.clone()),
        "mask": lambda: len(grown[grown > 3]),
        "random": lambda: int(torch.nn.functional.dropout(grown).numel()),
        "blocking copy": lambda: torch.zeros(6, device="cpu").copy_(grown).tolist(),
        "synchronize": lambda: [torch.cuda.synchronize(), torch.zeros(6, device="cpu").copy_(grown, True)][1].numel(),
    }
    return readers[reader]()


def _backward() -> list[float]:
    weight = torch.ones(2, device="cuda", requires_grad=True)
    (weight * 3 * torch.cuda.Stream().cuda_stream + weight.sum() ** 2).sum().backward()
    return weight.grad.tolist()


class _MaskedByIndex(torch.autograd.Function):
    """As Core's cross entropy, it makes a tensor beside its gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor + 1

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return torch.arange(2, device=gradient.device) * gradient + 1


def _made_beside_a_tensor() -> torch.Tensor:
    """Tensors that are made where another one lies, as Core does for rotary embeddings and outputs without a view."""
    tensor = torch.ones(2, device="cuda", requires_grad=True)
    read = tensor.detach() * 3
    product = torch.arange(2, device=read.device) * read
    viewless = torch.empty(1, device=read.device)
    viewless.data = read * 2
    (_MaskedByIndex.apply(tensor) * 2).sum().backward()
    assert read.to(viewless.device) is read and read.device.type == "cpu"
    assert tensor.grad is not None
    return torch.cat([product + 1, viewless + 1, tensor.grad + 1])


def _kept_stream() -> list[Any]:
    """A stream and an event that are made before, and used in every order and between."""
    side, event, found = torch.cuda.Stream(), torch.cuda.Event(), []
    for order in ORDERS:
        with adversarial_streams(order):
            found.append(_fill_on(side, event))
        found.append(_fill_on(side, event))
    return found


def _left_stream() -> list[Any]:
    """A stream that is made in every order, and used there and afterwards, as one that Core keeps in a class."""
    found = []
    for order in ORDERS:
        with adversarial_streams(order):
            side = torch.cuda.Stream()
            found.append(_fill_on(side, torch.cuda.Event()))
        found.append(_fill_on(side, torch.cuda.Event()))
    return found


def _reduced_beside() -> torch.Tensor:
    """Gradients that a stream beside waits for and reads; then nobody holds the reduction."""
    side, gradient = torch.cuda.Stream(), torch.full((4,), dist.get_rank() + 1.0, device="cuda")
    own = torch.zeros(2, device="cuda")
    with dist._coalescing_manager(async_ops=True) as reduction:
        dist.reduce_scatter_tensor(own, gradient, async_op=True)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        reduction.wait()
        del reduction
        read = own * 2
    torch.cuda.current_stream().wait_stream(side)
    return read + 0


def _fill_on(side: Any, event: Any) -> float:
    tensor = torch.zeros(1, device="cuda")
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        tensor.fill_(5.0)
    event.record(side)
    torch.cuda.current_stream().wait_event(event)
    return (tensor + 1).item()


def test_streams_may_be_older_than_the_mode():
    assert run_on_ranks(_kept_stream, 1) == [[6.0] * 2 * len(ORDERS)]


def test_streams_may_be_used_after_the_mode():
    assert run_on_ranks(_left_stream, 1) == [[6.0] * 2 * len(ORDERS)]


def test_a_collective_is_over_where_a_stream_waits_for_it():
    assert run_on_ranks(_outcomes, 2, _reduced_beside) == [dict.fromkeys(ORDERS, [6.0, 6.0])] * 2


def test_right_waits_give_right_bits():
    assert set(map(str, run_on_ranks(_outcomes, 1, _down, "nothing")[0].values())) == {"[3.0, 3.0]"}
    assert set(map(str, run_on_ranks(_outcomes, 1, _up, "nothing")[0].values())) == {"[[0.0, 0.0], [2.0, 2.0]]"}
    assert set(map(str, run_on_ranks(_outcomes, 1, _down, "nothing, blocking")[0].values())) == {"[3.0, 3.0]"}


MISSING = {
    "source not computed": (_down, "the stream's wait", SIDES_FIRST, [1.0, 1.0]),
    "target not filled": (_down, "the host's wait", HOST_FIRST, [0.0, 0.0]),
    "target written while it is read": (_up, "the stream's wait", SIDES_FIRST, [[1.0, 1.0], [2.0, 2.0]]),
    "target read before it is written": (_up, "the reader's wait", DEFAULT_FIRST, [[0.0, 0.0], [0.0, 0.0]]),
    "source overwritten too early": (_up, "the host's wait", HOST_FIRST, [[0.0, 0.0], [14.0, 14.0]]),
}


def _let_go_in_each_way() -> dict[str, set[str]]:
    found = {what: _outcomes(_let_go, what) for what in ("nothing", "nothing, waiting", "a view kept", "record_stream")}
    found |= {f"made beside, {waits}": _outcomes(_made_beside, waits) for waits in (True, False)}
    return {what: set(map(str, outcomes.values())) for what, outcomes in found.items()}


def test_memory_let_go_while_another_stream_reads_it_is_seen():
    (found,) = run_on_ranks(_let_go_in_each_way, 1)
    assert found.pop("record_stream") == {"[nan, nan]", "[3.0, 3.0]"}
    assert found.pop("made beside, False") == {"nan", "6.0"}
    assert found.pop("made beside, True") == {"6.0"}
    assert found == dict.fromkeys(("nothing", "nothing, waiting", "a view kept"), {"[3.0, 3.0]"})


@pytest.mark.parametrize("what", MISSING)
def test_a_missing_wait_is_seen(what):
    program, left_out, order, outcome = MISSING[what]
    assert run_on_ranks(_outcomes, 1, program, left_out)[0][order] == outcome


def test_our_waits_order_streams():
    assert set(map(str, run_on_ranks(_outcomes, 1, _wait_for_stream)[0].values())) == {"[6.0]"}
    (outcomes,) = run_on_ranks(_queued_on_both, 1)
    assert outcomes == dict.fromkeys(ORDERS, ([1.0], [1.0, 6.0]))


def _queued_on_both() -> dict[Any, Any]:
    before, after = (_outcomes(_queued_on, reads) for reads in (False, True))
    return {order: (before[order], after[order]) for order in ORDERS}


def _all_readers(readers: list[str]) -> dict[str, list[Any]]:
    return {reader: list(_outcomes(_in_program_order, reader).values()) for reader in readers}


READ = {
    "item": 3,
    "cpu": 3,
    "to": 15,
    "tolist": [3, 5, 7, 0, 0, 0],
    "numpy": 15,
    "tensor of tensors": [5, 7],
    "nonzero": 3,
    "equal": True,
    "mask": 2,
    "random": 6,
    "blocking copy": [3, 5, 7, 0, 0, 0],
    "synchronize": 6,
}


def test_the_host_waits_where_it_reads():
    (found,) = run_on_ranks(_all_readers, 1, list(READ))
    assert found == {reader: [outcome] * len(ORDERS) for reader, outcome in READ.items()}


def test_what_is_made_beside_a_device_tensor_is_queued():
    outcomes = run_on_ranks(_outcomes, 1, _made_beside_a_tensor)[0]
    assert outcomes == dict.fromkeys(ORDERS, [1.0, 4.0, 7.0, 7.0, 2.0, 4.0])


def test_backward_computes_the_same():
    assert set(map(str, run_on_ranks(_outcomes, 1, _backward)[0].values())) == {"[8.0, 8.0]"}
