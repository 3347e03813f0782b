# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""From a Hugging Face directory with experts to a finetuned one: expert parallel, offloaded, exported."""

import torch
from transformers import AutoConfig

from megatron.bridge import AutoBridge
from tests.rigs.families import MODELS
from tests.rigs.on_ranks import run_finetune
from tests.rigs.ranks import run_on_ranks
from tests.rigs.tiny import SEQ_LENGTH, VOCAB_SIZE, TinyDataset, tiny_config
from tests.unit_tests.models.tiny_llama import hf_logits, save_tiny_model

ROTARY_BASE = 20_000
"""Another than the model's: an export has to say it."""


def finetune_on_rank(directory):
    """A finetune as a user writes it; its losses."""
    model = AutoBridge.from_hf_pretrained(directory / "hf").to_megatron_provider(load_weights=False)
    model.expert_model_parallel_size = 2
    model.seq_length = SEQ_LENGTH
    model.rotary_base = ROTARY_BASE
    model.calculate_per_token_loss = True
    cfg = tiny_config(
        directory,
        train_iters=16,
        optimizer={"optimizer_cpu_offload": True, "optimizer_offload_fraction": 1.0, "lr": 5e-3},
        checkpoint={"pretrained_checkpoint": str(directory / "hf"), "save": str(directory / "megatron")},
    )
    cfg.model = model
    return run_finetune(cfg).losses


def export_on_rank(directory):
    bridge = AutoBridge.from_hf_pretrained(directory / "hf")
    bridge.export_ckpt(directory / "megatron", directory / "exported", False, pipeline_model_parallel_size=2)


def loss_of(directory):
    """Transformers' loss on the training data."""
    samples = [sample for sample in TinyDataset().build_datasets(None)[0] if len(sample["tokens"]) == SEQ_LENGTH]
    tokens, labels, mask = (torch.stack([one[key] for one in samples]) for key in ("tokens", "labels", "loss_mask"))
    losses = torch.nn.functional.cross_entropy(hf_logits(directory, tokens).transpose(1, 2), labels, reduction="none")
    return float((losses * mask).sum() / mask.sum())


def test_experts_from_hugging_face_and_back(tmp_path):
    model = MODELS["qwen3_moe"]
    options = {**model.options, "vocab_size": VOCAB_SIZE, "initializer_range": 0.02}
    save_tiny_model(tmp_path / "hf", model.architecture, dtype=torch.bfloat16, **options)
    before = loss_of(tmp_path / "hf")
    for losses in run_on_ranks(finetune_on_rank, 2, tmp_path):
        assert abs(losses[0] - before) < 0.1 and losses[-1] < losses[0] - 0.1
    run_on_ranks(export_on_rank, 2, tmp_path)
    assert loss_of(tmp_path / "exported") < before - 0.1
    assert AutoConfig.from_pretrained(tmp_path / "exported").rope_parameters["rope_theta"] == ROTARY_BASE
