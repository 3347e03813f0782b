# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A checkpoint manager of one's own, which wraps the default one: counts, and records what was loaded."""

import sys

from common import finetuning_config

from megatron.bridge.training.checkpointing import (
    CheckpointLoadContext,
    CheckpointManager,
    CheckpointSaveContext,
    DefaultCheckpointManager,
    create_checkpoint_manager,
)
from megatron.bridge.training.config import CheckpointConfig
from megatron.bridge.training.finetune import finetune
from megatron.bridge.training.gpt_step import forward_step

calls = []


class RecordingManager:
    def __init__(self, checkpoint_config: CheckpointConfig) -> None:
        self.inner = DefaultCheckpointManager(checkpoint_config)

    def save(self, ctx: CheckpointSaveContext) -> None:
        calls.append(("save", ctx.state.train_state.step))
        self.inner.save(ctx)

    def load(self, ctx: CheckpointLoadContext) -> tuple[int, int]:
        loaded = self.inner.load(ctx)
        calls.append(("load", loaded[0]))
        return loaded

    def finalize_async_saves(self, state, blocking: bool = False, terminate: bool = False) -> None:
        if terminate:
            calls.append(("end", state.train_state.step))
        self.inner.finalize_async_saves(state, blocking=blocking, terminate=terminate)


if __name__ == "__main__":
    sys.modules["checkpoint_manager"] = sys.modules["__main__"]
    hf_model, data, output = sys.argv[1:]
    for train_iters in (2, 4):
        cfg = finetuning_config(hf_model, data, output)
        cfg.train.train_iters = train_iters
        cfg.scheduler.lr_decay_iters = 4
        cfg.checkpoint.custom_manager_class = "checkpoint_manager.RecordingManager"
        manager: CheckpointManager = create_checkpoint_manager(cfg.checkpoint)
        assert type(manager).__name__ == "RecordingManager"
        finetune(cfg, forward_step)
    expected = [("load", 0), ("save", 2), ("end", 2), ("load", 2), ("save", 4), ("end", 4)]
    assert calls == expected, calls
