# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Which of the ranks that share a copy of the model counts a parameter."""

import pytest
import torch

from megatron.bridge.training.monitoring import whole_model
from megatron.bridge.training.monitoring.whole_model import is_counted_here


@pytest.mark.parametrize("expert_tp_rank", [0, 1])
@pytest.mark.parametrize("is_cut", [True, False])
def test_what_all_tensor_parallel_ranks_of_an_expert_hold_counts_on_the_first(monkeypatch, expert_tp_rank, is_cut):
    monkeypatch.setattr(whole_model.mpu, "get_expert_tensor_parallel_rank", lambda: expert_tp_rank)
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.allreduce, parameter.tensor_model_parallel = False, is_cut
    assert is_counted_here(parameter) == (is_cut or expert_tp_rank == 0)
