# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Who saves and loads a run's checkpoints: a class that `checkpoint.custom_manager_class` can replace."""

import importlib.util
import sys
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from megatron.bridge.training.run_state.load_plan import LoadPlan


@dataclass
class CheckpointSaveContext:
    """What a save is of."""

    state: Any
    """The run's `GlobalState`; its train state has the step."""

    model: list[Any]
    """This rank's chunks."""

    optimizer: Any = None
    opt_param_scheduler: Any = None
    num_floating_point_operations_so_far: float = 0
    non_persistent_ckpt: bool = False
    """Whether the next such checkpoint replaces this one."""

    train_data_iterator: Any = None


@dataclass
class CheckpointLoadContext:
    """What is loaded into."""

    state: Any
    """The run's `GlobalState`."""

    model: list[Any]
    """This rank's chunks."""

    optimizer: Any = None
    opt_param_scheduler: Any = None
    strict: bool = True
    """Whether every tensor of the model must be in the checkpoint and fit."""

    skip_load_to_model_and_opt: bool = False
    plan: LoadPlan | None = None
    """What `setup` found to load, and why; None: the load looks for it itself."""


@runtime_checkable
class CheckpointManager(Protocol):
    """Saves and loads a run. The methods are called on all ranks."""

    def save(self, ctx: CheckpointSaveContext) -> Any:
        """Save the current step."""

    def load(self, ctx: CheckpointLoadContext) -> tuple[int, float]:
        """Load into model and optimizer, so that masters follow; returns the step and the operations so far."""

    def finalize_async_saves(self, state: Any, blocking: bool = False, terminate: bool = False) -> None:
        """Complete saves that all ranks have written; called after each step, and blocking before the run ends."""


def custom_manager_class(name: str) -> type:
    """The class that `checkpoint.custom_manager_class` names. Only what the run itself has imported is taken, so that
    reading a configuration runs no code.

    Raises:
        ValueError: There is none of this name, or it isn't a manager.
    """
    module, _, attribute = name.rpartition(".")
    found = getattr(sys.modules.get(module), attribute, None)
    if not isinstance(found, type):
        is_there = module and importlib.util.find_spec(module.partition(".")[0]) is not None
        raise ValueError(
            f"checkpoint.custom_manager_class={name!r}: no class of this name is imported; "
            f"{'import ' + module + ' in the script that starts the run' if is_there else 'name it as module.Class'}"
        )
    missing = [method for method in ("save", "load", "finalize_async_saves") if not hasattr(found, method)]
    if missing:
        raise ValueError(
            f"checkpoint.custom_manager_class={name!r} has no {missing[0]}(): expected the methods of CheckpointManager"
        )
    return found
