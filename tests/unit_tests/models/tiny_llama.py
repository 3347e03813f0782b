# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Tiny random models as Hugging Face directories, and the logits of both sides."""

import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from megatron.bridge.utils.simulated_accelerator import suspended

SMALL = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=96,
    max_position_embeddings=64,
    initializer_range=0.2,  # large enough that a wrongly placed row changes the logits visibly
)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def save_tiny_llama(directory: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> Path:
    """Write a random Llama, every weight of it random, norms and biases included."""
    return save_tiny_model(directory, "LlamaForCausalLM", dtype=dtype, seed=seed, **overrides)


def save_tiny_model(
    directory: Path, architecture: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any
) -> Path:
    """Write a random model of an architecture of transformers, every weight of it random."""
    with suspended():
        import transformers

        torch.manual_seed(seed)
        model_class = getattr(transformers, architecture)
        options = {**SMALL, **overrides}
        if "vocab_size_per_layer_input" in options:
            options["vocab_size_per_layer_input"] = options["vocab_size"]
        model = model_class(model_class.config_class(**options))
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
            elif name.endswith(("router.scale", "per_expert_scale")):
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
            elif name.endswith("A_log"):  # a state that lasts, and little rounding
                torch.nn.init.uniform_(parameter, -3, 0)
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                torch.nn.init.uniform_(buffer, 0.5, 1.5)
        model.to(dtype).save_pretrained(directory)
    return Path(directory)


def stack_experts(directory: Path) -> None:
    """Put the experts of each layer into two tensors, as the class of transformers keeps them: gates, then ups."""
    tensors, of_layer = {}, {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        expert = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)_proj\.weight", name)
        if expert is None:
            tensors[name] = tensor
        else:
            of_layer.setdefault(expert[1], {}).setdefault(int(expert[2]), {})[expert[3]] = tensor
    for layer, by_number in of_layer.items():
        experts = [by_number[number] for number in sorted(by_number)]
        tensors[f"{layer}.gate_up_proj"] = torch.stack([torch.cat([one["gate"], one["up"]]) for one in experts])
        tensors[f"{layer}.down_proj"] = torch.stack([one["down"] for one in experts])
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def some_tokens(vocab_size: int, length: int = 32) -> torch.Tensor:
    """Token ids [2, length] that touch the whole vocabulary."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, vocab_size, (2, length), generator=generator)


def hf_logits(directory: Path, tokens: torch.Tensor) -> torch.Tensor:
    """What transformers computes in fp32: [B, S, V]."""
    with suspended(), torch.no_grad():
        import transformers

        (architecture,) = transformers.AutoConfig.from_pretrained(directory).architectures
        model = getattr(transformers, architecture).from_pretrained(directory, dtype=torch.float32)
        return model.eval()(tokens).logits


def megatron_logits(chunks: list, tokens: torch.Tensor) -> torch.Tensor | None:
    """What the Megatron model computes: [B, S, V] on the last pipeline stage, None on the others."""
    from megatron.core import parallel_state
    from megatron.core.utils import unwrap_model

    batch, length = tokens.shape
    tokens = tokens.cuda()  # those of another process lie on the host, and so would all that is made of them
    positions = torch.arange(length)[None].expand(batch, -1)
    output = None
    with torch.no_grad():
        for chunk in chunks:
            model = unwrap_model(chunk).eval()
            shape = (length, batch, model.config.hidden_size)
            if model.config.sequence_parallel:
                shape = (length // model.config.tensor_model_parallel_size, *shape[1:])
            if not model.pre_process:
                received = torch.empty(shape)
                dist.recv(received, parallel_state.get_pipeline_model_parallel_prev_rank())
                model.set_input_tensor(received)
            output = model(tokens, positions, None, runtime_gather_output=True)
            if not model.post_process:
                dist.send(output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
                output = None
    return output
