# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Gemma 4's E2B, whose layers hand keys, values and inputs on: data parallelism, a resume, adapters and packed rows."""

import torch

from megatron.bridge.models.packed_attention import attention_arguments, check_samples_are_kept_apart
from tests.rigs.families import MODELS
from tests.rigs.on_ranks import differing, run_finetune
from tests.rigs.ranks import run_on_ranks
from tests.rigs.tiny import SEQ_LENGTH, VOCAB_SIZE, tiny_config
from tests.unit_tests.models.tiny_llama import save_tiny_model

SAMPLES = [[5, 17, 40, 3, 88, 9, 12, 30, 31], [7, 61, 2, 44]]
RECOMPUTED = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def _finetune(directory, steps, *, adapters=False, model=(), **checkpoint):
    """Finetune with data parallelism, half of the optimizer on the CPU."""
    from megatron.bridge import AutoBridge
    from megatron.bridge.recipes.common import default_peft_config

    cfg = tiny_config(
        directory,
        train_iters=steps,
        optimizer={"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5, "lr": 5e-3},
        checkpoint={"pretrained_checkpoint": str(directory / "hf"), "save": None, **checkpoint},
    )
    cfg.model = AutoBridge.from_hf_pretrained(directory / "hf").to_megatron_provider(load_weights=False)
    cfg.model.seq_length, cfg.model.calculate_per_token_loss = SEQ_LENGTH, True
    for name, value in dict(model).items():
        setattr(cfg.model, name, value)
    if adapters:
        cfg.peft = default_peft_config("lora", dim=4, alpha=8, lora_B_init_method="normal")
    return run_finetune(cfg)


@torch.no_grad()
def _largest_leak(directory):
    """How far the logits of a packed row are from those of its samples alone."""
    from megatron.bridge import AutoBridge
    from megatron.bridge.utils.distributed import model_parallel_groups

    with model_parallel_groups(1, 1):
        provider = AutoBridge.from_hf_pretrained(directory).to_megatron_provider()
        provider.finalize()
        model = [chunk.eval() for chunk in provider.provide_distributed_model(wrap_with_ddp=False)]
        check_samples_are_kept_apart(model, micro_batch_size=1)
        row = torch.tensor([sum(SAMPLES, [])])
        bounds = torch.tensor([[0, len(SAMPLES[0]), row.shape[1]]], dtype=torch.int32)
        positions = torch.cat([torch.arange(len(sample)) for sample in SAMPLES])[None]
        packed = model[0](row, positions, **attention_arguments(model[0], bounds, seq_length=row.shape[1]))
        alone = [model[0](torch.tensor([one]), torch.arange(len(one))[None], None) for one in SAMPLES]
        return float((packed - torch.cat(alone, 1)).abs().max())


def _run_all(directory):
    whole = _finetune(directory, 3)
    saved = str(directory / "saved")
    _finetune(directory, 2, save=saved)
    resumed = _finetune(directory, 3, load=saved)
    adapters = _finetune(directory, 3, adapters=True)
    recomputed = _finetune(directory, 3, adapters=True, model=RECOMPUTED)
    return {
        "losses": whole.losses,
        "resumed": (resumed.losses == whole.losses[2:], differing(resumed.weights_after, whole.weights_after)),
        "recomputed": (
            recomputed.losses == adapters.losses,
            differing(recomputed.weights_after, adapters.weights_after),
        ),
        "moved": differing(adapters.weights_before, adapters.weights_after),
        "leak": _largest_leak(directory / "without_windows"),
        "weights": whole.weights_after,
    }


def test_what_layers_hand_on_changes_neither_resumes_nor_adapters_nor_packed_rows(tmp_path):
    options = {**MODELS["gemma4_e2b"].options, "vocab_size": VOCAB_SIZE, "initializer_range": 0.05}
    architecture = MODELS["gemma4_e2b"].architecture
    save_tiny_model(tmp_path / "hf", architecture, dtype=torch.bfloat16, **options)
    # With windows, packed rows need Transformer Engine's attention, and are refused here.
    save_tiny_model(tmp_path / "without_windows", architecture, **{**options, "layer_types": ["full_attention"] * 6})
    runs = run_on_ranks(_run_all, 2, tmp_path)
    for found in runs:
        assert found["losses"][-1] < found["losses"][0]
        assert found["resumed"] == (True, {})
        assert found["recomputed"] == (True, {})
        assert found["moved"] and all("adapter" in name for name in found["moved"])
        assert found["leak"] < 1e-5
        assert differing(found["weights"], runs[0]["weights"]) == {}, "data-parallel ranks hold the same"
