# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A signal asks for a save and a stop (`train.exit_signal_handler`): all ranks stop at the same step boundary."""

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from megatron.bridge.training.config import TrainingConfig
from megatron.bridge.utils.device import current_device
from megatron.bridge.utils.distributed import raise_on_all_ranks, rank
from megatron.bridge.utils.exit_codes import PREEMPTED

logger = logging.getLogger(__name__)


class Preempted(SystemExit):
    """A signal stopped the run. Raised on all ranks once the last checkpoint is complete.

    A script that doesn't catch it ends with `exit_codes.PREEMPTED` and without a traceback.
    """

    def __init__(self, step: int) -> None:
        super().__init__(PREEMPTED)
        logger.info("stopped by a signal after step %d; exit code %d: started again, the run resumes", step, PREEMPTED)


class ExitSignal:
    """Whether a signal has asked the run to stop. It may arrive at any time, on any rank, more than once."""

    def __init__(self, signal_number: signal.Signals) -> None:
        self.name = signal.Signals(signal_number).name
        self._has_arrived = False

    def note(self, *_: Any) -> None:
        """The signal's handler."""
        self._has_arrived = True

    def has_arrived_anywhere(self) -> bool:
        """Whether it has arrived on any rank. Collective: all ranks get the same answer."""
        last_rank = torch.tensor(rank() if self._has_arrived else -1, device=current_device())
        dist.all_reduce(last_rank, op=dist.ReduceOp.MAX)
        if last_rank.item() >= 0:
            logger.info("%s has arrived on rank %d", self.name, last_rank.item())
        return last_rank.item() >= 0


@contextlib.contextmanager
def catch_exit_signal(train_config: TrainingConfig) -> Iterator[ExitSignal | None]:
    """Catch `train.exit_signal` within the context, on all ranks; yields None if the option is off.

    After a run that ends as `Preempted` the signal stays caught. Schedulers send it more than once, and a second one
    must not interrupt the process while it ends.

    Raises:
        ValueError: The run isn't in the main thread. Python delivers signals only there.
    """
    if not train_config.exit_signal_handler:
        yield None
        return
    with raise_on_all_ranks(f"catching {train_config.exit_signal.name}"):
        if threading.current_thread() is not threading.main_thread():
            raise ValueError(
                "train.exit_signal_handler=true in a thread: Python takes signals in the main thread alone; start the "
                "run there or set it to false"
            )
        exit_signal = ExitSignal(train_config.exit_signal)
        before = signal.signal(train_config.exit_signal, exit_signal.note)
    try:
        yield exit_signal
    except Preempted:
        raise
    except BaseException:
        signal.signal(train_config.exit_signal, before)
        raise
    signal.signal(train_config.exit_signal, before)
