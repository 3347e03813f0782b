# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A small configuration that works, for tests to spoil."""

from megatron.bridge.models.llama import LlamaModelProvider
from megatron.bridge.training.config import (
    CheckpointConfig,
    ConfigContainer,
    DistributedDataParallelConfig,
    GPTSFTDatasetConfig,
    LoggerConfig,
    OptimizerConfig,
    SchedulerConfig,
    TokenizerConfig,
    TrainingConfig,
)
from megatron.bridge.utils.overrides import apply_overrides


def make_config(*overrides: str) -> ConfigContainer:
    """A finetune of a tiny Llama, with options set as on a command line."""
    cfg = ConfigContainer(
        model=LlamaModelProvider(
            num_layers=4,
            hidden_size=64,
            ffn_hidden_size=128,
            num_attention_heads=8,
            num_query_groups=4,
            seq_length=32,
            vocab_size=96,
        ),
        train=TrainingConfig(micro_batch_size=2, global_batch_size=8, train_iters=20),
        optimizer=OptimizerConfig(lr=1e-4, min_lr=0.0, use_distributed_optimizer=True),
        ddp=DistributedDataParallelConfig(use_distributed_optimizer=True),
        scheduler=SchedulerConfig(lr_decay_style="cosine", lr_warmup_iters=2),
        dataset=GPTSFTDatasetConfig(seq_length=32, dataset_root="data"),
        tokenizer=TokenizerConfig(tokenizer_model="tokenizer"),
        checkpoint=CheckpointConfig(),
        logger=LoggerConfig(),
    )
    return apply_overrides(cfg, overrides)
