# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Merge adapters into the weights by hand: base model, adapters from a checkpoint, LoRAMerge, save."""

import sys

import torch
from megatron.core import dist_checkpointing

from megatron.bridge import AutoBridge
from megatron.bridge.peft.lora import LoRA, LoRAMerge
from megatron.bridge.training.checkpointing import (
    apply_peft_adapter_filter_to_state_dict,
)
from megatron.bridge.training.utils.checkpoint_utils import read_run_config
from megatron.bridge.utils.common_utils import print_rank_0

if __name__ == "__main__":
    hf_model, adapters, output = sys.argv[1:]
    saved = read_run_config(f"{adapters}/run_config.yaml")["peft"]
    peft = LoRA(**{name: saved[name] for name in ("target_modules", "dim", "alpha", "dropout")})

    bridge = AutoBridge.from_hf_pretrained(hf_model, torch_dtype=torch.bfloat16)
    provider = bridge.to_megatron_provider(load_weights=True)
    provider.tensor_model_parallel_size = 1
    provider.finalize()
    provider.initialize_model_parallel(seed=0)
    provider.register_pre_wrap_hook(lambda chunks: peft(chunks, training=False))
    model = provider.provide_distributed_model(wrap_with_ddp=False)

    sharded = {"model": model[0].sharded_state_dict()}
    sharded = apply_peft_adapter_filter_to_state_dict(sharded, peft)
    loaded = dist_checkpointing.load(sharded, adapters)
    model[0].load_state_dict(loaded["model"], strict=False)

    merged = LoRAMerge()(model[0], training=False)
    print_rank_0("merged")
    bridge.save_hf_pretrained([merged], output)
