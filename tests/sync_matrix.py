# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""One cell of the sync's matrix, on the ranks: a model, an offloaded optimizer, and every way that weights come in.

Each way starts from random weights and an optimizer built on them. Then the weights come in, and three things must
hold, to the bit:

1. every tensor that a sub-optimizer steps on, and every FP32 shard, equals its weight;
2. a step with learning rate 0 leaves every weight;
3. three training steps equal those of the run whose weights were in place when its optimizer was built. Without CUDA
   that run equals, in turn, the run without offload.
"""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron.bridge.checkpoint import model_checkpoint
from tests.on_ranks import differing, fill_weights, weights_of
from tests.tiny import fp32_norm_layer_spec, tiny_config

SIZES = {
    "num_layers": 1,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "vocab_size": 64,
    "seq_length": 16,
    "share_embeddings_and_output_weights": False,
}
EXPERTS = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 32,
    "moe_token_dispatcher_type": "alltoall",
    "expert_model_parallel_size": 2,
    "expert_tensor_parallel_size": 1,
}
LAYOUTS = {
    "TP1": {},
    "TP2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "TP2 without SP": {"tensor_model_parallel_size": 2},
    "PP2": {"num_layers": 2, "pipeline_model_parallel_size": 2, "share_embeddings_and_output_weights": True},
    "PP2 VP2": {
        "num_layers": 4,
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2,
        "overlap_p2p_comm": True,
        "batch_p2p_comm": False,
    },
    "two instances": {},
}
STEPS = 3
ADAMS_APART = 2 * STEPS * 1e-3
"""On CUDA, how far a weight may be from the run without offload: the CPU's Adam and the GPU's round differently, and a
gradient near zero may then move its weight by a learning rate (1e-3) a step in the other direction."""


@dataclass(frozen=True)
class Model:
    """What decides the weights and how ranks share them."""

    precision: str = "bf16"
    """bf16, fp16, or bf16+fp32: norms kept in FP32."""
    kind: str = "dense"
    """dense, or experts (expert parallel 2)."""
    layout: str = "TP1"


@dataclass(frozen=True)
class Cell:
    """A model and how its optimizer is offloaded."""

    model: Model
    precision_aware: bool = False
    fraction: float = 1.0
    overlap: bool = False

    def __str__(self) -> str:
        mode = "precision_aware" if self.precision_aware else "fp32_shards"
        overlap = "overlap" if self.overlap else "serial"
        model = f"{self.model.precision}-{self.model.kind}-{self.model.layout}".replace(" ", "_")
        return f"{model}-{mode}-{self.fraction}-{overlap}"


WAYS = {
    "pretrained checkpoint": {"pretrained_checkpoint": "pretrained"},
    "finetune=True": {"load": "full", "finetune": True},
    "load_optim=False": {"load": "full", "load_optim": False},
    "checkpoint without optimizer state": {"load": "no_optim"},
    "release checkpoint": {"load": "released"},
    "local checkpoint": {"non_persistent_ckpt_type": "local", "non_persistent_local_ckpt_dir": "local"},
    "Hugging Face directory": {"pretrained_checkpoint": "hf"},
    "FP32 checkpoint": {"pretrained_checkpoint": "fp32", "load_main_params_from_ckpt": True, "load_optim": False},
    "running process": {},
    "frozen base": {},
}
"""How the weights come in, as options of `checkpoint`; paths lie below the model's directory."""
SCALED = 1 + 1e-4
"""An FP32 checkpoint's weights over their 16-bit rounding: too small a step to round to another one."""


class Run(NamedTuple):
    """A run with its weights in place, ready to step."""

    cfg: Any
    model: list[Any]
    optimizer: Any
    scheduler: Any
    train_step: Any


class Trace(NamedTuple):
    """What a run's steps did: the one at learning rate 0, then the real ones."""

    losses: list[float]
    weights: list[dict[str, torch.Tensor]]


def config(directory: Path, model: Model, *, offload: dict[str, Any], checkpoint: dict[str, Any]) -> Any:
    """The configuration of a run, resolved and checked."""
    from megatron.bridge.training.config import runtime_config_update
    from megatron.bridge.training.mixed_precision import get_mixed_precision_config

    fields = {**SIZES, **(EXPERTS if model.kind == "experts" else {}), **LAYOUTS[model.layout]}
    if model.precision == "bf16+fp32":
        fields["transformer_layer_spec"] = fp32_norm_layer_spec
    checkpoint = {"save": None, **checkpoint}
    for option in ("load", "save", "pretrained_checkpoint", "non_persistent_local_ckpt_dir"):
        if checkpoint.get(option):
            checkpoint[option] = str(directory / checkpoint[option])
    cfg = tiny_config(
        directory,
        model=fields,
        optimizer=offload,
        train={"micro_batch_size": 4 if model.layout.startswith("TP2") else 2, "global_batch_size": 4},
        tokenizer={"vocab_size": SIZES["vocab_size"]},
        checkpoint=checkpoint,
    )
    cfg.mixed_precision = get_mixed_precision_config("fp16_mixed" if model.precision == "fp16" else "bf16_mixed")
    cfg.mixed_precision.initial_loss_scale = 2.0**8  # a real scale, and no step overflows
    cfg.mixed_precision.grad_reduce_in_fp32 = True  # precision-aware mode wants it for FP16
    if model.layout == "two instances":
        cfg.ddp.num_distributed_optimizer_instances = 2
    runtime_config_update(cfg)
    return cfg


def offload_options(cell: Cell) -> dict[str, Any]:
    return {
        "optimizer_cpu_offload": True,
        "optimizer_offload_fraction": cell.fraction,
        "overlap_cpu_optimizer_d2h_h2d": cell.overlap,
        "use_precision_aware_optimizer": cell.precision_aware,
    }


def build_model(cfg: Any, *hooks: Any) -> list[Any]:
    """Process groups and model."""
    from megatron.bridge.training.initialize import initialize_megatron
    from megatron.bridge.utils.distributed import destroy_model_parallel

    _let_go_of_the_last_model()
    destroy_model_parallel()
    pg_collection = initialize_megatron(cfg)
    for hook in hooks:
        cfg.model.register_pre_wrap_hook(hook)
    _last_model.extend(cfg.model.provide_distributed_model(ddp_config=cfg.ddp, pg_collection=pg_collection))
    return list(_last_model)


_last_model: list[Any] = []


def _let_go_of_the_last_model() -> None:
    """What is left of a model holds its process groups, and each of those a thread or more.

    Core's expert dispatchers keep tensors of the last forward pass, whose graph leads back to the model on ways that
    Python's collector doesn't see.
    """
    for chunk in _last_model:
        for module in chunk.modules():
            if hasattr(module, "token_dispatcher"):
                kept = vars(module.token_dispatcher)
                kept.update({name: None for name, value in kept.items() if isinstance(value, torch.Tensor)})
    _last_model.clear()
    gc.collect()


def start(cfg: Any, model: list[Any]) -> Run:
    """A new optimizer on the model's weights of now."""
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.micro_batches import bind_forward_step
    from megatron.bridge.training.optim import setup_optimizer
    from megatron.bridge.training.setup import SetupOutput, connect_schedules
    from megatron.bridge.training.state import GlobalState
    from megatron.bridge.training.train import train_step

    optimizer, scheduler = setup_optimizer(cfg.optimizer, cfg.scheduler, model, cfg.dist.use_gloo_process_groups)
    connect_schedules(model, optimizer, cfg)
    state = GlobalState(cfg)
    bound = bind_forward_step(forward_step, state)
    batches = _micro_batches(cfg.train.micro_batch_size)
    output = SetupOutput(state, model, optimizer, scheduler, None, None, None, {}, None)
    return Run(cfg, model, optimizer, scheduler, lambda: train_step(output, bound, batches))


def _micro_batches(rows_each: int) -> list[dict[str, torch.Tensor]]:
    """This rank's part of one global batch of 4 sequences."""
    from megatron.core import mpu

    size, rank = mpu.get_data_parallel_world_size(), mpu.get_data_parallel_rank()
    length, vocab = SIZES["seq_length"], SIZES["vocab_size"]
    rows = torch.arange(4)[:, None] * 7 + torch.arange(length + 1)[None] * torch.tensor([[1], [2], [3], [5]])
    batches = [
        {
            "tokens": part[:, :-1],
            "labels": part[:, 1:],
            "loss_mask": torch.ones(rows_each, length),
            "position_ids": torch.arange(length).repeat(rows_each, 1),
        }
        for part in (rows % vocab).split(rows_each)
    ]
    return batches[rank::size]


def load(run: Run) -> None:
    """`load_checkpoint`, as a starting run calls it."""
    from megatron.bridge.training.checkpointing import load_checkpoint
    from megatron.bridge.training.state import GlobalState

    load_checkpoint(GlobalState(run.cfg), run.model, run.optimizer, run.scheduler)


def trace(run: Run) -> Trace:
    """One step with learning rate 0, then the real ones."""
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0
    losses, weights = [], []
    for _ in range(1 + STEPS):
        result = run.train_step()
        assert result.updated, "a step was skipped: the loss scale is too high for this model"
        losses.append(result.losses["lm loss"])
        weights.append(weights_of(run.model))
    return Trace(losses, weights)


def copies_and_weights(optimizer: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(copy, this rank's slice of the weight) for all that the sub-optimizers step on and for every FP32 shard.

    Read from Core's own books, not through the code under test.
    """
    pairs = []
    for child in optimizer.chained_optimizers:
        if child.optimizer is None:
            continue
        groups = (child.model_float16_groups, child.shard_float16_groups, child.shard_fp32_from_float16_groups)
        rows = [row for group in zip(*groups, strict=True) for row in zip(*group, strict=True)]
        for models, shards in zip(child.model_fp32_groups, child.shard_fp32_groups, strict=True):
            rows += [(param, shard, None) for param, shard in zip(models, shards, strict=True)]
        weight_of = {}
        for param, shard, main in rows:
            owned = child._get_model_param_range_map(param)["param"]
            weight = param.detach().view(-1)[owned.start : owned.end]
            weight_of[shard if main is None else main] = weight
            pairs += [] if main is None else [(main, weight)]
        inner_to_given = getattr(child.optimizer, "inner_param_to_orig_param", {})
        for part in getattr(child.optimizer, "sub_optimizers", []):
            for inner in (param for group in part.param_groups for param in group["params"]):
                pairs.append((inner, weight_of[inner_to_given[inner]]))
    assert pairs, "nothing is stepped on"
    return pairs


def moments(optimizer: Any) -> list[torch.Tensor]:
    """Adam's state, cloned: both moments and the step of each parameter."""
    parts = [part for child in optimizer.chained_optimizers for part in child.optimizer.sub_optimizers]
    return [
        torch.as_tensor(state[key]).clone()
        for part in parts
        for state in part.state.values()
        for key in ("exp_avg", "exp_avg_sq", "step")
        if key in state
    ]


def freeze_half(directory: Path) -> Any:
    """A hook that runs before the optimizer exists, as for adapters: load the base weights, then freeze some."""

    def hook(chunks: list[Any]) -> None:
        model_checkpoint.load_model_weights(chunks, directory / "pretrained")
        for chunk in chunks:
            for name, param in chunk.named_parameters():
                param.requires_grad_("linear_proj" in name or "norm" in name or "linear_fc2" in name)

    return hook


def scale_masters(optimizer: Any) -> None:
    """Give the copies of 16-bit weights the values that the FP32 checkpoint holds."""
    done = set()
    for copy, weight in copies_and_weights(optimizer):
        if weight.dtype != torch.float32 and id(copy) not in done:
            copy.data.mul_(SCALED)
            done.add(id(copy))


def bring_in(way: str, directory: Path, run: Run) -> Run:
    """Let the weights come in, as `way` says; returns the run that has them."""
    from megatron.bridge.training.checkpointing import sync_hybrid_optimizer_param_copies

    if way == "running process":
        for _ in range(2):
            run.train_step()
        before = moments(run.optimizer) if run.cfg.optimizer.optimizer_cpu_offload else []
        model_checkpoint.load_model_weights(run.model, directory / "pretrained")
        if run.cfg.optimizer.optimizer_cpu_offload:
            sync_hybrid_optimizer_param_copies(run.optimizer)
            after = moments(run.optimizer)
            assert before and all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "moments changed"
        else:
            run.optimizer.reload_model_params()
    elif way == "in place, FP32":
        scale_masters(run.optimizer)
    elif WAYS.get(way):
        load(run)
    return run


def run_way(way: str, directory: Path, model: Model, offload: dict[str, Any], chunks: list[Any]) -> tuple[list, Trace]:
    """One run from random weights; the copies and weights it found before its first step, and what its steps did."""
    cfg = config(directory, model, offload=offload, checkpoint=WAYS.get(way, {}))
    if way == "frozen base":
        chunks = build_model(cfg, freeze_half(directory))
    elif way.startswith("in place"):
        model_checkpoint.load_model_weights(chunks, directory / "pretrained")
    else:
        fill_weights(chunks, seed=99)
    run = bring_in(way, directory, start(cfg, chunks))
    found = [(copy.detach().cpu().clone(), weight.cpu().clone()) for copy, weight in copies_and_weights(run.optimizer)]
    return found, trace(run)


_PLAIN: dict[tuple, Trace] = {}
"""Runs without offload, which serve every cell of a model: kept by the process of each rank."""


def plain(way: str, directory: Path, model: Model) -> Trace:
    """The run without offload whose weights came in the same way, or were in place."""
    way = {"FP32 checkpoint": "in place, FP32"}.get(
        way, way if way in ("running process", "frozen base") else "in place"
    )
    key = (way, directory, model)
    if key not in _PLAIN:
        chunks = build_model(config(directory, model, offload={}, checkpoint={}))
        _PLAIN[key] = run_way(way, directory, model, {}, chunks)[1]
    return _PLAIN[key]


def run_cell(directory: Path, cell: Cell, ways: list[str]) -> dict[str, str]:
    """Every way of a cell: "passed", or what differs."""
    from megatron.bridge.utils.device import is_simulated

    offload = offload_options(cell)
    expected = {way: plain(way, directory, cell.model) for way in ways}
    chunks = build_model(config(directory, cell.model, offload=offload, checkpoint={}))
    in_place = run_way("in place", directory, cell.model, offload, chunks)[1]
    verdicts = {}
    for way in sorted(ways, key=lambda way: way == "frozen base"):  # which rebuilds the model
        found, traced = run_way(way, directory, cell.model, offload, chunks)
        verdict = _copies(way, found)
        if WAYS[way] and way != "FP32 checkpoint":
            verdict = verdict or _apart(traced, in_place, tolerance=0.0)
        verdict = verdict or _apart(traced, expected[way], tolerance=0.0 if is_simulated() else ADAMS_APART)
        still = not differing(traced.weights[0], traced.weights[-1])
        verdicts[way] = verdict or ("no step moved a weight" if still else "passed")
    return verdicts


def _copies(way: str, found: list[tuple[torch.Tensor, torch.Tensor]]) -> str:
    """Which copy is not its weight; empty where all are."""
    for copy, weight in found:
        exact = weight.float() * (SCALED if way == "FP32 checkpoint" and weight.dtype != torch.float32 else 1)
        if not torch.equal(copy.float(), exact):
            return f"a copy of shape {tuple(copy.shape)} is off by {float((copy.float() - exact).abs().max())}"
    return ""


def _apart(traced: Trace, reference: Trace, *, tolerance: float) -> str:
    """Where two runs differ by more than the tolerance; empty where they don't."""
    for step, (weights, wanted) in enumerate(zip(traced.weights, reference.weights, strict=True)):
        apart = {name: by for name, by in differing(weights, wanted).items() if by > tolerance}
        if apart:
            return f"after step {step}: {apart}"
    if not tolerance and traced.losses != reference.losses:
        return f"losses {traced.losses}, expected {reference.losses}"
    return ""
