# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Errors that end all ranks together, seeds, and process groups, on two real ranks."""

import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from megatron.bridge.utils import distributed
from megatron.bridge.utils.distributed import raise_on_all_ranks
from tests.rigs.ranks import run_on_ranks


def _raised_on_each_rank(failing_ranks):
    try:
        with raise_on_all_ranks("reading the data"):
            if dist.get_rank() in failing_ranks:
                raise KeyError(f"line {dist.get_rank()}")
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def _raised_in_each_case():
    return [_raised_on_each_rank(ranks) for ranks in ([], [0], [1], [0, 1])]


def test_an_error_on_one_rank_raises_on_all_and_names_the_rank():
    on_0, on_1 = run_on_ranks(_raised_in_each_case, 2)
    assert on_0[0] is None and on_1[0] is None
    assert on_0[1] == ("KeyError", "'line 0'")
    assert on_1[1] == ("RuntimeError", "reading the data failed on rank 0: KeyError: 'line 0'")
    assert on_0[2] == ("RuntimeError", "reading the data failed on rank 1: KeyError: 'line 1'")
    assert on_1[2] == ("KeyError", "'line 1'")
    assert on_0[3] == ("KeyError", "'line 0'") and on_1[3] == ("KeyError", "'line 1'"), "each its own"


def test_without_a_process_group_the_error_is_raised_as_it_is():
    assert not dist.is_initialized()
    with pytest.raises(KeyError, match="line 1"), raise_on_all_ranks("reading the data"):
        raise KeyError("line 1")


def _interrupted_rank():
    """What is no Exception, such as a keyboard interrupt, is not held up by a collective."""
    if dist.get_rank() == 1:
        with pytest.raises(KeyboardInterrupt), raise_on_all_ranks("waiting"):
            raise KeyboardInterrupt
    return True


def test_an_interrupt_is_not_held_up():
    assert run_on_ranks(_interrupted_rank, 2) == [True, True]


def _draws(tensor_parallel, pipeline_parallel, seed, **options):
    with distributed.model_parallel_groups(tensor_parallel, pipeline_parallel):
        distributed.seed_everything(seed, **options)
        return torch.rand(4).tolist()


def _draws_of_each_layout():
    return {
        "data parallel": _draws(1, 1, 5),
        "again": _draws(1, 1, 5),
        "another seed": _draws(1, 1, 6),
        "data parallel random init": _draws(1, 1, 5, data_parallel_random_init=True),
        "pipeline parallel": _draws(1, 2, 5),
    }


def test_ranks_draw_alike_exactly_where_they_must():
    on_0, on_1 = run_on_ranks(_draws_of_each_layout, 2)
    assert on_0["data parallel"] == on_1["data parallel"] == on_0["again"]
    assert on_0["another seed"] != on_0["data parallel"]
    assert on_0["data parallel random init"] != on_1["data parallel random init"]
    assert on_0["pipeline parallel"] != on_1["pipeline parallel"]


def _sizes_refused():
    messages = []
    for sizes in ((4, 1), (1, 4), (2, 2)):
        with pytest.raises(ValueError) as refusal:
            distributed.initialize_model_parallel(*sizes)
        messages.append(str(refusal.value))
    with distributed.model_parallel_groups(), pytest.raises(ValueError) as refusal:
        distributed.seed_everything(-1)
    return [*messages, str(refusal.value)]


def test_sizes_that_do_not_divide_the_ranks_are_refused():
    for tensor, pipeline, both, seed in run_on_ranks(_sizes_refused, 2):
        assert "tensor_model_parallel_size=4" in tensor and "doesn't divide the 2 processes" in tensor
        assert "pipeline_model_parallel_size=4" in pipeline
        assert "= 4 doesn't divide" in both
        assert seed == "rng.seed=-1: expected 0 or a positive integer"


def _groups_left_after_destroying():
    def count():
        return len(dist.distributed_c10d._world.pg_map)

    before = count()
    counts = []
    for _ in range(2):
        with distributed.model_parallel_groups(2, 1):
            counts.append(count())
        counts.append(count())
    return before, counts


def test_model_parallel_groups_are_closed_and_the_default_one_stays():
    for before, (first, after_first, second, after_second) in run_on_ranks(_groups_left_after_destroying, 2):
        assert first > before and second == first
        assert after_first == after_second == before


def test_outside_a_process_group_this_is_rank_0_of_1(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (distributed.rank(), distributed.world_size(), distributed.is_rank_0()) == (0, 1, True)
    distributed.barrier()
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert (distributed.rank(), distributed.world_size(), distributed.is_rank_0()) == (3, 8, False)


_MEET = """
from megatron.bridge.utils.device import choose_device
from megatron.bridge.utils.distributed import init_process_group
init_process_group(choose_device("cpu"), timeout_minutes=0.03)
"""


@pytest.mark.any_core
def test_a_rank_whose_partner_never_comes_ends_within_the_timeout():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    alone = []
    for rank in ("0", "1"):
        # Each looks for its partner at a place of its own, where none is.
        meeting_point = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port if rank == "0" else "1"}
        environment = {**os.environ, "RANK": rank, "WORLD_SIZE": "2", **meeting_point}
        alone.append(subprocess.Popen([sys.executable, "-c", _MEET], env=environment, stderr=subprocess.PIPE))
    for rank, process in enumerate(alone):
        _, errors = process.communicate(timeout=300)
        last_line = errors.decode().strip().splitlines()[-1]
        assert process.returncode == 1
        assert f"RuntimeError: rank {rank} could not meet all 2 ranks within 0.03 minutes" in last_line
        assert "dist.distributed_timeout_minutes" in last_line and last_line.endswith("and start all again")
