# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The planned parts of a model are those that ranks build, and together they are the whole model."""

import numpy as np
import pytest

from megatron.bridge.planning.shards import as_table, plan_shards
from tests.functional_tests.test_memory_estimate import SIZES, _config
from tests.rigs.ranks import run_on_ranks

CUT = {"TP 2": "linear_proj.weight", "PP 2": "mlp.linear_fc2.weight", "EP 2": "experts.linear_fc2.weight"}
"""A weight of which each rank has a part of its own."""


def _built(case):
    """Bytes of all parameters of a rank's real model."""
    from megatron.bridge.training.config import runtime_config_update
    from megatron.bridge.training.initialize import destroy_global_state, initialize_megatron

    cfg = _config(case)
    runtime_config_update(cfg)
    groups = initialize_megatron(cfg)
    (model,) = cfg.model.provide_distributed_model(ddp_config=cfg.ddp, pg_collection=groups)
    num_bytes = sum(param.numel() * param.element_size() for param in model.parameters())
    destroy_global_state()
    return num_bytes


@pytest.mark.parametrize("case", CUT)
def test_parts_are_those_of_a_run_and_make_the_whole(case):
    planned = [plan_shards(_config(case), world_size=2, rank=rank) for rank in range(2)]
    for shards, num_bytes in zip(planned, run_on_ranks(_built, 2, case), strict=True):
        assert sum(shard.num_bytes for shard in shards) == num_bytes
        assert f"{len(shards)} weights" in as_table(shards).splitlines()[-1]

    covered = {}
    for shard in (shard for shards in planned for shard in shards):
        counts = covered.setdefault(shard.name, np.zeros(shard.whole, dtype=int))
        stacked = len(shard.whole) - len(shard.held)
        held = (1,) * stacked + shard.held
        counts[tuple(slice(begin, begin + size) for begin, size in zip(shard.begins_at, held, strict=True))] += 1
    assert all((counts >= 1).all() for counts in covered.values()), "a part that no rank has"
    cut = next(name for name in covered if name.endswith(CUT[case]))
    assert (covered[cut] == 1).all(), "a part that both ranks have"
    assert covered[cut].shape[0] == SIZES["num_layers"]
