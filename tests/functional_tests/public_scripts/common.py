# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What the scripts share, as users have it beside theirs: a recipe, made small."""

from megatron.bridge import AutoBridge
from megatron.bridge.recipes.llama import llama32_1b_sft_config
from megatron.bridge.training.config import ConfigContainer


def finetuning_config(hf_model: str, data: str, output: str) -> ConfigContainer:
    cfg = llama32_1b_sft_config()
    cfg.model = AutoBridge.from_hf_pretrained(hf_model).to_megatron_provider(load_weights=False)
    cfg.model.seq_length = cfg.dataset.seq_length = 32
    cfg.dataset.dataset_root = data
    cfg.dataset.do_test = False
    cfg.tokenizer.tokenizer_model = hf_model
    cfg.train.train_iters = 2
    cfg.train.global_batch_size = 4
    cfg.train.micro_batch_size = 1
    cfg.validation.eval_iters = 1
    cfg.validation.eval_interval = 2
    cfg.scheduler.lr_warmup_iters = 0
    cfg.logger.log_interval = 1
    cfg.logger.tensorboard_dir = None
    cfg.checkpoint.pretrained_checkpoint = hf_model
    cfg.checkpoint.save = cfg.checkpoint.load = output
    cfg.checkpoint.save_interval = 2
    return cfg
