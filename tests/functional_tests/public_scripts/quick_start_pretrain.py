# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The training quick start: a recipe with a few fields changed, on mock data."""

import sys

from megatron.bridge.recipes.llama import llama32_1b_pretrain_config
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain

if __name__ == "__main__":
    cfg = llama32_1b_pretrain_config()

    cfg.train.train_iters = 2
    cfg.train.global_batch_size = 4
    cfg.train.micro_batch_size = 2
    cfg.scheduler.lr_warmup_iters = 1
    cfg.scheduler.lr_decay_iters = 10000
    cfg.model.num_layers = 2
    cfg.model.hidden_size = 64
    cfg.model.ffn_hidden_size = 128
    cfg.model.num_attention_heads = 4
    cfg.model.num_query_groups = 2
    cfg.model.kv_channels = 16
    cfg.model.seq_length = 16
    cfg.dataset.seq_length = 16
    cfg.model.vocab_size = 128
    cfg.tokenizer.vocab_size = cfg.model.vocab_size
    cfg.validation.eval_iters = 1
    cfg.validation.eval_interval = 10
    cfg.logger.log_interval = 1
    cfg.logger.tensorboard_dir = f"{sys.argv[1]}/tb_logs"
    cfg.checkpoint.save = f"{sys.argv[1]}/checkpoints"
    cfg.checkpoint.load = f"{sys.argv[1]}/checkpoints"
    cfg.checkpoint.save_interval = 2

    pretrain(cfg, forward_step)
