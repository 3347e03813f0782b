# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The checkpoints that the sync's matrix loads: one model's weights in every form."""

import shutil
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.tensor_aware_state_dict import HAVE_NVRX

from megatron.bridge.checkpoint import iterations, model_checkpoint
from tests.rigs.on_ranks import fill_weights
from tests.rigs.sync import EXPERTS, SIZES, Model, Rig, config, start
from tests.rigs.sync_matrix import SCALED, WAYS


def write_checkpoints(directory: Path, model: Model) -> None:
    """One model's weights in every form that a run can load. All hold the same weights once in 16 bits."""
    from megatron.bridge.checkpoint.sharded_save import save_sharded
    from megatron.bridge.models.conversion.auto_bridge import AutoBridge
    from megatron.bridge.training.checkpointing import save_checkpoint
    from megatron.bridge.training.state import GlobalState, TrainState
    from megatron.bridge.utils.distributed import barrier, is_rank_0

    cfg = config(directory, model, offload={}, checkpoint={})
    rig = Rig(directory, model)
    chunks = rig.whole
    if model.kind == "dense":
        AutoBridge.from_hf_pretrained(str(directory / "hf")).load_hf_weights(chunks)
    else:
        fill_weights(chunks, seed=3)
        AutoBridge.from_hf_config(hf_config_with_experts()).save_hf_pretrained(chunks, directory / "hf", False)
    run_config = {"model": cfg.to_dict()["model"]}
    model_checkpoint.save_model_checkpoint(chunks, directory / "pretrained", run_config=run_config)
    if is_rank_0():
        shutil.copytree(directory / "pretrained" / "iter_0000000", directory / "released" / "release")
        iterations.write_tracker(directory / "released", 0, release=True)
    barrier()
    exact = model_checkpoint.model_sharded_state_dict(chunks)
    model_checkpoint.read_in_fp32(exact)
    for tensor in _own_tensors(exact):
        tensor.data *= SCALED
    unfinished = model_checkpoint.prepare_save(directory / "fp32", 0, option="fp32")
    save_sharded(exact, unfinished)
    model_checkpoint.commit_checkpoint(unfinished, 0, run_config=run_config, train_state=None)

    run = start(cfg, chunks)
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0
    run.train_step()  # so that the optimizer has something to save
    kinds = [{"save": "full"}, {"save": "no_optim", "save_optim": False}]
    if HAVE_NVRX:
        kinds.append({**WAYS["local checkpoint"], "save_optim": False})
    for options in kinds:
        saving = config(directory, model, offload={}, checkpoint=options)
        state = GlobalState(saving, train_state=TrainState(step=4, consumed_train_samples=16))
        is_local = "save" not in options
        save_checkpoint(state, chunks, run.optimizer, run.scheduler, non_persistent_ckpt=is_local)
    rig.close()


def hf_config_with_experts() -> dict[str, Any]:
    """The rig's model with experts as a Mixtral."""
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_hidden_layers": SIZES["num_layers"],
        "hidden_size": SIZES["hidden_size"],
        "intermediate_size": EXPERTS["moe_ffn_hidden_size"],
        "num_attention_heads": SIZES["num_attention_heads"],
        "num_key_value_heads": SIZES["num_query_groups"],
        "vocab_size": SIZES["vocab_size"],
        "num_local_experts": EXPERTS["num_moe_experts"],
        "num_experts_per_tok": EXPERTS["moe_router_topk"],
    }


def _own_tensors(sharded: Any) -> list[Any]:
    """The sharded tensors that `read_in_fp32` gave values of their own."""
    if isinstance(sharded, dict):
        return [tensor for value in sharded.values() for tensor in _own_tensors(value)]
    is_copy = isinstance(getattr(sharded, "data", None), torch.Tensor) and not isinstance(
        sharded.data, torch.nn.Parameter
    )
    return [sharded] if is_copy and sharded.data.dtype == torch.float32 else []
