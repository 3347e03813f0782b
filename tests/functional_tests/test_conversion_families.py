# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Every family at every layout: Megatron computes what transformers computes, and gives back the bits it was given.

`tests/rigs/families.py` holds the tables. The cells are counted at the end of the test run.
"""

import pytest
import torch

from megatron.bridge import AutoBridge
from megatron.bridge.models.conversion.expert_stacks import open_weights
from megatron.bridge.models.conversion.hf_weights import HFWeights
from megatron.bridge.models.conversion.roundtrip import compare_with_files
from tests.rigs.families import CELLS, LAYOUTS, MODELS
from tests.rigs.ranks import run_on_ranks
from tests.unit_tests.models.tiny_llama import (
    hf_logits,
    megatron_logits,
    save_tiny_model,
    some_tokens,
    stack_experts,
)

LOGIT_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The directory of each model, its tokens and transformers' logits, made when first asked for."""
    root, made = tmp_path_factory.mktemp("families"), {}

    def of(name):
        if name not in made:
            model = MODELS[name]
            directory = save_tiny_model(root / name, model.architecture, **model.options)
            if model.is_stacked:
                stack_experts(directory)
            tokens = some_tokens(model.options.get("vocab_size", 96))
            made[name] = directory, tokens, hf_logits(directory, tokens)
        return made[name]

    return of


def weights_of(directory):
    """The tensors by the names of the family's table: experts that files keep in one tensor one by one."""
    return open_weights(directory, AutoBridge.from_hf_pretrained(directory).family.stacks_in_files)


def convert_on_rank(directory, sizes, tokens):
    """The logits of the model as it was loaded, and what became of each tensor after loading it again."""
    bridge = AutoBridge.from_hf_pretrained(directory)
    provider = bridge.to_megatron_provider()
    for name, value in sizes.items():
        setattr(provider, name, value)
    provider.initialize_model_parallel()
    chunks = provider.provide_distributed_model(wrap_with_ddp=False)
    logits = megatron_logits(chunks, tokens)
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.fill_(7)
    bridge.load_hf_weights(chunks, show_progress=False)
    results = compare_with_files(chunks, bridge.family, weights_of(directory), show_progress=False)
    return None if logits is None else logits.numpy(), results


@pytest.mark.parametrize(("model", "layout"), CELLS, ids=["-".join(cell).replace(" ", "_") for cell in CELLS])
def test_family_at_layout(model, layout, models, cell_counts):
    directory, tokens, expected = models(model)
    assert expected.std() > 0.1
    cell_counts.add(failed=1)
    per_rank = run_on_ranks(convert_on_rank, LAYOUTS[layout].num_ranks, directory, LAYOUTS[layout].sizes, tokens)
    vocab_size = expected.shape[-1]
    outputs = [torch.from_numpy(output) for output, _ in per_rank if output is not None]
    assert outputs
    for output in outputs:
        assert (output[..., :vocab_size] - expected).abs().max() < LOGIT_TOLERANCE
        assert (output[..., vocab_size:] == -1e4).all()
    names = sorted(weights_of(directory).files)
    for _, results in per_rank:
        assert [one for one in results if not one.is_equal] == []
        assert sorted(one.name for one in results) == names
    cell_counts.add(passed=1, failed=-1)


def through_a_checkpoint_on_rank(directory, root, model):
    """Import at one layout, export at another."""
    sizes = {"tensor_model_parallel_size": 2}
    sizes |= {"expert_tensor_parallel_size": 1} if model.has_biased_experts else {}
    AutoBridge.import_ckpt(directory, root / "megatron", show_progress=False, **sizes)
    sizes = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
    sizes = {} if model.is_on_one_stage else sizes
    AutoBridge.from_hf_pretrained(directory).export_ckpt(root / "megatron", root / "hf", False, **sizes)


def tensors_of(weights):
    return {name: weights.read(name) for name in weights.files}


@pytest.mark.parametrize("model", MODELS)
def test_family_through_a_checkpoint(model, models, tmp_path):
    """What the family's fields say survives `run_config.yaml`, and every bit of the weights."""
    directory, tokens, expected = models(model)
    run_on_ranks(through_a_checkpoint_on_rank, 2, directory, tmp_path, MODELS[model])
    source = weights_of(directory) if MODELS[model].is_stacked else HFWeights(directory)
    before, after = map(tensors_of, (source, HFWeights(tmp_path / "hf")))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(hf_logits(tmp_path / "hf", tokens), expected)


def in_bf16_on_rank(directory, root):
    AutoBridge.import_ckpt(directory, root / "megatron", show_progress=False)
    AutoBridge.from_hf_pretrained(directory).export_ckpt(root / "megatron", root / "hf", False, dtype="bfloat16")


def test_a_router_keeps_its_bias_in_fp32(models, tmp_path):
    """Rounded, it would choose other experts."""
    run_on_ranks(in_bf16_on_rank, 1, models("glm4_moe")[0], tmp_path)
    before, after = (tensors_of(HFWeights(directory)) for directory in (models("glm4_moe")[0], tmp_path / "hf"))
    biases = [name for name in before if name.endswith("e_score_correction_bias")]
    assert len(biases) == 3 and all(torch.equal(before[name], after[name]) for name in biases)
    assert all(after[name].dtype is torch.bfloat16 for name in after if name not in biases)
