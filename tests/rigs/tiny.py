# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A tiny Llama, tiny data and their configuration: real in every part, small enough for a test."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron.bridge.data.config import DatasetProvider, TokenizerConfig

SEQ_LENGTH = 16
VOCAB_SIZE = 128

BF16_STATE = {
    **dict.fromkeys(("exp_avg_dtype", "exp_avg_sq_dtype", "main_grads_dtype"), torch.bfloat16),
    "adam_beta2": 0.98,
}
"""Options of an optimizer whose host keeps moments and gradients in BF16."""

GATHERED_LATE = {"overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 3000}
"""Options of DDP whose ranks gather weights, bucket by bucket, in the next forward pass."""


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
        return TinySamples(range(self.num_samples)), TinySamples(range(1000, 1011)), None


@dataclass
class TinySamples(torch.utils.data.Dataset):
    """Made when they are read: a short run reads few of them."""

    indices: range

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, at: int) -> dict[str, torch.Tensor]:
        return _sample(self.indices[at])


def _sample(index: int) -> dict[str, torch.Tensor]:
    length = SEQ_LENGTH - index % 5
    tokens = (torch.arange(length + 1) * (1 + index % 7) + index) % VOCAB_SIZE
    loss_mask = torch.ones(length)
    loss_mask[: length // 2] = 0
    return {"tokens": tokens[:-1], "labels": tokens[1:], "loss_mask": loss_mask}


class _Fp32RMSNorm(torch.nn.RMSNorm):
    """A norm whose weight stays FP32 when the model around it becomes 16-bit."""

    def _apply(self, fn: Any, recurse: bool = True) -> torch.nn.Module:
        return super()._apply(lambda tensor: fn(tensor).float(), recurse)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.float()).to(x.dtype)


class Fp32Norm:
    """Builds the norm where a layer spec names a class."""

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5) -> torch.nn.Module:
        norm = _Fp32RMSNorm(hidden_size, eps=eps, dtype=torch.float32)
        norm.weight.sequence_parallel = config.sequence_parallel
        return norm


def fp32_norm_layer_spec(config: Any, vp_stage: int | None = None) -> Any:
    """Core's local layers with norms kept in FP32, as models do with weights that don't bear rounding."""
    from megatron.bridge.models.layer_specs import local_layer_spec, replace_norms
    from megatron.bridge.models.torch_norm import TorchNorm

    block = local_layer_spec(config, vp_stage)
    replace_norms(block, (TorchNorm,), Fp32Norm)
    return block
