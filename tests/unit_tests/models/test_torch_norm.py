# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch
from megatron.core.transformer import TransformerConfig

from megatron.bridge.models.torch_norm import TorchNorm


def config_with(**fields):
    return TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2, **fields)


@pytest.mark.parametrize(
    ("normalization", "norm_class"), [("RMSNorm", torch.nn.RMSNorm), ("LayerNorm", torch.nn.LayerNorm)]
)
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_norm_of_that_name_marked_for_sequence_parallelism(normalization, norm_class, sequence_parallel):
    config = config_with(
        normalization=normalization,
        sequence_parallel=sequence_parallel,
        tensor_model_parallel_size=2,
        params_dtype=torch.bfloat16,
    )
    norm = TorchNorm(config=config, hidden_size=8, eps=1e-3)
    assert type(norm) is norm_class and norm.eps == 1e-3
    assert norm.weight.dtype is torch.bfloat16
    assert all(parameter.sequence_parallel is sequence_parallel for parameter in norm.parameters())


def test_what_torch_lacks_is_refused():
    with pytest.raises(ValueError, match="layernorm_zero_centered_gamma=True needs Transformer Engine"):
        TorchNorm(config=config_with(layernorm_zero_centered_gamma=True), hidden_size=8)
    config = config_with()
    config.normalization = "NoNorm"
    with pytest.raises(ValueError, match=r"normalization='NoNorm'.*\['LayerNorm', 'RMSNorm'\]"):
        TorchNorm(config=config, hidden_size=8)
