# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What test functions do on a rank: make pretrained weights, finetune a tiny model, look at its parts."""

from pathlib import Path
from typing import Any

import torch

from megatron.bridge.training.callbacks import Callback, CallbackContext
from tests.rigs.tiny import SEQ_LENGTH, tiny_config


class Recorder(Callback):
    """Keeps losses, learning rates and weights of a run, all exact."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.validation: list[float] = []
        self.learning_rates: list[float] = []
        self.weights_before: dict[str, torch.Tensor] = {}
        self.weights_after: dict[str, torch.Tensor] = {}
        self.train_state: dict[str, Any] = {}

    def on_train_start(self, context: CallbackContext) -> None:
        self.weights_before = weights_of(context.model)

    def on_train_step_end(self, context: CallbackContext) -> None:
        from megatron.bridge.training.monitoring.progress import learning_rate

        self.losses.append(context.loss_dict["lm loss"])
        self.learning_rates.append(learning_rate(context))

    def on_eval_end(self, context: CallbackContext) -> None:
        self.validation.append(context.loss_dict["lm loss"])

    def on_train_end(self, context: CallbackContext) -> None:
        self.weights_after = weights_of(context.model)
        self.train_state = dict(vars(context.state.train_state))
        forget_last_forward(context.model)


def weights_of(model: list[Any]) -> dict[str, torch.Tensor]:
    """A copy of every parameter, by chunk and name, in host memory."""
    return {
        f"{index}.{name}": param.detach().clone().cpu()
        for index, chunk in enumerate(model)
        for name, param in chunk.named_parameters()
    }


def forget_last_forward(model: list[Any]) -> None:
    """Let a model go, and with it its process groups, whose threads wake a hundred times a second each.

    Core's expert dispatchers keep tensors of the last forward pass, whose graph leads back to the model on ways that
    Python's collector doesn't see; its rotary embedding keeps the last 32 modules that it was called for.
    """
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    for cached in vars(RotaryEmbedding).values():
        if hasattr(cached, "cache_clear"):
            cached.cache_clear()
    for chunk in model:
        for module in chunk.modules():
            if hasattr(module, "token_dispatcher"):
                kept = vars(module.token_dispatcher)
                kept.update({name: None for name, value in kept.items() if isinstance(value, torch.Tensor)})


def make_pretrained(directory: str | Path, *, seed: int = 7, model: dict[str, Any] | None = None) -> None:
    """Write a weights-only Megatron checkpoint of the tiny model; every rank of the task takes part."""
    from megatron.bridge.checkpoint.model_checkpoint import save_model_checkpoint
    from megatron.bridge.training.config import runtime_config_update
    from megatron.bridge.utils.distributed import destroy_model_parallel, model_parallel_groups

    cfg = tiny_config(directory, model=model or {})
    runtime_config_update(cfg)
    sizes = (cfg.model.tensor_model_parallel_size, cfg.model.pipeline_model_parallel_size)
    with model_parallel_groups(*sizes, seed=seed):
        chunks = cfg.model.provide_distributed_model(wrap_with_ddp=False)
        save_model_checkpoint(chunks, directory, run_config={"model": cfg.to_dict()["model"]})
    destroy_model_parallel()


def run_finetune(cfg: Any) -> Recorder:
    """Finetune with a recorder attached."""
    from megatron.bridge.training.finetune import finetune
    from megatron.bridge.training.gpt_step import forward_step

    recorder = Recorder()
    finetune(cfg, forward_step, callbacks=[recorder])
    return recorder


def finetune_from_hf(
    directory: Path, *, offload: bool, save: bool, recompute: bool = True, sizes: Any = ()
) -> Recorder:
    """Finetune the tiny model in `directory/hf` for 3 steps at TP 2 with sequence parallelism.

    Args:
        directory: Where `megatron` is saved to, if anything.
        offload: Half of the optimizer is on the CPU.
        save: Save a checkpoint at the end.
        recompute: Recompute all activations of each layer.
        sizes: Other sizes of the provider, by name.
    """
    from megatron.bridge import AutoBridge

    model = AutoBridge.from_hf_pretrained(directory / "hf").to_megatron_provider(load_weights=False)
    model.tensor_model_parallel_size, model.sequence_parallel = 2, True
    for name, value in dict(sizes).items():
        setattr(model, name, value)
    model.seq_length, model.calculate_per_token_loss = SEQ_LENGTH, True
    if recompute:
        model.recompute_granularity, model.recompute_method, model.recompute_num_layers = "full", "uniform", 1
    cfg = tiny_config(
        directory,
        train_iters=3,
        train={"micro_batch_size": 4},
        optimizer={"optimizer_cpu_offload": offload, "optimizer_offload_fraction": 0.5, "lr": 5e-3},
        checkpoint={
            "pretrained_checkpoint": str(directory / "hf"),
            "save": str(directory / "megatron") if save else None,
        },
    )
    cfg.model = model
    return run_finetune(cfg)


def differing(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> dict[str, float]:
    """Largest difference of each tensor that isn't bit-exact; empty if all are."""
    assert first.keys() == second.keys() and first, (sorted(first), sorted(second))
    return {
        name: float((first[name].float() - second[name].float()).abs().max())
        for name in first
        if not torch.equal(first[name], second[name])
    }


def build_training(cfg: Any) -> tuple[list[Any], Any, Any]:
    """Model, optimizer and schedule of a configuration, on random weights, with nothing loaded."""
    from megatron.bridge.training.config import runtime_config_update
    from megatron.bridge.training.initialize import initialize_megatron
    from megatron.bridge.training.optim import setup_optimizer

    runtime_config_update(cfg)
    pg_collection = initialize_megatron(cfg)
    model = cfg.model.provide_distributed_model(ddp_config=cfg.ddp, pg_collection=pg_collection)
    optimizer, scheduler = setup_optimizer(cfg.optimizer, cfg.scheduler, model, cfg.dist.use_gloo_process_groups)
    return model, optimizer, scheduler


def fill_weights(model: list[Any], *, seed: int) -> None:
    """Overwrite every weight in place, the same on every rank, as a load does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for chunk in model:
            for param in chunk.parameters():
                param.copy_(torch.randn(param.shape, generator=generator) * 0.02 + (param.dim() == 1))


def take_step(model: list[Any], optimizer: Any, *, seed: int = 0) -> None:
    """One optimizer step on made-up gradients, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    optimizer.zero_grad()
    for chunk in model:
        chunk.zero_grad_buffer()
        for param in chunk.parameters():
            param.main_grad.copy_(torch.randn(param.shape, generator=generator))
        chunk.finish_grad_sync()
    optimizer.step()
