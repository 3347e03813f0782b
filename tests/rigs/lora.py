# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Runs with adapters: their configuration, and what a rank keeps of one."""

from pathlib import Path

from tests.rigs.load import planned_directories
from tests.rigs.on_ranks import Recorder, make_pretrained
from tests.rigs.ranks import run_on_ranks
from tests.rigs.tiny import tiny_config

# A trained B: with B zero, A has no gradient at first and half of the path would go untested.
LORA = {"dim": 4, "alpha": 8, "lora_B_init_method": "normal"}
SIZES = {"num_layers": 4}
EXPERTS = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 32,
    "moe_token_dispatcher_type": "alltoall",
    "expert_tensor_parallel_size": 1,
}
HALF = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5}
AWARE = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 1.0, "use_precision_aware_optimizer": True}
TP2, PP2, EP2 = ({f"{axis}_parallel_size": 2} for axis in ("tensor_model", "pipeline_model", "expert_model"))
SHARED = {"lora": {"share_expert_adapters": True}}


class Witness(Recorder):
    """Keeps what the optimizer owns too."""

    def on_train_step_end(self, context):
        super().on_train_step_end(context)
        self.rates = {group["lr"] for group in context.optimizer.param_groups if group["params"]}

    def on_train_start(self, context):
        super().on_train_start(context)
        children = getattr(context.optimizer, "chained_optimizers", [context.optimizer])
        self.owned = sum(param.numel() for child in children for param in child.model_param_group_index_map)
        params = [param for chunk in context.model for param in chunk.parameters()]
        self.trained = sum(param.numel() for param in params if param.requires_grad)
        self.all = sum(param.numel() for param in params)


def lora_config(
    directory, *, lora=None, scheme="lora", model=None, optimizer=None, precision="fp32", ratio=None, **checkpoint
):
    from megatron.bridge.recipes.common import default_peft_config
    from megatron.bridge.training.config import LoRAPlusOverrideProvider

    kind = "experts" if (model or {}).get("num_moe_experts") else "dense"
    cfg = tiny_config(
        directory,
        model={**SIZES, **(model or {})},
        train={"micro_batch_size": 4},
        optimizer={"lr": 1e-2, **(optimizer or {})},
        checkpoint={
            "save": None,
            "pretrained_checkpoint": f"{directory}/{kind}",
            "dist_ckpt_optim_fully_reshardable": True,
            **checkpoint,
        },
    )
    cfg.peft = default_peft_config(scheme, **{**LORA, **(lora or {})})
    cfg.mixed_precision = precision
    cfg.optimizer_config_override_provider = ratio and LoRAPlusOverrideProvider(lr_ratio=ratio)
    return cfg


def train(directory, *, callback=Witness, **options):
    from megatron.bridge.training.finetune import finetune
    from megatron.bridge.training.gpt_step import forward_step

    witness = callback()
    with planned_directories() as witness.planned:
        finetune(lora_config(directory, **options), forward_step, callbacks=[witness])
    return witness


def make_bases(path: Path) -> Path:
    """Save the weights under the adapters: `dense` and `experts`, which `lora_config` names. Returns the directory."""
    run_on_ranks(make_pretrained, 2, path / "dense", model=SIZES)
    run_on_ranks(make_pretrained, 2, path / "experts", model={**SIZES, **EXPERTS})
    return path
