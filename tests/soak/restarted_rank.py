# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""One rank of a run of `tests.soak.rank` under torchrun: rank 1 kills itself once."""

import os
import signal
import sys
from pathlib import Path

import torch

from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain
from megatron.bridge.utils.distributed import rank
from tests.soak.rank import Log, soak_config

KILLED_AT = 5


class KillOnce(Callback):
    """SIGKILL at a step, the first time."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def on_train_step_end(self, context: CallbackContext) -> None:
        if rank() == 1 and context.state.train_state.step == KILLED_AT and not self.flag.exists():
            self.flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    torch.set_num_threads(1)
    directory = Path(sys.argv[1])
    cfg = soak_config(str(directory), dist={"device": "cpu"}, train={"exit_signal_handler": True})
    callbacks = [Log(directory / f"losses_{rank()}.txt"), KillOnce(directory / "killed")]
    pretrain(cfg, forward_step, callbacks=callbacks)
