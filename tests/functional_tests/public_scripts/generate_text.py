# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Greedy generation with Core's schedule, without an engine: as the conversion examples have it."""

import argparse

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from transformers import AutoTokenizer

from megatron.bridge import AutoBridge
from megatron.bridge.models.hf_pretrained.utils import is_safe_repo
from megatron.bridge.utils.common_utils import disable_mtp_for_inference, get_last_rank, print_rank_0


class SingleBatchIterator:
    def __init__(self, input_ids, position_ids):
        self.batch = {"tokens": input_ids, "position_ids": position_ids, "attention_mask": None}
        self._yielded = False

    def __iter__(self):
        return self

    def __next__(self):
        if self._yielded:
            raise StopIteration
        self._yielded = True
        return self.batch


def text_forward_step(data_iterator, model, **kwargs):
    batch = next(data_iterator)
    output = model(batch["tokens"], batch["position_ids"], batch["attention_mask"])
    return output, lambda x, **kwargs: x


def main(args) -> None:
    bridge = AutoBridge.from_hf_pretrained(
        args.hf_model_path,
        trust_remote_code=is_safe_repo(trust_remote_code=None, hf_path=args.hf_model_path),
        torch_dtype=torch.bfloat16,
    )
    provider = bridge.to_megatron_provider(load_weights=True)
    provider.tensor_model_parallel_size = args.tp
    provider.pipeline_model_parallel_size = args.pp
    provider.pipeline_dtype = torch.bfloat16
    provider.finalize()
    provider.initialize_model_parallel(seed=0)
    model = provider.provide_distributed_model(wrap_with_ddp=False)
    disable_mtp_for_inference(model[0])
    for chunk in model:
        chunk.eval()

    tokenizer = AutoTokenizer.from_pretrained(args.hf_model_path)
    input_ids = tokenizer.encode(args.prompt, return_tensors="pt")
    generated = input_ids
    for _ in range(args.max_new_tokens):
        with torch.no_grad():
            position_ids = torch.arange(input_ids.size(1)).unsqueeze(0).expand_as(input_ids)
            output = get_forward_backward_func()(
                forward_step_func=text_forward_step,
                data_iterator=SingleBatchIterator(input_ids, position_ids),
                model=model,
                num_microbatches=1,
                forward_only=True,
                seq_length=input_ids.size(1),
                micro_batch_size=1,
                collect_non_loss_data=True,
            )
            if isinstance(output, list) and len(output) > 0:
                output = output[0]
            if parallel_state.is_pipeline_last_stage():
                world_size = parallel_state.get_tensor_model_parallel_world_size()
                gathered = [torch.zeros_like(output) for _ in range(world_size)]
                dist.all_gather(gathered, output, group=parallel_state.get_tensor_model_parallel_group())
                next_token_ids = torch.argmax(torch.cat(gathered, dim=2)[:, -1], dim=-1, keepdim=True)
            else:
                next_token_ids = torch.ones((1, 1), device=generated.device, dtype=generated.dtype)
            dist.broadcast(next_token_ids, get_last_rank())
            generated = input_ids = torch.cat([generated, next_token_ids], dim=-1)
            if next_token_ids.item() == tokenizer.eos_token_id:
                break
    print_rank_0(f"Generated: {tokenizer.decode(list(generated[0]))}")
    assert generated.size(1) > 3


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--hf_model_path", type=str, required=True)
    parser.add_argument("--prompt", type=str, default="the cat sat")
    parser.add_argument("--max_new_tokens", type=int, default=3)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    main(parser.parse_args())
