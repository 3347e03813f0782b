# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A round trip at a layout, weight by weight, with the checkpoint kept: as the conversion examples have it."""

import argparse

import torch

from megatron.bridge import AutoBridge
from megatron.bridge.models.decorators import torchrun_main
from megatron.bridge.models.hf_pretrained.utils import is_safe_repo
from megatron.bridge.utils.common_utils import get_rank_safe, print_rank_0


@torchrun_main
def main(hf_model_id, output_dir, tp, pp, ep, etp, megatron_save_path, megatron_load_path, trust_remote_code):
    bridge = AutoBridge.from_hf_pretrained(
        hf_model_id,
        trust_remote_code=is_safe_repo(trust_remote_code=trust_remote_code, hf_path=hf_model_id),
        torch_dtype=torch.bfloat16,
    )
    if megatron_load_path:
        megatron_model = bridge.load_megatron_model(
            megatron_load_path,
            mp_overrides={
                "tensor_model_parallel_size": tp,
                "pipeline_model_parallel_size": pp,
                "expert_model_parallel_size": ep,
                "expert_tensor_parallel_size": etp,
            },
            wrap_with_ddp=False,
        )
    else:
        model_provider = bridge.to_megatron_provider(load_weights=True)
        model_provider.tensor_model_parallel_size = tp
        model_provider.pipeline_model_parallel_size = pp
        model_provider.pipeline_dtype = torch.bfloat16
        model_provider.params_dtype = torch.bfloat16
        model_provider.expert_model_parallel_size = ep
        model_provider.expert_tensor_parallel_size = etp
        model_provider.finalize()
        model_provider.initialize_model_parallel(seed=0)
        megatron_model = model_provider.provide_distributed_model(wrap_with_ddp=False)

    all_match = True
    for name, param in bridge.export_hf_weights(megatron_model, show_progress=False):
        if get_rank_safe() == 0:
            original = bridge.hf_pretrained.state[name]
            all_match &= torch.allclose(param, original.to(param.device, param.dtype), atol=1e-1)
    print_rank_0(f"Success: All tensors from the original checkpoint match: {all_match}")
    assert all_match

    bridge.save_hf_pretrained(megatron_model, output_dir)
    if megatron_save_path:
        bridge.save_megatron_model(
            megatron_model,
            megatron_save_path,
            hf_tokenizer_path=hf_model_id,
            hf_tokenizer_kwargs={"trust_remote_code": False},
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--hf-model-id", type=str, required=True)
    parser.add_argument("--output-dir", type=str, default=None)
    for size in ("tp", "pp", "ep", "etp"):
        parser.add_argument(f"--{size}", type=int, default=1)
    parser.add_argument("--megatron-save-path", type=str, default=None)
    parser.add_argument("--megatron-load-path", type=str, default=None)
    parser.add_argument("--trust-remote-code", action="store_true", default=None)
    args = parser.parse_args()
    main(**vars(args))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
