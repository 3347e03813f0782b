# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The real SmolLM2-135M-Instruct: the logits of transformers, and every bit back."""

import os
from pathlib import Path

import pytest
import torch

from tests.functional_tests.test_conversion import LAYOUTS, logits_on_rank, roundtrip_on_rank
from tests.rigs.ranks import run_on_ranks
from tests.unit_tests.models.tiny_llama import hf_logits

DIRECTORY = Path(os.environ.get("SMOLLM2_DIR", Path(__file__).parents[2] / "data" / "smollm2-135m-instruct"))
TEXT = (
    "The history of the city begins in the early Middle Ages, when a small group of traders settled on the bank of the "
    "river. Over the following centuries the town grew rich from the trade in wool and salt."
)

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.skipif(
        not (DIRECTORY / "model.safetensors").is_file(),
        reason=f"{DIRECTORY} holds no model: fetch it with `make model`, or name its directory in SMOLLM2_DIR",
    ),
]


@pytest.mark.parametrize("layout", ["tp1", "pp2"])
def test_logits_are_those_of_transformers(layout):
    from tokenizers import Tokenizer

    tokens = torch.tensor([Tokenizer.from_file(str(DIRECTORY / "tokenizer.json")).encode(TEXT).ids])
    expected = hf_logits(DIRECTORY, tokens)
    fp32 = {**LAYOUTS[layout], "bf16": False, "params_dtype": torch.float32, "pipeline_dtype": torch.float32}
    outputs = run_on_ranks(logits_on_rank, 2 if layout == "pp2" else 1, DIRECTORY, fp32, tokens)
    (output,) = [torch.from_numpy(output) for output in outputs if output is not None]
    assert (output - expected).abs().max() < 1e-4
    loss = torch.nn.functional.cross_entropy(output[0, :-1], tokens[0, 1:])
    assert 2 < loss < 3  # random weights give 10.8


@pytest.mark.parametrize("layout", ["tp1", "pp2"])
def test_export_gives_back_every_bit(layout):
    for num_equal, differing in run_on_ranks(roundtrip_on_rank, 2, DIRECTORY, LAYOUTS[layout], False):
        assert differing == [] and num_equal == 272
