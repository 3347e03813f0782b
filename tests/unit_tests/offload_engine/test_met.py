# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The report of what was met: times are read once the device has come to their events."""

from unittest import mock

import torch

from megatron.bridge.offload_engine import met
from tests.rigs.adversarial_streams import adversarial_streams
from tests.rigs.device_queues import HOST_FIRST
from tests.rigs.ranks import run_on_ranks


def _reported() -> list[str]:
    with adversarial_streams(HOST_FIRST), mock.patch.object(met.logger, "info") as info:
        param = torch.ones(2, device="cuda")
        param.grad = torch.ones_like(param)
        optimizer = torch.optim.SGD([param], lr=0.1)
        met.report_what_was_met([optimizer], mock.Mock(seconds=1.0))
        for _ in range(2 * (met.NOT_COUNTED + met.COUNTED)):
            optimizer.step()
    return [call.args[0] % call.args[1:] for call in info.call_args_list]


def test_times_are_read_once_the_device_is_there_and_once():
    (said,) = run_on_ranks(_reported, 1)
    assert len(said) == 1 and "predicted 1000 ms" in said[0] and "in steps 4 to 8" in said[0]
