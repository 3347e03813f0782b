# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
import pytest

from tests.rigs.ranks import run_on_ranks


def _failing_steps():
    """What steps of a hybrid optimizer and of its chain raise or return, before and after the host fails."""
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
    from megatron.core.optimizer.optimizer import ChainedOptimizer

    from megatron.bridge.offload_engine.failures import end_all_ranks_together
    from tests.rigs.hybrid_runs import hybrid_of, take_step

    class Chain(ChainedOptimizer):
        skips = False

        def step(self):
            if not self.skips:
                hybrid.step()
            return True

    def fail(*_):
        raise MemoryError("of the host")

    hybrid = hybrid_of(HybridDeviceOptimizer, aware=True, overlap=False)
    take_step(hybrid, 0)
    chain = Chain([])
    end_all_ranks_together(chain, [hybrid])
    hook = hybrid.cpu_optimizers[0].register_step_pre_hook(fail)
    said = []
    for step in (hybrid.step, chain.step, hybrid.step):
        try:
            step()
            said.append("nothing")
        except Exception as error:
            said.append(type(error).__name__)
    chain.skips = True
    said.append(chain.step())
    hook.remove()
    chain.skips = False
    said.append(chain.step())
    return said


@pytest.mark.any_core
def test_an_error_is_raised_at_once_without_the_chain_and_once_with_it():
    (said,) = run_on_ranks(_failing_steps, 1)
    assert said == ["MemoryError", "MemoryError", "MemoryError", True, True]
