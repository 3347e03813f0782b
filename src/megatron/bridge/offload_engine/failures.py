# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""An error of an offloaded step ends all ranks, not only the one on whose host it came up.

A rank that raised at once would leave the others waiting where weights are gathered. So its error is remembered until
Core's step is over, and then raised on all ranks. Steps that overlap have a way of their own (`overlap/connect.py`).
"""

from collections.abc import Sequence
from typing import Any

from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer

from megatron.bridge.offload_engine.mixins import mix_in
from megatron.bridge.utils.distributed import any_rank, raise_on_all_ranks


class RemembersFailure(HybridDeviceOptimizer):
    """Override that remembers an error of a step of the chain; an instance changes its class to it.

    Whoever steps without the chain, as Core does to create state, gets the error at once: nobody else would raise it.
    """

    failure: Exception | None = None
    is_remembering = False
    """Whether the chain is stepping."""

    def _try_step(self, closure: Any = None) -> Any:
        try:
            return super().step(closure)
        except Exception as failure:
            if not self.is_remembering:
                raise
            self.failure = failure

    step: Any = _try_step
    step.hooked = True  # torch runs hooks of a step in the one that is overridden


class RaisesOnAllRanks(ChainedOptimizer):
    """Override that raises what an offloaded optimizer remembers; a chain changes its class to it."""

    offloaded: Sequence[Any] = ()
    """Those that remember their failures; none on a rank without trained parameters."""

    def step(self) -> Any:
        """Core's step. Collective.

        Raises:
            Exception: The step on the host failed, here or on another rank. Raised on all ranks.
        """
        for hybrid in self.offloaded:
            hybrid.failure, hybrid.is_remembering = None, True  # a step that is skipped has no failure
        try:
            done = super().step()
        finally:
            for hybrid in self.offloaded:
                hybrid.is_remembering = False
        failure = next((hybrid.failure for hybrid in self.offloaded if hybrid.failure is not None), None)
        if any_rank(failure is not None):
            with raise_on_all_ranks("the optimizer's step on the host"):
                if failure is not None:
                    raise failure
        return done


def end_all_ranks_together(chain: Any, hybrids: Sequence[Any]) -> None:
    """Let an error of an offloaded step end all ranks. Call on all of them.

    Args:
        chain: From Core.
        hybrids: The hybrid optimizers in it, already built and repaired.
    """
    for hybrid in hybrids:
        mix_in(hybrid, RemembersFailure)
    mix_in(chain, RaisesOnAllRanks)
    chain.offloaded = hybrids
