# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A tiny Llama, tiny data and their configuration: real in every part, small enough for a test."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron.bridge.data.config import DatasetProvider, TokenizerConfig

SEQ_LENGTH = 16
VOCAB_SIZE = 128


def tiny_config(directory: str | Path, *, train_iters: int = 3, **sections: dict[str, Any]) -> Any:
    """A run of a tiny Llama in bf16 with the distributed optimizer, saving below `directory`.

    Args:
        directory: The run's directory.
        train_iters: Steps.
        sections: Fields to set, by section: `optimizer={"lr": 1e-3}`.
    """
    from megatron.bridge.models.llama import LlamaModelProvider
    from megatron.bridge.training.config import (
        CheckpointConfig,
        ConfigContainer,
        DistributedDataParallelConfig,
        LoggerConfig,
        OptimizerConfig,
        SchedulerConfig,
        TrainingConfig,
        ValidationConfig,
    )

    cfg = ConfigContainer(
        model=LlamaModelProvider(
            num_layers=2,
            hidden_size=64,
            ffn_hidden_size=128,
            num_attention_heads=4,
            num_query_groups=2,
            vocab_size=VOCAB_SIZE,
            seq_length=SEQ_LENGTH,
            calculate_per_token_loss=True,
        ),
        train=TrainingConfig(train_iters=train_iters, micro_batch_size=2, global_batch_size=8),
        validation=ValidationConfig(eval_iters=0),
        optimizer=OptimizerConfig(
            optimizer="adam", lr=1e-3, min_lr=1e-4, clip_grad=1.0, use_distributed_optimizer=True
        ),
        scheduler=SchedulerConfig(lr_decay_style="linear", lr_decay_iters=100),
        ddp=DistributedDataParallelConfig(
            use_distributed_optimizer=True, grad_reduce_in_fp32=True, average_in_collective=False
        ),
        dataset=TinyDataset(),
        tokenizer=TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=VOCAB_SIZE),
        checkpoint=CheckpointConfig(save=f"{directory}/checkpoints"),
        logger=LoggerConfig(),
        mixed_precision="bf16_mixed",
    )
    for section, fields in sections.items():
        for name, value in fields.items():
            if not hasattr(getattr(cfg, section), name):
                raise AttributeError(f"{section}.{name}")
            setattr(getattr(cfg, section), name, value)
    return cfg


@dataclass
class TinyDataset(DatasetProvider):
    """Sequences that count up by a step of their own: something that can be learned."""

    num_samples: int = 64

    def build_datasets(self, context: Any) -> tuple[Any, Any, Any]:
        train = [_sample(index) for index in range(self.num_samples)]
        return train, [_sample(index) for index in range(1000, 1011)], None


def _sample(index: int) -> dict[str, torch.Tensor]:
    length = SEQ_LENGTH - index % 5
    tokens = (torch.arange(length + 1) * (1 + index % 7) + index) % VOCAB_SIZE
    loss_mask = torch.ones(length)
    loss_mask[: length // 2] = 0
    return {"tokens": tokens[:-1], "labels": tokens[1:], "loss_mask": loss_mask}
