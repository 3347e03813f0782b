# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""SmolLM2: small enough to finetune on a laptop, real enough to show what finetuning does."""

from typing import TYPE_CHECKING, Any

from megatron.bridge.recipes.table import Family, ModelSize

if TYPE_CHECKING:
    from megatron.bridge.peft.base import PEFT
    from megatron.bridge.training.config import ConfigContainer


def _shape(layers: int, hidden: int, ffn: int, heads: int, *, groups: int, base: float, std: float) -> dict[str, Any]:
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "ffn_hidden_size": ffn,
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "kv_channels": 64,
        "vocab_size": 49152,
        "rotary_base": base,
        "layernorm_epsilon": 1e-5,
        "init_method_std": std,
        "share_embeddings_and_output_weights": True,
    }


FAMILY = Family(
    provider="megatron.bridge.models.llama.LlamaModelProvider",
    sizes={
        "smollm2_135m": ModelSize(
            hf_name="HuggingFaceTB/SmolLM2-135M",
            parameters=134_515_008,
            fields=_shape(30, 576, 1536, 9, groups=3, base=100000.0, std=0.041666666666666664),
        ),
        "smollm2_360m": ModelSize(
            hf_name="HuggingFaceTB/SmolLM2-360M",
            parameters=361_821_120,
            fields=_shape(32, 960, 2560, 15, groups=5, base=100000.0, std=0.02),
        ),
        "smollm2_1p7b": ModelSize(
            hf_name="HuggingFaceTB/SmolLM2-1.7B",
            parameters=1_711_376_384,
            fields=_shape(24, 2048, 8192, 32, groups=32, base=130000.0, std=0.02),
        ),
    },
)


def smollm2_135m_sft_config() -> "ConfigContainer":
    """Full finetune of SmolLM2-135M with the optimizer offloaded to the CPU, on short conversations."""
    from megatron.bridge.data.config import GPTSFTDatasetConfig

    cfg = FAMILY.sft("smollm2_135m")
    assert isinstance(cfg.dataset, GPTSFTDatasetConfig)
    cfg.model.seq_length = cfg.dataset.seq_length = 128
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


def smollm2_135m_peft_config(peft_scheme: "str | PEFT" = "lora") -> "ConfigContainer":
    """Adapters beside SmolLM2-135M's frozen weights, on short conversations; what is left to step on is offloaded.

    Args:
        peft_scheme: As for `default_peft_config`.
    """
    from megatron.bridge.recipes.common import default_peft_config

    cfg = smollm2_135m_sft_config()
    cfg.peft = default_peft_config(peft_scheme)
    cfg.optimizer.lr = 5e-4
    return cfg


RECIPES = FAMILY.recipes(__name__)
globals().update({name: recipe for name, recipe in RECIPES.items() if name not in globals()})
RECIPES = {name: globals()[name] for name in RECIPES}  # the two above are written out
