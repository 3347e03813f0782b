# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A model by its name on the hub, on two ranks: finetuned and exported, fetched once, and refused on all ranks."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.functional_tests.test_conversion_command import on_rank
from tests.rigs.hub import COMMIT, running_hub, use_hub
from tests.rigs.ranks import run_on_ranks
from tests.rigs.tiny import tiny_config
from tests.unit_tests.data.conftest import write_tokenizer
from tests.unit_tests.models.tiny_llama import save_tiny_llama

pytestmark = pytest.mark.any_core  # how a name becomes a directory; adapters and exports have tests of their own

NAME = "some-org/Tiny-1B"


def _on_hub(directory, url, work, *args):
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_hub(monkeypatch, directory / "cache", url)
        return work(directory, *args)


def _finetune(directory, name):
    from megatron.bridge import AutoBridge
    from megatron.bridge.data.config import TokenizerConfig
    from megatron.bridge.peft.lora import LoRA
    from megatron.bridge.training.finetune import finetune
    from megatron.bridge.training.gpt_step import forward_step

    cfg = tiny_config(directory, train_iters=1)
    cfg.model = AutoBridge.from_hf_pretrained(name).to_megatron_provider(load_weights=False)
    cfg.model.seq_length, cfg.model.calculate_per_token_loss = 16, True
    cfg.tokenizer = TokenizerConfig(tokenizer_model=name)
    cfg.mixed_precision = "fp32"
    cfg.checkpoint.pretrained_checkpoint, cfg.checkpoint.load = name, cfg.checkpoint.save
    cfg.peft = LoRA(dim=4, alpha=8)
    finetune(cfg, forward_step)


def _pretrained_refused(directory, name):
    """The model is there, and the weights to start from aren't."""
    from megatron.bridge.training.finetune import finetune
    from megatron.bridge.training.gpt_step import forward_step

    try:
        finetune(tiny_config(directory, checkpoint={"pretrained_checkpoint": name}), forward_step)
    except (FileNotFoundError, RuntimeError) as error:
        return str(error)


def _export(directory, checkpoint):
    from megatron.bridge import AutoBridge

    AutoBridge.from_auto_config(checkpoint, NAME).export_ckpt(checkpoint, directory / "merged", show_progress=False)
    AutoBridge.import_ckpt(NAME, directory / "imported", show_progress=False)
    options = ("--megatron-path", checkpoint, "--hf-path", directory / "adapter", "--no-progress")
    status, _, errors = on_rank("export-adapter", *options)
    return status, errors


def test_a_model_of_the_hub_is_finetuned_and_exported(tmp_path):
    hf = save_tiny_llama(tmp_path / "hf", vocab_size=338, num_hidden_layers=2)
    write_tokenizer(hf)
    with running_hub() as hub:
        hub.put(NAME, hf)
        run_on_ranks(_on_hub, 2, tmp_path, hub.url, _finetune, NAME)
        fetched = hub.fetched()
        for said in run_on_ranks(_on_hub, 2, tmp_path, hub.url, _pretrained_refused, "some-org/gated"):
            assert "checkpoint.pretrained_checkpoint: 'some-org/gated' is no directory" in said and "\n" not in said
    assert len(fetched) == len(set(fetched)) and "model.safetensors" in fetched
    snapshot = tmp_path / "cache" / "models--some-org--Tiny-1B" / "snapshots" / COMMIT
    assert torch.equal(
        load_file(snapshot / "model.safetensors")["model.norm.weight"],
        load_file(hf / "model.safetensors")["model.norm.weight"],
    )

    recorded = yaml.safe_load((tmp_path / "checkpoints" / "iter_0000001" / "run_config.yaml").read_text())
    assert recorded["checkpoint"]["hub_revisions"] == {NAME: COMMIT}

    # The hub is gone. What the checkpoint says is the name.
    adapters = str(tmp_path / "checkpoints")
    for status, errors in run_on_ranks(_on_hub, 2, tmp_path, None, _export, adapters):
        assert status == 0, errors
    imported = yaml.safe_load((tmp_path / "imported" / "iter_0000000" / "run_config.yaml").read_text())
    assert imported["checkpoint"] == {"hub_revisions": {NAME: COMMIT}}
    base = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == NAME
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == load_file(hf / "model.safetensors").keys()
