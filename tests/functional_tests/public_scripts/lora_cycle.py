# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""LoRA from start to end: train, resume, and export the adapters and the merged model."""

import sys

from common import finetuning_config

from megatron.bridge import AutoBridge
from megatron.bridge.peft.lora import LoRA
from megatron.bridge.recipes.utils.finetune_utils import default_peft_config
from megatron.bridge.training.finetune import finetune
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.utils.checkpoint_utils import (
    get_checkpoint_run_config_filename,
    get_checkpoint_train_state_filename,
    read_run_config,
    read_train_state,
)

if __name__ == "__main__":
    hf_model, data, output = sys.argv[1:]
    for train_iters in (2, 4):
        cfg = finetuning_config(hf_model, data, f"{output}/adapters")
        cfg.train.train_iters = train_iters
        cfg.scheduler.lr_decay_iters = 4
        cfg.peft = default_peft_config("lora", dim=4, alpha=8, target_modules=["linear_qkv", "linear_fc1"])
        assert isinstance(cfg.peft, LoRA)
        finetune(cfg, forward_step)

    newest = f"{output}/adapters/iter_0000004"
    run_config = read_run_config(get_checkpoint_run_config_filename(newest))
    assert run_config["peft"]["_target_"] == "megatron.bridge.peft.lora.LoRA" and run_config["peft"]["dim"] == 4
    train_state = read_train_state(get_checkpoint_train_state_filename(f"{output}/adapters", prefix="latest"))
    assert train_state.step == 4 and train_state.consumed_train_samples == 16

    bridge = AutoBridge.from_hf_pretrained(hf_model)
    bridge.export_adapter_ckpt(f"{output}/adapters", f"{output}/peft")
    bridge.export_ckpt(f"{output}/adapters", f"{output}/merged")
