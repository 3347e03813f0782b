# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Gemma 3 from a Hugging Face directory through training, offload and a checkpoint to an export that says the same."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron.bridge import AutoBridge
from megatron.bridge.utils.simulated_accelerator import suspended
from tests.functional_tests.test_conversion_finetune import loss_of
from tests.rigs.families import MODELS
from tests.rigs.on_ranks import differing, run_finetune
from tests.rigs.ranks import run_on_ranks
from tests.rigs.tiny import SEQ_LENGTH, VOCAB_SIZE, tiny_config
from tests.unit_tests.models.tiny_llama import save_tiny_model

PROMPT, NEW_TOKENS = [5, 17, 40, 3, 88], 20
"""More than the window together."""


def _finetune(directory, *, offload, save):
    model = AutoBridge.from_hf_pretrained(directory / "hf").to_megatron_provider(load_weights=False)
    model.tensor_model_parallel_size, model.sequence_parallel = 2, True
    model.seq_length, model.calculate_per_token_loss = SEQ_LENGTH, True
    model.recompute_granularity, model.recompute_method, model.recompute_num_layers = "full", "uniform", 1
    cfg = tiny_config(
        directory,
        train_iters=3,
        optimizer={"optimizer_cpu_offload": offload, "optimizer_offload_fraction": 0.5, "lr": 5e-3},
        checkpoint={
            "pretrained_checkpoint": str(directory / "hf"),
            "save": str(directory / "megatron") if save else None,
        },
    )
    cfg.model = model
    return run_finetune(cfg)


def _train_and_export(directory):
    plain = _finetune(directory, offload=False, save=False)
    offloaded = _finetune(directory, offload=True, save=True)
    drift = differing(offloaded.weights_after, plain.weights_after)
    moved = [
        name for name in plain.weights_after if not torch.equal(plain.weights_before[name], plain.weights_after[name])
    ]
    norms = {name: weight for name, weight in plain.weights_after.items() if "norm" in name}
    bridge = AutoBridge.from_hf_pretrained(directory / "hf")
    bridge.export_ckpt(directory / "megatron", directory / "exported", False, dtype="float32")
    return plain.losses, offloaded.losses, drift, set(plain.weights_after) - set(moved), norms


def _generated(directory):
    from megatron.bridge.models.generation import generate_tokens, load_for_generation
    from megatron.bridge.utils.distributed import model_parallel_groups

    with model_parallel_groups(1, 2):
        model = load_for_generation(directory / "megatron", dtype="float32")
        return list(generate_tokens(model, PROMPT, max_new_tokens=NEW_TOKENS))


def _transformers(directory):
    with suspended():
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        ids = torch.tensor([PROMPT])
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None}
        return model.generate(ids, max_new_tokens=NEW_TOKENS, **options)[0, len(PROMPT) :].tolist()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("gemma3")
    model = MODELS["gemma3"]
    options = {**model.options, "vocab_size": VOCAB_SIZE, "initializer_range": 0.05}
    save_tiny_model(directory / "hf", model.architecture, dtype=torch.bfloat16, **options)
    return directory, run_on_ranks(_train_and_export, 2, directory)


def test_offload_changes_no_bit_and_ranks_keep_the_same_norms(trained):
    directory, runs = trained
    assert runs[0][3] == set(), "rank 1 has the embedding's padding, which isn't trained"
    for losses, offloaded, drift, _, norms in runs:
        assert offloaded == losses and drift == {}
        assert abs(losses[0] - loss_of(directory / "hf")) < 0.05 and losses[-1] < losses[0]
        assert len(norms) == 4 * 6 + 1 and differing(norms, runs[0][-1]) == {}


def test_checkpoint_and_export_say_the_same(trained):
    directory, _ = trained
    expected = _transformers(directory / "exported")
    assert len(set(expected)) > 3, "a text of one word would show little"
    for generated in run_on_ranks(_generated, 2, directory):
        assert generated == expected
