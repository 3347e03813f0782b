# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What Megatron-Core says on every machine, each time, and nobody can act on: left out.

At its import Core warns, once in each of some five files, that Transformer Engine and Apex are not there and what it
does instead; and logs that what it is asked for is about to change, which is this package's to follow. That stands
before the first line of every command, on each rank. When an optimizer is built it logs all of its configuration in one
line, defaults too; `run_config.yaml` has it. Other warnings of Core's stay.
"""

import logging
import warnings

_NOT_INSTALLED = r"(Transformer Engine and Apex are|Transformer Engine is|Apex is) not installed\. Falling back to "
_OWN_DEFAULT = r"full scope is deprecated\. Use empty cuda_graph_"
"""Core warns so of its own default value."""

_EXPERIMENTAL = r"MimoModelConfig is experimental "
_LOGGED = {
    "megatron.core.rerun_state_machine": "RerunStateMachine initialized in mode ",
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "megatron.core.optimizer": "Setting up optimizer with config ",
    "megatron.core.distributed.distributed_data_parallel": "DistributedDataParallel: full_param_layout not provided",
}
"""By logger: how a record starts that is left out."""


def silence_import_warnings() -> None:
    """Add the filters; what a user's `-W`, PYTHONWARNINGS or own filters of warnings say goes first."""
    for message in (_NOT_INSTALLED, _OWN_DEFAULT, _EXPERIMENTAL):
        warnings.filterwarnings("ignore", message, UserWarning, r"megatron\.core\.", append=True)
    for name, start in _LOGGED.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _DropStartingWith) for known in logger.filters):
            logger.addFilter(_DropStartingWith(start))


class _DropStartingWith(logging.Filter):
    """Drops records that start with a text."""

    def __init__(self, start: str) -> None:
        super().__init__()
        self._start = start

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self._start)
