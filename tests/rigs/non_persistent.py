# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Runs that save in between: local checkpoints and global ones, beside the persistent ones."""

import pytest
from megatron.core.dist_checkpointing import tensor_aware_state_dict

from tests.rigs.load import Witness
from tests.rigs.tiny import tiny_config

needs_the_package = pytest.mark.skipif(
    not tensor_aware_state_dict.HAVE_NVRX, reason="local checkpoints need nvidia-resiliency-ext, the extra `local`"
)

ALL = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 1.0}


def config_of(directory, *, kind="local", train_iters=4, optimizer=ALL, checkpoint=None, model=None, **sections):
    """A run that saves in between, every second step; persistent checkpoints only where a test asks for them."""
    checkpoint = {
        "save": None,
        "pretrained_checkpoint": "pretrained",
        "non_persistent_ckpt_type": kind,
        "non_persistent_save_interval": 2,
        "non_persistent_local_ckpt_dir": "local" if kind == "local" else None,
        **(checkpoint or {}),
    }
    for name in ("save", "load", "pretrained_checkpoint", "non_persistent_local_ckpt_dir"):
        if checkpoint.get(name) is not None:
            checkpoint[name] = f"{directory}/{checkpoint[name]}"
    # Dropout makes the random states matter.
    model = {"hidden_dropout": 0.1, **(model or {})}
    return tiny_config(
        directory, train_iters=train_iters, model=model, optimizer=optimizer, checkpoint=checkpoint, **sections
    )


class FullWitness(Witness):
    """Keeps also whether every copy equals its weight, and whether state lies where its parameter is."""

    def on_train_start(self, context):
        from megatron.bridge.training.checkpointing import check_hybrid_optimizer_param_copies
        from megatron.bridge.training.cpu_offload.param_copies import find_hybrid_optimizers

        super().on_train_start(context)
        try:
            compared = check_hybrid_optimizer_param_copies(context.optimizer, exact=True, sample_size=10**6)
            self.start["copies are the weights"] = compared > 0
        except RuntimeError:
            self.start["copies are the weights"] = False
        self.start["misplaced"] = [
            key
            for distributed_optimizer in find_hybrid_optimizers(context.optimizer)
            for sub_optimizer in distributed_optimizer.optimizer.sub_optimizers
            for param, state in sub_optimizer.state.items()
            for key, value in state.items()
            if key != "step" and value.is_cuda != param.is_cuda
        ]


def run_saving(directory, **options):
    from megatron.bridge.training.finetune import finetune
    from megatron.bridge.training.gpt_step import forward_step

    witness = FullWitness()
    finetune(config_of(directory, **options), forward_step, callbacks=[witness])
    return {"start": witness.start, "end": witness.end, "losses": witness.losses, "steps": witness.steps}


def local_files(directory):
    return sorted(path.relative_to(directory / "local").as_posix() for path in (directory / "local").rglob("*.pt"))


def files_of(step):
    return [f"{rank}/iter_{step:07d}_{rank}_local.pt" for rank in (0, 1)]
