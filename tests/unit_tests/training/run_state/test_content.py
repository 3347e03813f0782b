# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The state that a script builds to save it."""

from types import SimpleNamespace

import pytest

from megatron.bridge.training.config import CheckpointConfig
from megatron.bridge.training.run_state.content import generate_state_dict, sharding_metadata


class Part:
    """A chunk or an optimizer whose state says how it is sharded."""

    def sharded_state_dict(self, *weights, metadata, **options):
        return {"as": metadata.get("distrib_optim_sharding_type")} if weights else {}


@pytest.mark.parametrize("fully", [False, True])
def test_the_optimizer_is_in_the_format_that_the_checkpoint_names(fully):
    checkpoint = CheckpointConfig(dist_ckpt_optim_fully_reshardable=fully)
    content = generate_state_dict(checkpoint, [Part()], Part(), None, None)
    cfg = SimpleNamespace(checkpoint=checkpoint, ddp=SimpleNamespace(use_distributed_optimizer=True))
    named = sharding_metadata(cfg)["distrib_optim_sharding_type"]
    assert content["optimizer"] == {"as": named} == {"as": "fully_reshardable" if fully else "dp_reshardable"}
