# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What `tests.soak` does things to: one rank of its run, and an export; real processes, forked from a warm server.

`disk_fills_up` and `clock_jumps` are troubles that happen inside a rank.
"""

import ctypes
import errno
import faulthandler
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron.bridge.models.conversion import hf_directory  # noqa: F401  what an export imports, imported once
from megatron.bridge.models.conversion.auto_bridge import AutoBridge
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain
from megatron.bridge.utils.device import choose_device, enter_device
from tests.rigs.tiny import VOCAB_SIZE, tiny_config

STEPS = 14
RANKS = 2

HF_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
"""The tiny run's model, as Hugging Face names it."""


class Log(Callback):
    """Writes each step's loss down before the next one starts, so that a killed run's are known too."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_start(self, context: CallbackContext) -> None:
        print(f"train from step {context.state.train_state.step} at {time.monotonic()}", flush=True)

    def on_train_step_end(self, context: CallbackContext) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(f"{context.state.train_state.step} {context.loss_dict['lm loss'].hex()}\n")


def train_one_rank(
    directory: str,
    attempt: int,
    rank: int,
    sections: dict[str, dict[str, Any]],
    forward_step_func: Callable = forward_step,
    trouble: Callable[[int], None] | None = None,
) -> None:
    """Train on from what `directory` holds to the last step, with an optimizer half of which is offloaded.

    Args:
        directory: Of the run: checkpoints, logs, the meeting point of the ranks.
        attempt: How many times the run was started before.
        rank: This process's.
        sections: Fields of the configuration's sections that aren't as usual.
        forward_step_func: One micro-batch forward.
        trouble: Called with the rank before anything else.
    """
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_RANK=str(rank))
    _enter(f"{directory}/errors_{rank}.txt")
    if trouble is not None:
        trouble(rank)
    choice = enter_device(choose_device("cpu"))
    meeting_point = f"file://{directory}/store_{attempt}"
    dist.init_process_group(choice.backend, init_method=meeting_point, rank=rank, world_size=RANKS)
    log = Log(Path(directory, f"losses_{rank}.txt"))
    pretrain(soak_config(directory, **sections), forward_step_func, callbacks=[log])
    dist.destroy_process_group()


def export(directory: str, target: str) -> None:
    """Write the newest checkpoint of a run as a Hugging Face directory, as `megatron.bridge.convert export` does."""
    _enter(f"{directory}/errors_export.txt")
    enter_device(choose_device("cpu"))
    AutoBridge.from_hf_config(HF_CONFIG).export_ckpt(f"{directory}/checkpoints", target, show_progress=False)


def _enter(log: str) -> None:
    """What each process begins with: its log, one thread, and no more rights than any user has."""
    os.environ["OMP_NUM_THREADS"] = "1"
    errors = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(errors, 1)
    os.dup2(errors, 2)
    faulthandler.register(signal.SIGUSR1)  # where it hangs, if it does
    torch.set_num_threads(1)
    if os.geteuid() == 0:
        obey_permissions()


def soak_config(directory: str, **sections: dict[str, Any]) -> Any:
    """A run that saves every second step and resumes by itself, with an optimizer half of which is offloaded."""
    checkpoint = {"load": f"{directory}/checkpoints", "save_interval": 2, "most_recent_k": 2}
    return tiny_config(
        directory,
        train_iters=STEPS,
        model={"hidden_dropout": 0.1},  # makes the random states matter
        optimizer={"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5},
        checkpoint={**checkpoint, **sections.pop("checkpoint", {})},
        **sections,
    )


class _CapabilityHeader(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


def obey_permissions() -> None:
    """Let this process, which is root's, be refused as any other: give up CAP_DAC_OVERRIDE (capabilities(7))."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = _CapabilityHeader(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; then the same of capabilities 32 to 63
    if libc.capget(ctypes.byref(header), sets) != 0:
        raise OSError(ctypes.get_errno(), "capget")
    sets[0] &= ~(1 << 1)
    if libc.capset(ctypes.byref(header), sets) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def disk_fills_up(rank: int, *, root: str, victim: int, after: int) -> None:
    """From a moment on, a rank finds no space for a new file or directory below `root`.

    What Python opens by name leads to /dev/full, where the system takes the open and refuses each byte; what must be
    created (`mkstemp`, `mkdir`) is refused at once.

    Args:
        rank: Of this process.
        root: Directory.
        victim: The rank whose disk fills up.
        after: Files and directories that there is still space for.
    """
    made = 0

    def refuse(event: str, arguments: tuple) -> None:
        nonlocal made
        if event not in ("open", "os.mkdir") or not str(arguments[0]).startswith(root):
            return
        path, mode, flags = arguments if event == "open" else (arguments[0], None, os.O_CREAT | os.O_RDWR)
        if not flags & (os.O_WRONLY | os.O_RDWR):
            return
        made += 1
        if made <= after:
            return
        if mode is None or os.path.lexists(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        os.symlink("/dev/full", path)

    if rank == victim:
        sys.addaudithook(refuse)


def clock_jumps(rank: int, *, hours: float, seed: int) -> None:
    """Every few times that a rank asks Python for the time of day, it is up to `hours` later than before; or earlier.

    Args:
        rank: Of this process: the ranks' clocks don't agree.
        hours: Negative: the clock goes back.
        seed: Of the jumps.
    """
    choose, seconds, nanoseconds, offset = random.Random(seed + rank), time.time, time.time_ns, 0.0

    def jumped() -> float:
        nonlocal offset
        if choose.random() < 0.1:
            offset += choose.uniform(0, 3600 * hours)
        return offset

    time.time = lambda: seconds() + jumped()
    time.time_ns = lambda: nanoseconds() + int(1e9 * jumped())
