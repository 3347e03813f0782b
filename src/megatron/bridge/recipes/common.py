# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What recipes share: a recipe is its differences from this."""

from collections.abc import Sequence
from typing import Any

from megatron.bridge.data.config import GPTSFTDatasetConfig, MockGPTDatasetConfig, TokenizerConfig
from megatron.bridge.peft.base import PEFT
from megatron.bridge.peft.canonical_lora import CanonicalLoRA
from megatron.bridge.peft.dora import DoRA
from megatron.bridge.peft.fused_adapter import part_names
from megatron.bridge.peft.lora import LoRA
from megatron.bridge.training.config import (
    CheckpointConfig,
    ConfigContainer,
    DistributedDataParallelConfig,
    LoggerConfig,
    OptimizerConfig,
    RNGConfig,
    SchedulerConfig,
    TrainingConfig,
    ValidationConfig,
)

PEFT_SCHEMES: dict[str, type[PEFT]] = {"lora": LoRA, "dora": DoRA, "canonical_lora": CanonicalLoRA}


def default_peft_config(peft_scheme: str | PEFT, **options: Any) -> PEFT:
    """Adapters of a kind, on every linear layer of attention and MLP.

    Args:
        peft_scheme: "lora", "dora" or "canonical_lora"; adapters with options of your own are taken as they are.
        options: Fields of the kind, such as `dim=16`.

    Raises:
        ValueError: Another name.
    """
    if isinstance(peft_scheme, PEFT):
        return peft_scheme
    if peft_scheme not in PEFT_SCHEMES:
        raise ValueError(f"peft_scheme={peft_scheme!r}: expected one of {', '.join(PEFT_SCHEMES)}, or a PEFT")
    return PEFT_SCHEMES[peft_scheme](**options)


def name_targets(peft: Any, adapted: Sequence[str]) -> None:
    """Have adapters put beside these linear layers, in place of the default ones.

    Args:
        peft: `LoRA` or one of its kind; it is changed. `CanonicalLoRA` gets the parts of fused layers.
        adapted: Last names in LoRA's way, such as "linear_qkv".
    """
    if isinstance(peft, CanonicalLoRA):
        adapted = [part for name in adapted for part in (part_names(name).values() or (name,))]
    peft.target_modules = list(adapted)


def sft_common(model: Any, *, seq_length: int, run_directory: str = "./nemo_experiments/default") -> ConfigContainer:
    """A full finetune in bf16 with the distributed optimizer, not offloaded.

    The run resumes from where it saves. Set `checkpoint.pretrained_checkpoint` and `tokenizer.tokenizer_model` before
    the run, and `dataset.dataset_root` or `dataset.hf_dataset`: it trains on SQuAD, of the hub, until then.

    Args:
        model: The model provider.
        seq_length: Longest sample, in tokens.
        run_directory: Checkpoints and TensorBoard files go below it.
    """
    model.seq_length = seq_length
    # Every answer token weighs the same, however the micro-batches fall.
    model.calculate_per_token_loss = True
    return ConfigContainer(
        model=model,
        train=TrainingConfig(train_iters=1000, micro_batch_size=1, global_batch_size=128),
        validation=ValidationConfig(eval_interval=100, eval_iters=32),
        optimizer=OptimizerConfig(
            optimizer="adam",
            lr=5e-6,
            min_lr=0.0,
            weight_decay=0.1,
            adam_beta1=0.9,
            adam_beta2=0.98,
            adam_eps=1e-8,
            clip_grad=1.0,
            use_distributed_optimizer=True,
        ),
        scheduler=SchedulerConfig(lr_decay_style="cosine", lr_warmup_iters=50),
        ddp=DistributedDataParallelConfig(
            use_distributed_optimizer=True, grad_reduce_in_fp32=True, average_in_collective=False
        ),
        dataset=GPTSFTDatasetConfig(seq_length, hf_dataset="squad", dataloader_type="batch", do_test=False),
        tokenizer=TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=""),
        checkpoint=CheckpointConfig(
            save=f"{run_directory}/checkpoints", load=f"{run_directory}/checkpoints", save_interval=100
        ),
        logger=LoggerConfig(log_interval=10, tensorboard_dir=f"{run_directory}/tensorboard"),
        rng=RNGConfig(seed=5678),
        mixed_precision="bf16_mixed",
    )


def peft_common(
    model: Any, *, seq_length: int, peft_scheme: str | PEFT = "lora", run_directory: str = "./nemo_experiments/default"
) -> ConfigContainer:
    """As `sft_common`, with adapters beside frozen weights, and their higher learning rate.

    Args:
        model: The model provider.
        seq_length: Longest sample, in tokens.
        peft_scheme: As for `default_peft_config`.
        run_directory: As for `sft_common`.
    """
    cfg = sft_common(model, seq_length=seq_length, run_directory=run_directory)
    cfg.peft = default_peft_config(peft_scheme)
    cfg.optimizer.lr = 1e-4
    return cfg


def pretrain_common(
    model: Any, *, seq_length: int, run_directory: str = "./nemo_experiments/default"
) -> ConfigContainer:
    """Training from random weights in bf16, on Core's mock data until `dataset` names a blend of your own.

    Args:
        model: The model provider.
        seq_length: Length of every sample, in tokens.
        run_directory: As for `sft_common`.
    """
    cfg = sft_common(model, seq_length=seq_length, run_directory=run_directory)
    cfg.dataset = MockGPTDatasetConfig(seq_length=seq_length)
    cfg.tokenizer = TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=model.vocab_size)
    cfg.optimizer.lr, cfg.optimizer.min_lr, cfg.optimizer.adam_beta2 = 3e-4, 3e-5, 0.95
    cfg.scheduler.lr_warmup_iters = 500
    cfg.train.train_iters, cfg.train.global_batch_size = 100_000, 512
    cfg.checkpoint.save_interval, cfg.validation.eval_interval = 1000, 1000
    cfg.rng = RNGConfig(seed=1234)
    return cfg
