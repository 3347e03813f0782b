# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Finetune SmolLM2-135M-Instruct on question and answer pairs, with the optimizer offloaded to the CPU.

Each rank runs this file (torchrun). Your own script would look like it:

    torchrun --nproc-per-node 2 scripts/finetune_smollm2/train.py \
        --pretrained-checkpoint results/smollm2/pretrained --output results/smollm2 train.train_iters=25
"""

import argparse
from pathlib import Path

from megatron.bridge.recipes.smollm2 import smollm2_135m_peft_config, smollm2_135m_sft_config
from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.training.finetune import finetune
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.utils.command_options import local_path
from megatron.bridge.utils.distributed import world_size
from megatron.bridge.utils.overrides import apply_overrides


def build_config(arguments: argparse.Namespace) -> ConfigContainer:
    """The recipe, this run's paths, and the command line's overrides, in that order."""
    cfg = _recipe(arguments.peft)
    cfg.checkpoint.pretrained_checkpoint = str(arguments.pretrained_checkpoint)
    cfg.checkpoint.save = cfg.checkpoint.load = str(arguments.output / "checkpoints")
    cfg.logger.tensorboard_dir = str(arguments.output / "tensorboard")
    cfg.logger.metrics_file = str(arguments.output / "metrics.jsonl")
    cfg.dataset.dataset_root = str(arguments.data)
    # Batches of 8 are noisy. With this seed the first ones are typical of the data (the base model's loss on them is
    # near its mean), so the first steps of the curve show the model and not the draw.
    cfg.dataset.seed = 2722
    cfg.tokenizer.tokenizer_model = str(arguments.model)
    share = cfg.train.micro_batch_size * world_size()
    cfg.train.global_batch_size = -(-cfg.train.global_batch_size // share) * share
    apply_overrides(cfg, arguments.overrides)
    return cfg


def check_overrides(overrides: list[str], peft: str | None = None) -> None:
    """Apply overrides to the recipe alone.

    Raises:
        ValueError: One names no option, or has a value of the wrong type.
    """
    apply_overrides(_recipe(peft), overrides)


def _recipe(peft: str | None) -> ConfigContainer:
    return smollm2_135m_peft_config(peft) if peft else smollm2_135m_sft_config()


def main() -> None:
    """Parse, configure, finetune."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", type=local_path, default=Path("data/smollm2-135m-instruct"), help="for the tokenizer"
    )
    parser.add_argument("--data", type=local_path, default=Path("data/chatterbot"), help="holds training.jsonl")
    parser.add_argument("--pretrained-checkpoint", type=local_path, required=True, help="weights to start from")
    parser.add_argument("--output", type=local_path, required=True, help="checkpoints, TensorBoard and metrics go here")
    parser.add_argument(
        "--peft", choices=("lora", "dora", "canonical_lora"), help="train adapters; default: all weights"
    )
    parser.add_argument(
        "--stock-megatron-core",
        action="store_true",
        help="leave the offloaded optimizer's copies as stock Megatron-Core leaves them, to see the effect",
    )
    parser.add_argument("overrides", nargs="*", help="key=value, e.g. optimizer.lr=1e-5")
    arguments = parser.parse_args()
    if arguments.stock_megatron_core:
        from without_sync import switch_off_sync

        switch_off_sync()
    try:
        finetune(build_config(arguments), forward_step)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
