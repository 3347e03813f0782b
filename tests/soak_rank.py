# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""One rank of the run that `tests.soak` kills: a real process, forked from a server that has imported all of this."""

import faulthandler
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain
from megatron.bridge.utils.device import choose_device, enter_device
from tests.tiny import tiny_config

STEPS = 14
RANKS = 2


class Log(Callback):
    """Writes each step's loss down before the next one starts, so that a killed run's are known too."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_step_end(self, context: CallbackContext) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(f"{context.state.train_state.step} {context.loss_dict['lm loss'].hex()}\n")


def train_one_rank(
    directory: str,
    attempt: int,
    rank: int,
    sections: dict[str, dict[str, Any]],
    forward_step_func: Callable = forward_step,
) -> None:
    """Train on from what `directory` holds to the last step, with an optimizer half of which is offloaded.

    Args:
        directory: Of the run: checkpoints, logs, the meeting point of the ranks.
        attempt: How many times the run was started before.
        rank: This process's.
        sections: Fields of the configuration's sections that aren't as usual.
        forward_step_func: One micro-batch forward.
    """
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
    errors = os.open(f"{directory}/errors_{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(errors, 1)
    os.dup2(errors, 2)
    faulthandler.register(signal.SIGUSR1)  # where it hangs, if it does
    torch.set_num_threads(1)
    choice = enter_device(choose_device("cpu"))
    meeting_point = f"file://{directory}/store_{attempt}"
    dist.init_process_group(choice.backend, init_method=meeting_point, rank=rank, world_size=RANKS)
    log = Log(Path(directory, f"losses_{rank}.txt"))
    pretrain(soak_config(directory, **sections), forward_step_func, callbacks=[log])
    dist.destroy_process_group()


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
