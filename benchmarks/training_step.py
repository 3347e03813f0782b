# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What the training loop costs beside a bare loop on megatron-core with the same model, weights and batches.

    python -m benchmarks.training_step

Our side is `pretrain` with its defaults: data loader, progress, metrics file, watchdog, summary, checks of the loss.
The last callback of each step takes a step of the bare loop, so both advance in turn in one process. Their losses must
agree. Ours is timed from the end of one such turn to the beginning of the next.
"""

import argparse
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module

from benchmarks.figures import Figure, ratios, run
from megatron.bridge.data.config import DatasetProvider
from megatron.bridge.recipes.smollm2 import smollm2_135m_sft_config
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain
from megatron.bridge.utils import device

VOCAB, HEADS, LR = 8192, 4, 1e-4
UNCOUNTED = 3
"""Turns at the start: the optimizer's state and the allocator's memory come into being."""


SIMULATED_TOLERANCE, GPU_TOLERANCE = 1e-5, 2e-3
"""Between the loops' losses, relative. On the simulated accelerator both call the same kernels. On a GPU bf16 kernels
aren't made deterministic here, so sums come in another order: 1.1e-4 was seen, and it may grow from step to step."""


def bare_model(shape: dict[str, int], seq_length: int) -> GPTModel:
    """The model of `config`'s runs in bf16, built of megatron-core alone, with random weights."""
    config = TransformerConfig(
        **shape,
        normalization="RMSNorm",
        activation_func=torch.nn.functional.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        layernorm_epsilon=1e-5,
        bf16=True,
        params_dtype=torch.bfloat16,
        calculate_per_token_loss=True,
    )
    layers = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    return GPTModel(
        config,
        layers,
        VOCAB,
        seq_length,
        share_embeddings_and_output_weights=True,
        position_embedding_type="rope",
        rotary_base=100000,
    )


class BareLoop:
    """A training loop as short as megatron-core allows."""

    def __init__(self, shape: dict[str, int], seq_length: int, weights: dict[str, torch.Tensor]) -> None:
        self.seq_length = seq_length
        model = bare_model(shape, seq_length)
        self.config = model.config
        model.load_state_dict(weights, strict=False)
        model.to(device.current_device())
        ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
        self.model = DistributedDataParallel(self.config, ddp, Float16Module(self.config, model))
        options = OptimizerConfig(
            optimizer="adam",
            lr=LR,
            min_lr=LR,
            weight_decay=0.01,
            clip_grad=1.0,
            adam_beta1=0.9,
            adam_beta2=0.98,
            adam_eps=1e-8,
            bf16=True,
            params_dtype=torch.bfloat16,
            use_distributed_optimizer=True,
        )
        overrides = get_standard_config_overrides(options)
        self.optimizer = get_megatron_optimizer(options, [self.model], overrides, use_gloo_process_groups=False)
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=LR,
            min_lr=LR,
            lr_warmup_steps=0,
            lr_decay_steps=1000,
            lr_decay_style="constant",
            start_wd=0.01,
            end_wd=0.01,
            wd_incr_steps=1,
            wd_incr_style="constant",
        )
        self.config.grad_scale_func = self.optimizer.scale_loss
        self.config.finalize_model_grads_func = finalize_model_grads
        self.model.train()

    def step(self, micro_batches: list[dict[str, Any]]) -> float:
        """One optimizer step; returns its loss."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        reported = get_forward_backward_func()(
            forward_step_func=_bare_forward,
            data_iterator=iter(micro_batches),
            model=self.model,
            num_microbatches=len(micro_batches),
            seq_length=self.seq_length,
            micro_batch_size=micro_batches[0]["tokens"].shape[0],
            forward_only=False,
        )
        self.optimizer.step()
        self.scheduler.step(increment=len(micro_batches))
        loss, tokens = torch.stack([report["lm loss"] for report in reported]).sum(0).tolist()
        return loss / tokens


def _bare_forward(data_iterator: Any, model: Any) -> tuple[torch.Tensor, Any]:
    where = device.current_device()
    batch = {name: value.to(where) for name, value in next(data_iterator).items() if value is not None}

    def loss_function(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        loss, tokens = torch.sum(losses.float() * batch["loss_mask"]), batch["loss_mask"].sum().int()
        return loss, tokens, {"lm loss": torch.stack([loss.detach(), tokens.float()])}

    return model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"]), loss_function


def tolerance() -> float:
    """How far apart the loops' losses may be, relative, on this process's device."""
    return SIMULATED_TOLERANCE if device.is_simulated() else GPU_TOLERANCE


class Turns(Callback):
    """After each of our steps, the bare loop's, and both their times."""

    def __init__(self, shape: dict[str, int]) -> None:
        """Has taken no turn yet."""
        self._shape = shape
        self.micro_batches: list[dict[str, Any]] = []
        self.ours: list[float] = []
        self.bare: list[float] = []
        self.largest_difference = 0.0
        """Between the losses, relative."""

    def on_train_start(self, context: CallbackContext) -> None:
        """Build the bare loop from the weights that ours starts with."""
        state = context.model[0].module.module.state_dict()
        weights = {name: value.clone() for name, value in state.items() if isinstance(value, torch.Tensor)}
        self._loop = BareLoop(self._shape, context.state.cfg.model.seq_length, weights)
        self._resumed = time.perf_counter()

    def on_train_step_end(self, context: CallbackContext) -> None:
        """Take the bare loop's turn."""
        device.synchronize()
        stopped = time.perf_counter()
        self.ours.append(stopped - self._resumed)
        loss = self._loop.step(self.micro_batches)
        device.synchronize()
        self.bare.append(time.perf_counter() - stopped)
        ours = context.loss_dict["lm loss"]
        self.largest_difference = max(self.largest_difference, abs(loss - ours) / abs(ours))
        if not math.isclose(loss, ours, rel_tol=tolerance()):
            raise RuntimeError(f"the loops differ: bare loss {loss}, ours {ours}, beyond {tolerance():g} relative")
        self.micro_batches.clear()
        self._resumed = time.perf_counter()


@dataclass
class RandomTokens(DatasetProvider):
    """Rows of random tokens, each of its own length."""

    num_samples: int = 0
    seq_length: int = 0

    def build_datasets(self, context: Any) -> tuple[Any, Any, Any]:
        """No validation."""
        generator = torch.Generator().manual_seed(1)
        rows = torch.randint(VOCAB, (self.num_samples, self.seq_length + 1), generator=generator)
        ones = torch.ones(self.seq_length)
        return [{"tokens": row[:-1], "labels": row[1:], "loss_mask": ones} for row in rows], None, None


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--seq-length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=40)
    return parser


def measure(arguments: argparse.Namespace) -> list[Figure]:
    """A step that is long enough for its time to be work, and one so short that what is left is overhead."""
    large = _turns(arguments.hidden_size, arguments.seq_length, arguments.steps)
    small = _turns(64, 32, 5 * arguments.steps)
    apart = max(large.largest_difference, small.largest_difference)
    losses = f"the losses differ by {apart:.1g} at most" if apart else "the losses are equal"
    overhead = tuple(1e3 * (ours - bare) for ours, bare in zip(small.ours, small.bare, strict=True))
    return [
        Figure(
            "training step, offload off",
            "a bare megatron-core loop",
            ratios(tuple(large.ours), tuple(large.bare)),
            1.02,
            fails_above=1.1,
            note=f"a bare step takes {1e3 * median(large.bare):.0f} ms; {losses}",
        ),
        Figure(
            "what the loop adds to a step",
            "a bare megatron-core loop",
            overhead,
            2.0,
            "ms",
            fails_above=6.0,
            note=f"on a tiny model, whose bare step takes {1e3 * median(small.bare):.0f} ms",
        ),
    ]


def _turns(hidden_size: int, seq_length: int, steps: int) -> Turns:
    shape = model_shape(hidden_size)
    turns = Turns(shape)

    def watched(state, data_iterator, model):
        turns.micro_batches.append(next(data_iterator))
        return forward_step(state, iter(turns.micro_batches[-1:]), model)

    with tempfile.TemporaryDirectory() as directory:
        cfg = config(shape, seq_length, steps + UNCOUNTED, Path(directory))
        pretrain(cfg, watched, callbacks=[turns])
    turns.ours, turns.bare = turns.ours[UNCOUNTED:], turns.bare[UNCOUNTED:]
    return turns


def model_shape(hidden_size: int, *, num_layers: int = 4) -> dict[str, int]:
    """The fields of a model's configuration that say its size."""
    return {
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "ffn_hidden_size": 4 * hidden_size,
        "num_attention_heads": HEADS,
        "num_query_groups": HEADS,
        "kv_channels": hidden_size // HEADS,
    }


def config(
    shape: dict[str, int], seq_length: int, steps: int, directory: Path, *, micro_batches: int = 2
) -> ConfigContainer:
    """A run of a model of that shape on random tokens, a row a micro-batch, that saves nothing."""
    cfg = smollm2_135m_sft_config()
    for name, value in shape.items():
        setattr(cfg.model, name, value)
    cfg.model.vocab_size, cfg.model.seq_length, cfg.model.transformer_impl = VOCAB, seq_length, "local"
    cfg.train.train_iters, cfg.train.micro_batch_size, cfg.train.global_batch_size = steps, 1, micro_batches
    cfg.optimizer.optimizer_cpu_offload = False
    cfg.optimizer.lr = cfg.optimizer.min_lr = LR
    cfg.scheduler.lr_decay_style, cfg.scheduler.lr_warmup_iters = "constant", 0
    cfg.validation.eval_iters, cfg.validation.eval_at_start = 0, False
    cfg.dataset = RandomTokens(num_samples=micro_batches * steps, seq_length=seq_length)
    cfg.tokenizer.tokenizer_type, cfg.tokenizer.vocab_size = "NullTokenizer", VOCAB
    cfg.checkpoint.save = cfg.checkpoint.load = cfg.checkpoint.pretrained_checkpoint = None
    cfg.logger.tensorboard_dir, cfg.logger.metrics_file = None, str(directory / "metrics.jsonl")
    return cfg


if __name__ == "__main__":
    run(measure, build_parser())
