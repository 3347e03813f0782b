# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Let experts of Core's local layers add their biases in training.

`megatron/core/transformer/mlp.py` adds an expert's output bias in place. Without expert parallelism the output has
passed a collective of one rank, whose result is a view, and torch forbids to change it in place where gradients are
needed. Core 0.16.1 and 0.19.2 have this.
"""

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear


def leave_communication_to_dispatcher(model: torch.nn.Module) -> None:
    """Let no layer of an expert that one rank holds whole exchange what it computes, as with expert parallelism.

    Args:
        model: A bare chunk whose experts aren't shared by tensor-parallel ranks.
    """
    for module in model.modules():
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear)) and module.is_expert:
            module.explicit_expert_comm = True
