# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Silence warnings of Megatron-Core that appear in every run and that no user can act on.

When it is imported, Core warns in several files that Transformer Engine and Apex are missing and what it does instead.
It also logs deprecations of its interface, which concern this package and not its user. All that would precede the
output of every command, on each rank. When an optimizer is built, Core logs its whole configuration in one line;
`run_config.yaml` has it anyway. Torch warns that two collectives that Core calls are deprecated. Other warnings are
not changed.
"""

import logging
import warnings

_NOT_INSTALLED = r"(Transformer Engine and Apex are|Transformer Engine is|Apex is) not installed\. Falling back to "
_OWN_DEFAULT = r"full scope is deprecated\. Use empty cuda_graph_"
"""Core warns of its own default value."""

_EXPERIMENTAL = r"MimoModelConfig is experimental "
_COLLECTIVES = r"`torch\.distributed\.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated"
_LOGGED = {
    "megatron.core.rerun_state_machine": "RerunStateMachine initialized in mode ",
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "megatron.core.optimizer": "Setting up optimizer with config ",
    "megatron.core.distributed.distributed_data_parallel": "DistributedDataParallel: full_param_layout not provided",
}
"""By logger: the start of the records to drop."""


def silence_import_warnings() -> None:
    """Add the filters. A user's own filters (`-W`, PYTHONWARNINGS, `warnings.filterwarnings`) take precedence."""
    for message in (_NOT_INSTALLED, _OWN_DEFAULT, _EXPERIMENTAL):
        warnings.filterwarnings("ignore", message, UserWarning, r"megatron\.core\.", append=True)
    warnings.filterwarnings("ignore", _COLLECTIVES, FutureWarning, r"torch\.distributed\.", append=True)
    for name, start in _LOGGED.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _DropStartingWith) for known in logger.filters):
            logger.addFilter(_DropStartingWith(start))


class _DropStartingWith(logging.Filter):
    """Drops records whose message starts with a given text."""

    def __init__(self, start: str) -> None:
        super().__init__()
        self._start = start

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self._start)
