# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
r"""What packing is worth: tokens a second of the same training, one sample a row and several.

    make model                                    # SmolLM2's tokenizer and the data
    python benchmarks/packing.py                  # SmolLM2-135M's shape, 4 of its layers
    python benchmarks/packing.py --num-layers 30 --seq-length 512

One process, random weights. A step takes about as many samples in both runs; tokens of padding don't count. The first
step of each run is left out.
"""

import argparse
import logging

import torch
from megatron.core import __version__ as core_version

from megatron.bridge.data.config import DatasetBuildContext, PackedSequenceSpecs
from megatron.bridge.data.loaders import build_datasets
from megatron.bridge.data.sampler import sample_indices
from megatron.bridge.data.tokenizer import build_tokenizer
from megatron.bridge.recipes.smollm2 import smollm2_135m_sft_config
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain


class Clock(Callback):
    """Keeps how long each step took."""

    def __init__(self) -> None:
        """Has no step yet."""
        self.seconds: list[float] = []

    def on_train_step_end(self, context: CallbackContext) -> None:
        """Note the step that ended."""
        self.seconds.append(context.step_seconds)


def main() -> None:
    """Time both runs and print one row for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--seq-length", type=int, default=256, help="positions of a packed row")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--dataset-root", default="data/chatterbot")
    parser.add_argument("--tokenizer", default="data/smollm2-135m-instruct")
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    print(f"torch {torch.__version__}, megatron-core {core_version}, {torch.get_num_threads()} threads")
    print("rows | rows x micro-batches | samples a step | padding | s a step | tokens a second")
    alone = _row(arguments, "one sample each", rows=4, batch=16, packed=False)
    packed = _row(arguments, "packed", rows=1, batch=4, packed=True)
    print(f"packed / one sample each: {packed / alone:.2f}")


def _row(arguments: argparse.Namespace, name: str, *, rows: int, batch: int, packed: bool) -> float:
    cfg = _config(arguments, rows=rows, batch=batch, packed=packed)
    context = DatasetBuildContext(0, 0, 0, build_tokenizer(cfg.tokenizer))
    dataset, _, _ = build_datasets(cfg.dataset, context)
    drawn = sample_indices(
        batch, batch * (arguments.steps - 1), num_samples=len(dataset), seed=cfg.dataset.seed, shuffle=True
    )
    clock, shapes = Clock(), []

    def watched(state, data_iterator, model):
        micro_batch = next(data_iterator)
        shapes.append(micro_batch["tokens"].numel())
        return forward_step(state, iter([micro_batch]), model)

    pretrain(cfg, watched, callbacks=[clock])
    seconds = sum(clock.seconds[1:])
    tokens, positions = int(dataset.lengths[drawn].sum()), sum(shapes[batch // rows :])
    samples = sum(len(dataset.packs[row]) for row in drawn) if packed else len(drawn)
    step = seconds / (arguments.steps - 1)
    print(
        f"{name} | {rows} x {batch // rows} | {samples / (arguments.steps - 1):.1f} | {1 - tokens / positions:.0%} | "
        f"{step:.2f} | {tokens / seconds:.0f}",
        flush=True,
    )
    return tokens / seconds


def _config(arguments: argparse.Namespace, *, rows: int, batch: int, packed: bool) -> ConfigContainer:
    cfg = smollm2_135m_sft_config()
    cfg.model.num_layers = arguments.num_layers
    cfg.model.seq_length = cfg.dataset.seq_length = arguments.seq_length
    cfg.train.train_iters, cfg.train.micro_batch_size, cfg.train.global_batch_size = arguments.steps, rows, batch
    cfg.scheduler.lr_warmup_iters = 0
    cfg.optimizer.optimizer_cpu_offload = False
    cfg.validation.eval_iters = 0
    cfg.checkpoint.save = cfg.checkpoint.load = cfg.checkpoint.pretrained_checkpoint = None
    cfg.logger.tensorboard_dir = None
    cfg.tokenizer.tokenizer_model = arguments.tokenizer
    cfg.dataset.dataset_root, cfg.dataset.do_validation, cfg.dataset.do_test = arguments.dataset_root, False, False
    if packed:
        cfg.dataset.packed_sequence_specs = PackedSequenceSpecs(packed_sequence_size=arguments.seq_length)
    return cfg


if __name__ == "__main__":
    main()
