# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
r"""What packing gains: tokens a second of the same training, with one sample a row and with several.

    make model                                    # SmolLM2's tokenizer and the data
    python -m benchmarks.packing                  # SmolLM2-135M's shape, 2 of its layers
    python -m benchmarks.packing --num-layers 30 --seq-length 512 --steps 12

One process, random weights. A step takes about as many samples in both runs; tokens of padding don't count. The first
step of each run is left out.
"""

import argparse
import logging

from benchmarks.figures import Figure, run
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


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-layers", type=int, default=2)
    parser.add_argument("--seq-length", type=int, default=256, help="positions of a packed row")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--dataset-root", default="data/chatterbot")
    parser.add_argument("--tokenizer", default="data/smollm2-135m-instruct")
    return parser


def measure(arguments: argparse.Namespace) -> list[Figure]:
    """Both runs, one after the other."""
    logging.disable(logging.INFO)
    alone, alone_padding = _seconds_per_token(arguments, rows=4, batch=16, packed=False)
    packed, padding = _seconds_per_token(arguments, rows=1, batch=4, packed=True)
    note = f"{padding:.0%} of the packed positions are padding, {alone_padding:.0%} of the others'"
    return [Figure("time of a token, packed", "one sample a row", (packed / alone,), 1.0, note=note)]


def _seconds_per_token(arguments: argparse.Namespace, *, rows: int, batch: int, packed: bool) -> tuple[float, float]:
    """Seconds of a run for each of its tokens, and the part of its positions that is padding."""
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
    tokens, positions = int(dataset.lengths[drawn].sum()), sum(shapes[batch // rows :])
    return sum(clock.seconds[1:]) / tokens, 1 - tokens / positions


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
    run(measure, build_parser())
