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


@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
def test_weights_that_count_from_1(normalization):
    """A weight w does what 1 + w does in the plain norm; it starts at 0, so that nothing is scaled."""
    config = config_with(normalization=normalization)
    plain = TorchNorm(config=config, hidden_size=8)
    config.layernorm_zero_centered_gamma = True
    config.params_dtype = torch.bfloat16
    norm = TorchNorm(config=config, hidden_size=8)
    x = torch.randn(3, 8, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(norm(x), plain(x.float()).bfloat16())
    with torch.no_grad():
        for parameter, of_plain in zip(norm.parameters(), plain.parameters(), strict=True):
            parameter.copy_(torch.arange(-4, 4) / 2)
            of_plain.copy_(parameter + 1.0 if of_plain is plain.weight else parameter)
    assert torch.equal(norm(x), plain(x.float()).bfloat16()) and norm.weight.dtype is torch.bfloat16


def test_what_torch_lacks_is_refused():
    config = config_with()
    config.normalization = "NoNorm"
    with pytest.raises(ValueError, match=r"normalization='NoNorm'.*\['LayerNorm', 'RMSNorm'\]"):
        TorchNorm(config=config, hidden_size=8)
