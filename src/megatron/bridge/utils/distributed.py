# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Process groups, ranks, seeds, and errors that end all ranks together."""

import contextlib
import datetime
import math
import os
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from megatron.bridge.utils.device import DeviceChoice, current_device, enter_device
from megatron.bridge.utils.parallel_sizes import dense_factors, expert_factors, in_words
from megatron.bridge.utils.rendezvous import is_shared_by_starts, store_of_this_start

T = TypeVar("T")

SECONDS_BETWEEN_MEETINGS = 10.0
"""Time between two collectives in `run_while_others_wait`: well below any timeout of a process group."""


def rank() -> int:
    """This process's global rank. Before the process group exists, torchrun's number, or 0."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """The number of processes. Before the process group exists, torchrun's number, or 1."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's number on its machine, as set by torchrun; else its global rank."""
    return int(os.environ.get("LOCAL_RANK", rank()))


def is_rank_0() -> bool:
    """Whether this is global rank 0, which logs and writes for all."""
    return rank() == 0


def barrier() -> None:
    """Wait for all ranks. Does nothing in a process without a process group."""
    if dist.is_initialized():
        if dist.get_backend() == "nccl":
            dist.barrier(device_ids=[current_device().index])
        else:
            dist.barrier()


def init_process_group(choice: DeviceChoice, timeout_minutes: float = 10) -> bool:
    """Enter the device and bring up the default process group.

    Under torchrun (RANK and WORLD_SIZE in the environment) its rendezvous is used; otherwise a group of one.

    Args:
        choice: Device and backend.
        timeout_minutes: Time after which a collective raises if another rank doesn't join it.

    Returns:
        Whether this call created the group (False: the caller's own group is used and stays the caller's).

    Raises:
        RuntimeError: Not all ranks joined within the timeout.
    """
    enter_device(choice)
    if dist.is_initialized():
        return False
    timeout = datetime.timedelta(minutes=timeout_minutes)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        try:
            _join_torchrun(choice.backend, timeout)
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {rank()} could not meet all {world_size()} ranks within {timeout_minutes:g} minutes "
                f"(dist.distributed_timeout_minutes): {str(error).splitlines()[0]}; see what ended the others, and "
                "start all again"
            ) from error
    else:
        dist.init_process_group(choice.backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    return True


def _join_torchrun(backend: str, timeout: datetime.timedelta) -> None:
    if not is_shared_by_starts():
        dist.init_process_group(backend, timeout=timeout)
        return
    store, own_rank, size = next(dist.rendezvous("env://", timeout=timeout))
    store = store_of_this_start(store, own_rank, size, timeout)
    dist.init_process_group(backend, store=store, rank=own_rank, world_size=size, timeout=timeout)


def initialize_model_parallel(
    tensor_model_parallel_size: int = 1, pipeline_model_parallel_size: int = 1, **options: Any
) -> None:
    """Build Megatron-Core's process groups.

    Args:
        tensor_model_parallel_size: Ranks that share each layer's matrices.
        pipeline_model_parallel_size: Ranks that share the stack of layers.
        options: The other arguments of Core's `initialize_model_parallel`.

    Raises:
        ValueError: The sizes don't divide the number of processes.
    """
    from megatron.core import parallel_state

    options["tensor_model_parallel_size"] = tensor_model_parallel_size
    options["pipeline_model_parallel_size"] = pipeline_model_parallel_size
    for factors in (dense_factors(options), expert_factors(options)):
        product = math.prod(factors.values())
        if world_size() % product:
            raise ValueError(
                f"{in_words(factors)} doesn't divide the {world_size()} processes: start a multiple of {product}"
            )
    parallel_state.initialize_model_parallel(**options)


def destroy_model_parallel() -> None:
    """Take down Megatron-Core's process groups, if there are any.

    Core only drops its references. The groups' sockets and threads would stay until the process ends.
    """
    from megatron.core import parallel_state

    groups = parallel_state._global_process_group_list or () if dist.is_initialized() else ()
    for group in dict.fromkeys(group for group in groups if group is not None):
        dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()


class CreatedGroups(NamedTuple):
    """What `bring_up_groups` created, and what its caller takes down, sooner or later."""

    process_group: bool
    model_parallel: bool


def bring_up_groups(
    choice: DeviceChoice, *, seed: int = 1234, timeout_minutes: float = 10, **sizes: Any
) -> CreatedGroups:
    """Bring up a process group and model-parallel state, seeded, where there are none.

    Args:
        choice: Device and backend.
        seed: For every random generator, if this creates the state.
        timeout_minutes: As for `init_process_group`.
        sizes: Arguments of `initialize_model_parallel`.

    Raises:
        ValueError: The sizes don't divide the number of processes. Nothing is left up.
    """
    from megatron.core import parallel_state

    created = CreatedGroups(init_process_group(choice, timeout_minutes), not parallel_state.is_initialized())
    try:
        if created.model_parallel:
            initialize_model_parallel(**sizes)
            seed_everything(seed)
    except Exception:
        take_down_groups(created)
        raise
    return created


def take_down_groups(created: CreatedGroups) -> None:
    """Take down what `bring_up_groups` created."""
    if created.model_parallel:
        destroy_model_parallel()
    if created.process_group:
        dist.destroy_process_group()


@contextlib.contextmanager
def model_parallel_groups(
    tensor_model_parallel_size: int = 1, pipeline_model_parallel_size: int = 1, **options: Any
) -> Iterator[None]:
    """A process group and model-parallel state for work outside a training run, such as a conversion.

    Existing ones are used. What this call creates is destroyed at the end.

    Args:
        tensor_model_parallel_size: Ranks that share each layer's matrices.
        pipeline_model_parallel_size: Ranks that share the stack of layers.
        options: Those of `bring_up_groups`. Without a `choice` this machine's device is taken.
    """
    choice = options.pop("choice", None)
    options["tensor_model_parallel_size"] = tensor_model_parallel_size
    options["pipeline_model_parallel_size"] = pipeline_model_parallel_size
    created = bring_up_groups(enter_device() if choice is None else choice, **options)
    try:
        yield
    finally:
        take_down_groups(created)


def seed_everything(seed: int, *, data_parallel_random_init: bool = False, **tracker_options: Any) -> None:
    """Seed Python, NumPy, torch and Megatron-Core's tracker, differently on ranks that need different random numbers.

    Pipeline stages differ by 100 (and data-parallel ranks by 10 with `data_parallel_random_init`), as in
    Megatron-LM's `_set_random_seed`, so that runs with the same seed initialise alike.

    Args:
        seed: 0 or more.
        data_parallel_random_init: Different random numbers on each data-parallel rank.
        tracker_options: Options of Core's `model_parallel_cuda_manual_seed`.

    Raises:
        ValueError: `seed` is negative.
    """
    from megatron.core import parallel_state, tensor_parallel

    if seed < 0:
        raise ValueError(f"rng.seed={seed}: expected 0 or a positive integer")
    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()
    if data_parallel_random_init:
        seed += 10 * parallel_state.get_data_parallel_rank()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, **tracker_options)


def all_gathered(value: Any) -> list[Any]:
    """The values of all ranks, in order of the ranks. Collective. In a single process, a list of its value."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def format_ranks(ranks: list[int]) -> str:
    """Ranks for the text of an error: "rank 3", "ranks 0, 2"; at most the first eight."""
    shown = ", ".join(map(str, ranks[:8])) + (", …" if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def any_rank(answer: bool) -> bool:
    """Whether a question is true on any rank. Collective; one small reduction."""
    if not dist.is_initialized() or world_size() == 1:
        return answer
    found = torch.tensor(int(answer), device=current_device())
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found.item())


@contextlib.contextmanager
def raise_on_all_ranks(doing: str) -> Iterator[None]:
    """If the body raises on any rank, raise on all ranks. Collective; the body itself must not run collectives.

    Without it, a rank that raises leaves the others waiting in their next collective until the timeout.

    Args:
        doing: What the body does, for the message on ranks that did not fail.

    Raises:
        Exception: On ranks where the body failed, its own error.
        RuntimeError: On all other ranks, with the text of the first error.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    messages = all_gathered(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for failed_rank, message in enumerate(messages):
        if message is not None:
            raise RuntimeError(f"{doing} failed on rank {failed_rank}: {message}")


def run_while_others_wait(work: Callable[[], T] | None, *, doing: str) -> T | None:
    """Do work on some ranks that may take longer than the timeout of collectives. Collective.

    The ranks meet in a short collective every few seconds until all are done. So no rank runs into the process group's
    timeout, and an error on one rank ends all.

    Args:
        work: This rank's part. It runs in a thread and must not run collectives. None: only wait.
        doing: What the work does, for the message on ranks that did not fail.

    Returns:
        The result of this rank's work.

    Raises:
        Exception: This rank's own error.
        RuntimeError: Another rank failed; has the text of the first error.
    """
    if not dist.is_initialized():
        return work() if work else None
    outcome: Future = Future()
    if work is None:
        outcome.set_result(None)
    else:
        threading.Thread(target=_settle, args=(outcome, work), daemon=True).start()
    while True:
        wait_for([outcome], timeout=SECONDS_BETWEEN_MEETINGS)
        error = outcome.exception() if outcome.done() else None
        states = all_gathered((outcome.done(), None if error is None else f"{type(error).__name__}: {error}"))
        if error is not None:
            raise error
        for failed_rank, (_, message) in enumerate(states):
            if message is not None:
                raise RuntimeError(f"{doing} failed on rank {failed_rank}: {message}")
        if all(is_done for is_done, _ in states):
            return outcome.result()


def _settle(outcome: Future, work: Callable[[], Any]) -> None:
    try:
        outcome.set_result(work())
    except BaseException as error:  # anything that ends the thread must also end the wait for it
        outcome.set_exception(error)
