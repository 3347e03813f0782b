# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The finetuning quick start: import a model, take a recipe, point it to the model and the data, finetune."""

import argparse

import torch

from megatron.bridge import AutoBridge
from megatron.bridge.recipes.llama import llama32_1b_sft_config
from megatron.bridge.training.finetune import finetune
from megatron.bridge.training.gpt_step import forward_step


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--hf-model", required=True)
    parser.add_argument("--dataset-root", required=True)
    parser.add_argument("--output", required=True)
    return parser.parse_args()


if __name__ == "__main__":
    args = parse_args()
    AutoBridge.import_ckpt(
        args.hf_model,
        f"{args.output}/pretrained",
        torch_dtype=torch.bfloat16,
        device_map="cpu",
        trust_remote_code=True,
    )

    cfg = llama32_1b_sft_config()
    cfg.model = AutoBridge.from_hf_pretrained(args.hf_model).to_megatron_provider(load_weights=False)
    cfg.model.seq_length = 32
    cfg.dataset.seq_length = 32
    cfg.dataset.dataset_root = args.dataset_root
    cfg.dataset.hf_dataset = None
    cfg.dataset.do_test = False
    cfg.tokenizer.tokenizer_type = "HuggingFaceTokenizer"
    cfg.tokenizer.tokenizer_model = args.hf_model
    cfg.train.train_iters = 2
    cfg.train.global_batch_size = 4
    cfg.train.micro_batch_size = 1
    cfg.train.eval_iters = 1
    cfg.train.eval_interval = 2
    cfg.scheduler.lr_warmup_iters = 1
    cfg.optimizer.lr = 1e-4
    cfg.logger.log_interval = 1
    cfg.checkpoint.pretrained_checkpoint = f"{args.output}/pretrained"
    cfg.checkpoint.save = f"{args.output}/checkpoints"
    cfg.checkpoint.load = f"{args.output}/checkpoints"
    cfg.checkpoint.save_interval = 2
    finetune(config=cfg, forward_step_func=forward_step)
