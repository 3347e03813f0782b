# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""SIGINT, which Ctrl-C sends to all ranks, ends a run at once: one line, no traceback, an exit code of its own."""

import contextlib
import logging
from collections.abc import Iterator

from megatron.bridge.checkpoint import iterations
from megatron.bridge.training.config import CheckpointConfig
from megatron.bridge.utils.distributed import is_rank_0
from megatron.bridge.utils.exit_codes import INTERRUPTED

logger = logging.getLogger(__name__)


class Interrupted(SystemExit, KeyboardInterrupt):
    """SIGINT ended the run. A script that doesn't catch it ends with `exit_codes.INTERRUPTED` and without a traceback.

    A script that catches KeyboardInterrupt catches it as before.
    """

    def __init__(self) -> None:
        super().__init__(INTERRUPTED)


@contextlib.contextmanager
def ended_by_interrupt(config: CheckpointConfig) -> Iterator[None]:
    """Turn the KeyboardInterrupt of a run into `Interrupted`. Rank 0 says what is saved.

    No rank waits for another: each ends where it is. A save that isn't complete counts for nothing, wherever it stops.

    Args:
        config: Where the run saves.

    Raises:
        Interrupted: In place of a KeyboardInterrupt.
    """
    try:
        yield
    except Interrupted:
        raise
    except KeyboardInterrupt:
        if is_rank_0():
            logger.warning("interrupted by SIGINT: %s; exit code %d", _what_is_saved(config), INTERRUPTED)
        raise Interrupted from None


def _what_is_saved(config: CheckpointConfig) -> str:
    tracker = None if config.save is None else iterations.read_tracker(config.save)
    if tracker is None or tracker.release:
        return "nothing was saved" + (" (checkpoint.save is not set)" if config.save is None else f" in {config.save}")
    return f"the newest checkpoint in {config.save} is of step {tracker.iteration}, and is what a resume continues from"
