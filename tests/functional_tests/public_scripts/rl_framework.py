# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What an RL framework does: set up by hand, load, sync, step, hand weights to the inference engine, save, continue."""

import sys

import torch
from common import finetuning_config
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron.bridge import AutoBridge
from megatron.bridge.models.model_provider import get_model
from megatron.bridge.training.checkpointing import (
    checkpoint_exists,
    init_checkpointing_context,
    load_checkpoint,
    maybe_finalize_async_save,
    save_checkpoint,
)
from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.training.initialize import destroy_global_state, initialize_megatron, set_jit_fusion_options
from megatron.bridge.training.optim import setup_optimizer, sync_hybrid_device_optimizer_fp32_master_copies
from megatron.bridge.training.state import GlobalState
from megatron.bridge.training.utils.pg_utils import get_pg_collection
from megatron.bridge.utils.common_utils import get_rank_safe


class Worker:
    def __init__(self, cfg: ConfigContainer) -> None:
        self.state = GlobalState()
        self.state.cfg = cfg
        initialize_megatron(cfg=cfg, get_embedding_ranks=None, get_position_embedding_ranks=None)
        set_jit_fusion_options(cfg.model, cfg.train.micro_batch_size)
        start_time = torch.tensor([self.state.start_time], dtype=torch.double, device="cuda")
        torch.distributed.all_reduce(start_time, op=torch.distributed.ReduceOp.MIN)
        self.state.start_time = start_time.item()

        self.checkpointing_context = init_checkpointing_context(cfg.checkpoint)
        self.model = get_model(
            cfg.model,
            cfg.ddp,
            use_torch_fsdp2=cfg.dist.use_torch_fsdp2,
            overlap_param_gather_with_optimizer_step=cfg.optimizer.overlap_param_gather_with_optimizer_step,
            data_parallel_random_init=cfg.rng.data_parallel_random_init,
        )
        self.optimizer, self.scheduler = setup_optimizer(
            optimizer_config=cfg.optimizer,
            scheduler_config=cfg.scheduler,
            model=self.model,
            use_gloo_process_groups=cfg.dist.use_gloo_process_groups,
        )
        if checkpoint_exists(cfg.checkpoint.load) or checkpoint_exists(cfg.checkpoint.pretrained_checkpoint):
            load_checkpoint(
                self.state,
                self.model,
                self.optimizer,
                self.scheduler,
                checkpointing_context=self.checkpointing_context,
                skip_load_to_model_and_opt=False,
            )
        self.pg_collection = get_pg_collection(self.model)

    def train(self, batches: list[dict[str, torch.Tensor]]) -> dict[str, float]:
        for chunk in self.model:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

        def forward_step(data_iterator, model):
            batch = next(data_iterator)
            output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])

            def policy_loss(output_tensor):
                loss = (output_tensor.float() * batch["loss_mask"]).sum() / batch["loss_mask"].sum()
                return loss, {"policy_loss": loss.detach()}

            return output, policy_loss

        losses = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=self.model,
            num_microbatches=len(batches),
            seq_length=batches[0]["tokens"].shape[1],
            micro_batch_size=batches[0]["tokens"].shape[0],
            forward_only=False,
        )
        update_successful, grad_norm, _ = self.optimizer.step()
        assert update_successful
        self.scheduler.step(increment=get_num_microbatches() * self.state.cfg.train.micro_batch_size)
        self.state.train_state.step += 1
        return {"loss": float(losses[0]["policy_loss"]), "grad_norm": float(grad_norm)}

    def save(self, weights_path: str) -> None:
        cfg = self.state.cfg
        cfg.checkpoint.save = weights_path
        self.state.initialize_async_checkpoint_worker()
        maybe_finalize_async_save(self.state, ckpt_cfg=cfg.checkpoint, blocking=False)
        save_checkpoint(
            state=self.state,
            model=self.model,
            optimizer=self.optimizer,
            opt_param_scheduler=self.scheduler,
            num_floating_point_operations_so_far=self.state.train_state.floating_point_operations_so_far,
            checkpointing_context=self.checkpointing_context,
        )
        maybe_finalize_async_save(self.state, ckpt_cfg=cfg.checkpoint, blocking=True, terminate=True)


def batch_of(seed: int) -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, 300, (1, 17), generator=torch.Generator().manual_seed(seed))
    return {
        "tokens": tokens[:, :-1].cuda(),
        "labels": tokens[:, 1:].cuda(),
        "position_ids": torch.arange(16).unsqueeze(0).cuda(),
        "loss_mask": torch.ones(1, 16).cuda(),
    }


def config(hf_model: str, data: str, output: str, *, is_async: bool = False) -> ConfigContainer:
    cfg = finetuning_config(hf_model, data, output)
    cfg.mixed_precision = None
    cfg.model.bf16 = cfg.optimizer.bf16 = True
    cfg.model.params_dtype = cfg.model.pipeline_dtype = torch.bfloat16
    cfg.model.calculate_per_token_loss = False
    cfg.ddp.average_in_collective = False
    cfg.optimizer.optimizer_cpu_offload = True
    cfg.optimizer.optimizer_offload_fraction = 1.0
    cfg.optimizer.overlap_cpu_optimizer_d2h_h2d = True
    cfg.checkpoint.async_save = is_async
    cfg.validate()
    return cfg


if __name__ == "__main__":
    hf_model, data, output = sys.argv[1:]
    bridge = AutoBridge.from_hf_pretrained(hf_model)
    AutoBridge.import_ckpt(hf_model, f"{output}/imported", torch_dtype=torch.bfloat16)

    cfg = config(hf_model, data, f"{output}/checkpoints")
    cfg.checkpoint.pretrained_checkpoint = f"{output}/imported"
    worker = Worker(cfg)
    first = worker.train([batch_of(0), batch_of(1)])
    bridge.load_hf_weights(worker.model)
    assert sync_hybrid_device_optimizer_fp32_master_copies(worker.optimizer) is True
    again = worker.train([batch_of(0), batch_of(1)])
    assert again["loss"] == first["loss"], (first, again)

    tasks = bridge.get_conversion_tasks(worker.model)
    refit = {name: tensor.clone() for name, tensor in bridge.export_hf_weights(worker.model, conversion_tasks=tasks)}
    worker.save(f"{output}/checkpoints")
    expected = worker.train([batch_of(2), batch_of(3)])
    destroy_global_state()

    resumed = Worker(config(hf_model, data, f"{output}/checkpoints"))
    assert resumed.state.train_state.step == 2
    for name, tensor in bridge.export_hf_weights(resumed.model, show_progress=False):
        assert torch.equal(tensor, refit[name]), name
    assert resumed.train([batch_of(2), batch_of(3)]) == expected
    if get_rank_safe() == 0:
        print("ok")
    destroy_global_state()
