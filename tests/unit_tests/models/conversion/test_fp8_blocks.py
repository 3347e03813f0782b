# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
import json

import pytest
import torch
from safetensors.torch import save_file

from megatron.bridge.models.conversion.fp8_blocks import WHOLE_TENSOR, block_size, dequantized
from megatron.bridge.models.conversion.hf_weights import INDEX_FILE, HFWeights, names_of_tensors

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [4, 8], "activation_scheme": "dynamic"}


@pytest.fixture
def quantized():
    """A weight whose sizes are no multiples of the blocks', and its scales."""
    torch.manual_seed(0)
    return torch.randn(10, 19).to(torch.float8_e4m3fn), torch.rand(3, 3) + 0.5


def by_hand(weight, scales):
    values = [[float(weight[r, c]) * float(scales[r // 4, c // 8]) for c in range(19)] for r in range(10)]
    return torch.tensor(values, dtype=torch.float64).float().bfloat16()


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        (None, None),
        (FP8, (4, 8)),
        ({**FP8, "weight_block_size": None}, WHOLE_TENSOR),
        ({"quant_method": "fp8"}, None),
        ({**FP8, "weight_block_size": [128]}, None),
        ({"quant_method": "mxfp4"}, None),
    ],
)
def test_block_size(quantization, expected):
    assert block_size(quantization) == expected


def test_each_block_has_its_scale(quantized):
    found = dequantized(*quantized, block=(4, 8), name="w")
    assert found.dtype is torch.bfloat16 and torch.equal(found, by_hand(*quantized))


def test_one_scale_of_a_weight_is_taken_as_by_transformers(tmp_path):
    """Ministral 3's files, in which layers have a scale of their inputs beside it."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight = torch.randn(10, 19, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    scale = torch.tensor(0.0173)
    names = {"up.weight": weight, "up.weight_scale_inv": scale}
    names |= {name: torch.ones(()) for name in ("up.activation_scale", "activation_scale")}
    save_file(names, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {**FP8, "weight_block_size": None}}))
    weights = HFWeights(tmp_path)
    assert set(weights.files) == {"up.weight", "activation_scale"} == names_of_tensors(tmp_path)
    expected = Fp8Dequantize(None)._dequantize_one(weight, scale.reshape(1, 1), torch.bfloat16)
    assert weights.dtype("up.weight") == "BF16" and torch.equal(weights.read("up.weight"), expected)
    with pytest.raises(ValueError, match=r"has shape \(2, 1\) for a weight of \(10, 19\).*expected \(1, 1\)"):
        dequantized(weight, torch.ones(2, 1), block=WHOLE_TENSOR, name="up.weight")


def test_scales_that_do_not_fit_are_refused(quantized):
    with pytest.raises(ValueError, match=r"'w_scale_inv' has shape \(3, 3\) for a weight of \(10, 19\)"):
        dequantized(*quantized, block=(4, 4), name="w")


def test_weights_are_read_in_bf16_and_scales_are_none(tmp_path, quantized):
    weight, scales = quantized
    save_file({"w": weight, "w_scale_inv": scales, "norm": torch.ones(3)}, tmp_path / "model.safetensors")
    assert set(HFWeights(tmp_path).files) == {"w", "w_scale_inv", "norm"}, "config.json doesn't speak of them"
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": FP8}))
    weights = HFWeights(tmp_path)
    assert set(weights.files) == {"w", "norm"} == names_of_tensors(tmp_path)
    assert (weights.dtype("w"), weights.dtype("norm"), weights.shape("w")) == ("BF16", "F32", (10, 19))
    assert torch.equal(weights.read("w"), by_hand(weight, scales))
    (tmp_path / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(("w", "w_scale_inv", "norm"), "model-1.safetensors")}
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    assert names_of_tensors(tmp_path) == {"w", "norm"}
