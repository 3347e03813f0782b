# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What an adapter sees of Transformer Engine's layers, which are known by their names and attributes."""

from types import SimpleNamespace

import pytest
import torch

from megatron.bridge.models.torch_norm import ZeroCenteredRMSNorm
from megatron.bridge.peft.adapted_linear import merge_adapter
from megatron.bridge.peft.dora import DoRA
from megatron.bridge.peft.grouped_experts import experts_of
from megatron.bridge.peft.linear_layout import linear_layout
from megatron.bridge.peft.lora import LoRA


class TELayerNormColumnParallelLinear(torch.nn.Linear):
    """The attributes of Core's class of this name that are read, as Transformer Engine sets them."""

    def __init__(self, *, normalization: str, zero_centered_gamma: bool) -> None:
        super().__init__(8, 4)
        self.normalization, self.zero_centered_gamma, self.eps = normalization, zero_centered_gamma, 1e-5
        self.layer_norm_weight = torch.nn.Parameter(torch.rand(8))
        self.layer_norm_bias = torch.nn.Parameter(torch.rand(8)) if normalization == "LayerNorm" else None
        self._tp_group = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
        self.sequence_parallel, self.use_bias, self.te_return_bias = False, True, False
        self.config = SimpleNamespace(gated_linear_unit=True, moe_shared_expert_overlap=False)


@pytest.mark.parametrize("zero_centered_gamma", [False, True])
@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
def test_the_adapter_gets_what_the_matrix_gets(normalization, zero_centered_gamma):
    linear = TELayerNormColumnParallelLinear(normalization=normalization, zero_centered_gamma=zero_centered_gamma)
    layout = linear_layout(linear, "decoder.layers.0.mlp.linear_fc1")
    x = torch.randn(5, 2, 8)
    norm = torch.nn.RMSNorm(8, eps=1e-5) if normalization == "RMSNorm" else torch.nn.LayerNorm(8, eps=1e-5)
    with torch.no_grad():
        norm.weight.copy_(linear.layer_norm_weight + zero_centered_gamma)
        if normalization == "LayerNorm":
            norm.bias.copy_(linear.layer_norm_bias)
    torch.testing.assert_close(layout.normalized(x), norm(x))
    assert (layout.split, layout.is_gated, layout.adds_bias, layout.is_cut) == ("output", True, True, False)


def test_a_16_bit_weight_that_counts_from_0_keeps_its_bits():
    linear = TELayerNormColumnParallelLinear(normalization="RMSNorm", zero_centered_gamma=True).bfloat16()
    with torch.no_grad():
        linear.layer_norm_weight.uniform_(-0.01, 0.01)
    norm = ZeroCenteredRMSNorm(8, eps=1e-5).bfloat16()
    norm.load_state_dict({"weight": linear.layer_norm_weight})
    x = torch.randn(50, 2, 8).bfloat16()
    expected = norm(x)
    found = linear_layout(linear, "decoder.layers.0.mlp.linear_fc1").normalized(x)
    assert found.dtype is torch.bfloat16 and (found == expected).double().mean() > 0.99


def test_other_modules_are_refused():
    with pytest.raises(ValueError, match="matches decoder.x, which is a Linear: expected one of ColumnParallelLinear"):
        linear_layout(torch.nn.Linear(2, 2), "decoder.x")


class TEColumnParallelGroupedLinear(torch.nn.Module):
    """The attributes of Core's class of this name that are read, with the matrices of two experts."""

    def __init__(self, *, single_grouped_weight: bool = False, **options: bool) -> None:
        super().__init__()
        self.num_gemms, self.use_bias, self.te_return_bias = 2, False, False
        self._tp_group = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
        self._pg_collection = SimpleNamespace(ep=SimpleNamespace(size=lambda: 2, rank=lambda: 1))
        self.config = SimpleNamespace(gated_linear_unit=True, tensor_model_parallel_size=1, **options)
        for name in ("weight",) if single_grouped_weight else ("weight0", "weight1"):
            self.register_parameter(name, torch.nn.Parameter(torch.randn(6, 4)))

    def forward(self, x, m_splits):
        return torch.cat([x[: m_splits[0]] @ self.weight0.T, x[m_splits[0] :] @ self.weight1.T]), None


GROUPED = "decoder.layers.0.mlp.experts.linear_fc1"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"single_grouped_weight": True}, r"one for each expert \(model\.moe_single_grouped_weight=false\)"),
        ({"use_transformer_engine_op_fuser": True}, r"\(model\.use_transformer_engine_op_fuser=false\)"),
    ],
)
def test_experts_whose_layer_is_not_called_with_matrices_are_refused(options, message):
    first = next(iter(experts_of(TEColumnParallelGroupedLinear(**options), GROUPED).items()))
    with pytest.raises(ValueError, match=message):
        linear_layout(first[1], first[0])


def test_an_expert_of_a_group_has_the_name_of_a_module_of_its_own():
    experts = experts_of(TEColumnParallelGroupedLinear(), GROUPED)
    assert list(experts) == [f"decoder.layers.0.mlp.experts.local_experts.{number}.linear_fc1" for number in (2, 3)]
    layout = linear_layout(*reversed(list(experts.items())[0]))
    assert (layout.split, layout.is_gated, layout.adds_bias, layout.is_bare) == ("output", True, False, False)


def test_an_expert_of_a_group_has_its_own_update_and_no_tokens_are_well():
    """Also without tokens for an expert, and with their numbers in a tensor."""
    grouped = TEColumnParallelGroupedLinear()
    lora = LoRA(dim=2, target_modules=["*.local_experts.3.*"], lora_B_init_method="normal")
    lora._matched, lora._experts = set(), {}
    before, (x, splits) = grouped, (torch.randn(5, 4), [3, 2])
    expected = grouped(x, splits)[0]
    lora.transform(grouped, name="linear_fc1", prefix=GROUPED.rpartition(".")[0])
    assert before is grouped and [name for name, _ in grouped.adapter.items()] == ["1"]
    update = torch.stack([one.merged() - one.linear.weight for one in grouped.adapted_weights().values()])[0]
    assert update.abs().max() > 1e-3
    expected[3:] += x[3:] @ update.detach().T
    torch.testing.assert_close(grouped(x, splits)[0], expected)
    assert grouped(x[:3], [3, 0])[0].shape == (3, 6)
    merge_adapter(grouped)
    assert type(grouped) is TEColumnParallelGroupedLinear
    torch.testing.assert_close(grouped(x, splits)[0], expected)


@pytest.mark.parametrize("kind", [LoRA, DoRA])
def test_a_target_without_a_weight_is_refused_by_name(kind):
    expected = "peft.target_modules matches decoder.layers.0.self_attention.core_attention, which is a Identity"
    with pytest.raises(ValueError, match=expected):
        kind().adapter_for(torch.nn.Identity(), "decoder.layers.0.self_attention.core_attention")


class ColumnParallelLinear(torch.nn.Linear):
    """The attributes of Core's class of this name that are read, on two ranks."""

    def __init__(self, *, tensor_model_parallel_size: int) -> None:
        super().__init__(8, 4)
        self.tp_group = SimpleNamespace(size=lambda: 2, rank=lambda: 0)
        self.gather_output, self.sequence_parallel, self.skip_bias_add = False, True, True
        self.config = SimpleNamespace(
            gated_linear_unit=True,
            moe_shared_expert_overlap=True,
            tensor_model_parallel_size=tensor_model_parallel_size,
        )


@pytest.mark.parametrize(
    ("place", "is_bare"), [("experts.local_experts.0", True), ("shared_experts", True), ("mlp", False)]
)
def test_whether_the_activations_are_moved_by_the_caller(place, is_bare):
    layout = linear_layout(ColumnParallelLinear(tensor_model_parallel_size=2), f"decoder.layers.0.{place}.linear_fc1")
    assert (layout.is_bare, layout.sequence_parallel) == (is_bare, not is_bare)


def test_an_expert_on_other_ranks_than_tensor_parallelisms_is_refused():
    linear = ColumnParallelLinear(tensor_model_parallel_size=1)
    with pytest.raises(ValueError, match="an expert's on 2 ranks: expected model.expert_tensor_parallel_size=1, or"):
        linear_layout(linear, "decoder.layers.0.mlp.experts.local_experts.0.linear_fc1")
