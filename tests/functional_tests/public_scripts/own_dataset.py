# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A dataset of one's own: a provider that builds three torch datasets, trained on with pretrain."""

import sys
from dataclasses import dataclass
from typing import Any

import torch
from common import finetuning_config
from torch.utils.data import Dataset

from megatron.bridge.training.config import DatasetBuildContext, DatasetProvider
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain


class CountingDataset(Dataset):
    def __init__(self, size: int, seq_length: int) -> None:
        self.size, self.seq_length = size, seq_length

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (torch.arange(self.seq_length + 1) + index) % 300
        return {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "loss_mask": torch.ones(self.seq_length),
            "position_ids": torch.arange(self.seq_length),
        }


@dataclass
class CountingDatasetProvider(DatasetProvider):
    seq_length: int = 32
    num_workers: int = 0

    def build_datasets(self, context: DatasetBuildContext) -> tuple[Any | None, Any | None, Any | None]:
        assert context.tokenizer is not None
        sizes = context.train_samples, context.valid_samples, context.test_samples
        return tuple(CountingDataset(size, self.seq_length) if size else None for size in sizes)


if __name__ == "__main__":
    hf_model, data, output = sys.argv[1:]
    cfg = finetuning_config(hf_model, data, output)
    cfg.dataset = CountingDatasetProvider(seq_length=32, dataloader_type="cyclic")
    cfg.checkpoint.pretrained_checkpoint = None
    pretrain(config=cfg, forward_step_func=forward_step)
