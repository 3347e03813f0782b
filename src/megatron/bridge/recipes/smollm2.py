# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""SmolLM2: small enough to finetune on a laptop, real enough to show what finetuning does."""

from megatron.bridge.models.llama import LlamaModelProvider
from megatron.bridge.peft.base import PEFT
from megatron.bridge.recipes.common import default_peft_config, sft_common
from megatron.bridge.training.config import ConfigContainer


def smollm2_135m_sft_config() -> ConfigContainer:
    """Full finetune of SmolLM2-135M with the optimizer offloaded to the CPU, on short conversations."""
    cfg = sft_common(
        LlamaModelProvider(
            num_layers=30,
            hidden_size=576,
            ffn_hidden_size=1536,
            num_attention_heads=9,
            num_query_groups=3,
            kv_channels=64,
            vocab_size=49152,
            rotary_base=100000,
            layernorm_epsilon=1e-5,
            share_embeddings_and_output_weights=True,
        ),
        seq_length=128,
    )
    cfg.train.micro_batch_size = 2
    cfg.train.global_batch_size = 8
    cfg.train.train_iters = 25
    cfg.dataset.dataset_kwargs = {"pad_seq_length_to_mult": 8}
    cfg.optimizer.lr = 2e-5
    cfg.logger.log_interval = 1
    cfg.optimizer.weight_decay = 0.01
    cfg.optimizer.optimizer_cpu_offload = True
    cfg.optimizer.optimizer_offload_fraction = 1.0
    cfg.scheduler.lr_warmup_iters = 5
    cfg.checkpoint.save_interval = None
    cfg.validation.eval_interval = None
    cfg.validation.eval_at_start = True
    cfg.validation.eval_iters = None
    return cfg


def smollm2_135m_peft_config(peft_scheme: str | PEFT = "lora") -> ConfigContainer:
    """Adapters beside SmolLM2-135M's frozen weights, on short conversations; what is left to step on is offloaded.

    Args:
        peft_scheme: As for `default_peft_config`.
    """
    cfg = smollm2_135m_sft_config()
    cfg.peft = default_peft_config(peft_scheme)
    cfg.optimizer.lr = 5e-4
    return cfg
