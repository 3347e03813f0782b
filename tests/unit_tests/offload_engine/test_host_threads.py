# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The threads of the host's optimizer: a rank's share of the cores, for the step alone, with the same bits."""

import math
import os

import pytest
import torch

from megatron.bridge.offload_engine import host_threads
from megatron.bridge.offload_engine.host_threads import (
    HostThreads,
    own_cores,
    parse_core_list,
    plan_host_threads,
    share_of_cores,
    step_with,
)

NODE = frozenset(range(16))


@pytest.mark.parametrize(
    ("text", "cores"),
    [("0-3", {0, 1, 2, 3}), ("0-1,8", {0, 1, 8}), ("5\n", {5}), ("", set()), ("0-1,4-5", {0, 1, 4, 5})],
)
def test_linux_lists_of_cores_are_read(text, cores):
    assert parse_core_list(text) == cores


@pytest.mark.parametrize(
    ("own", "neighbours", "quota", "share"),
    [
        (NODE, [NODE], math.inf, 16),
        (NODE, [NODE] * 8, math.inf, 2),
        (NODE, [NODE] * 5, math.inf, 3),
        (NODE, [NODE] * 40, math.inf, 1),
        (frozenset(range(8)), [frozenset(range(8)), frozenset(range(8, 16))], math.inf, 8),  # bound apart already
        (frozenset(range(8)), [frozenset(range(8)), NODE], math.inf, 4),
        (NODE, [NODE] * 2, 4.0, 2),  # a container that may use 4 cores' worth of 16
        (NODE, [NODE], 0.5, 1),
    ],
)
def test_a_rank_takes_its_share(own, neighbours, quota, share):
    assert share_of_cores(own, neighbours, quota) == share


def test_cores_near_the_gpu_are_taken_where_the_machine_names_them(tmp_path):
    allowed = sorted(os.sched_getaffinity(0))
    (tmp_path / "node1").mkdir()
    (tmp_path / "node1" / "cpulist").write_text(f"{allowed[0]},4000-4003\n")
    assert own_cores(1, nodes=tmp_path) == ({allowed[0]}, "cores of NUMA node 1")
    assert own_cores(2, nodes=tmp_path) == (set(allowed), "cores")  # of which it says nothing


def test_the_plan_says_where_the_number_comes_from(monkeypatch):
    assert plan_host_threads(3) == HostThreads(3, own_cores()[0], "optimizer.optimizer_cpu_num_threads")
    monkeypatch.setattr(host_threads, "is_simulated", lambda: True)
    assert plan_host_threads(None) is None
    monkeypatch.setattr(host_threads, "is_simulated", lambda: False)
    num_cores = len(own_cores()[0])
    plan = plan_host_threads(None)
    assert 1 <= plan.count <= num_cores and plan.reason == f"{num_cores} cores, shared by 1 rank on this machine"


def test_the_step_alone_has_them():
    seen = []

    class Spy(torch.optim.SGD):
        def step(self, closure=None):
            seen.append((torch.get_num_threads(), os.sched_getaffinity(0)))

    optimizer = Spy([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    cores = frozenset(sorted(os.sched_getaffinity(0))[:1])
    before = torch.get_num_threads(), os.sched_getaffinity(0)
    step_with(optimizer, HostThreads(3, cores, "asked for"))
    optimizer.step()
    optimizer.step()
    assert seen == [(3, cores)] * 2
    assert (torch.get_num_threads(), os.sched_getaffinity(0)) == before


@pytest.mark.parametrize("count", [2, 3, 7])
def test_the_bits_are_those_of_one_thread(count):
    def stepped(threads):
        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in (100_003, 17, 4096)]
        optimizer = torch.optim.AdamW(params, lr=1e-3, fused=True)
        step_with(optimizer, HostThreads(threads, own_cores()[0], ""))
        for _ in range(3):
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator)
            optimizer.step()
        return [*params, *(state["exp_avg_sq"] for state in optimizer.state.values())]

    assert all(map(torch.equal, stepped(1), stepped(count)))
