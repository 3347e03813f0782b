# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A configuration put together section by section: import, LoRA with an offloaded optimizer, a callback."""

import sys

from megatron.bridge import AutoBridge
from megatron.bridge.peft.lora import LoRA
from megatron.bridge.recipes.utils.optimizer_utils import distributed_fused_adam_with_cosine_annealing
from megatron.bridge.training.callbacks import Callback
from megatron.bridge.training.config import (
    CheckpointConfig,
    ConfigContainer,
    DistributedDataParallelConfig,
    GPTSFTDatasetConfig,
    LoggerConfig,
    RNGConfig,
    TokenizerConfig,
    TrainingConfig,
    ValidationConfig,
)
from megatron.bridge.training.finetune import finetune
from megatron.bridge.training.gpt_step import forward_step as gpt_forward_step
from megatron.bridge.training.state import GlobalState


class Losses(Callback):
    def on_train_step_end(self, context):
        context.user_state.setdefault("losses", []).append(context.loss_dict["lm loss"])


def forward_step(state: GlobalState, data_iterator, model, return_schedule_plan: bool = False):
    return gpt_forward_step(state, data_iterator, model, return_schedule_plan)


if __name__ == "__main__":
    hf_model, data, output = sys.argv[1:]
    AutoBridge.import_ckpt(hf_model, f"{output}/pretrained")
    model = AutoBridge.from_hf_pretrained(hf_model).to_megatron_provider(load_weights=False)
    model.seq_length = 32
    optimizer, scheduler = distributed_fused_adam_with_cosine_annealing(
        lr_warmup_iters=1, lr_decay_iters=2, max_lr=1e-3, min_lr=0.0
    )
    optimizer.optimizer_cpu_offload = True
    optimizer.optimizer_offload_fraction = 1.0
    config = ConfigContainer(
        model=model,
        train=TrainingConfig(train_iters=2, global_batch_size=4, micro_batch_size=1),
        validation=ValidationConfig(eval_interval=2, eval_iters=1),
        optimizer=optimizer,
        scheduler=scheduler,
        ddp=DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True),
        dataset=GPTSFTDatasetConfig(dataset_root=data, seq_length=32, do_test=False),
        logger=LoggerConfig(log_interval=1),
        tokenizer=TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=hf_model),
        checkpoint=CheckpointConfig(
            pretrained_checkpoint=f"{output}/pretrained",
            save=f"{output}/checkpoints",
            load=f"{output}/checkpoints",
            save_interval=2,
            ckpt_format="torch_dist",
        ),
        rng=RNGConfig(seed=1234),
        peft=LoRA(target_modules=["linear_qkv", "linear_proj"], dim=4, alpha=8),
        mixed_precision="bf16_mixed",
    )
    finetune(config, forward_step, callbacks=[Losses()])
