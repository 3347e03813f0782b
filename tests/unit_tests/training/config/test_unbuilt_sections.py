# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Sections that only Megatron Bridge has."""

import pytest

from megatron.bridge.training import config


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("FaultToleranceConfig", "ft: .*restart the job from its newest checkpoint"),
        ("InProcessRestartConfig", "inprocess_restart: .*restart the job from its newest checkpoint"),
        ("NVRxStragglerDetectionConfig", "nvrx_straggler: .*leave it out"),
        ("StragglerDetectionConfig", "straggler: .*leave it out"),
        ("TensorInspectConfig", "tensor_inspect: .*leave it out"),
    ],
)
def test_making_one_says_what_to_do_instead(name, says):
    with pytest.raises(ValueError, match=says):
        getattr(config, name)(enabled=True)
