# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Scripts in the forms that users have: public names only, and nothing in them knows of this package.

One takes a recipe, a YAML file and overrides, as scripts of Megatron Bridge 0.3 do; the other puts its configuration
together, imports and exports, and has a forward step and a callback of its own, as those of 0.6 do.
"""

import runpy
import sys

import pytest

from tests.rigs.ranks import run_on_ranks

RECIPE = """
import argparse

from megatron.bridge.recipes import llama32_1b_sft_config
from megatron.bridge.training.config import ConfigContainer, FinetuningDatasetConfig
from megatron.bridge.training.finetune import finetune
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config-file")
    parser.add_argument("--pretrained-checkpoint", required=True)
    parser.add_argument("--dataset-root", required=True)
    arguments, overrides = parser.parse_known_args()

    config: ConfigContainer = llama32_1b_sft_config()
    config.checkpoint.pretrained_checkpoint = arguments.pretrained_checkpoint
    config.dataset = FinetuningDatasetConfig(dataset_root=arguments.dataset_root, seq_length=32, do_test=False)
    config = process_config_with_overrides(config, config_filepath=arguments.config_file, cli_overrides=overrides)
    finetune(config=config, forward_step_func=forward_step)


if __name__ == "__main__":
    main()
"""

BY_HAND = """
import sys
from functools import partial

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
"""

EXPORT = """
import sys

from megatron.bridge import AutoBridge

hf_model, megatron_path, hf_path = sys.argv[1:]
AutoBridge.from_hf_pretrained(hf_model).export_ckpt(megatron_path, hf_path, show_progress=False)
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    directory = tmp_path_factory.mktemp("scripts")
    for name, text in (("recipe", RECIPE), ("by_hand", BY_HAND), ("export", EXPORT)):
        (directory / f"{name}.py").write_text(text)
    return directory


def _run(script, *arguments):
    before, sys.argv = sys.argv, [str(script), *map(str, arguments)]
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv = before


def test_a_recipe_a_file_and_overrides(inputs, scripts, tmp_path):
    (tmp_path / "more.yaml").write_text(
        "model: {num_layers: 4, hidden_size: 32, ffn_hidden_size: 48, num_attention_heads: 4, num_query_groups: 2,\n"
        "        kv_channels: 8, vocab_size: 328, rotary_base: 10000, rope_scaling: false, seq_length: 32,\n"
        "        layernorm_epsilon: 1.0e-6, share_embeddings_and_output_weights: false}\n"
        "train: {train_iters: 2, global_batch_size: 4}\n"
        "scheduler: {lr_warmup_iters: 1}\n"
    )
    places = ["--pretrained-checkpoint", inputs / "my-model", "--dataset-root", inputs / "my-data"]
    overrides = [f"tokenizer.tokenizer_model={inputs / 'my-model'}", "logger.tensorboard_dir=null"]
    overrides += [f"checkpoint.{name}={tmp_path / 'saved'}" for name in ("save", "load")]
    overrides += ["optimizer.optimizer_cpu_offload=true", "optimizer.optimizer_offload_fraction=1.0"]
    run_on_ranks(_run, 2, scripts / "recipe.py", "--config-file", tmp_path / "more.yaml", *places, *overrides)
    assert (tmp_path / "saved" / "latest_checkpointed_iteration.txt").read_text() == "2"


def test_a_configuration_by_hand_and_the_way_back(inputs, scripts, tmp_path):
    run_on_ranks(_run, 2, scripts / "by_hand.py", inputs / "my-model", inputs / "my-data", tmp_path)
    assert (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "2"
    run_on_ranks(_run, 2, scripts / "export.py", inputs / "my-model", tmp_path / "checkpoints", tmp_path / "hf")
    assert (tmp_path / "hf" / "model.safetensors").is_file() and (tmp_path / "hf" / "tokenizer.json").is_file()
