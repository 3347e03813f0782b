# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Models and tokenizers out of checkpoints and into them, without a run."""

import sys

import torch
from megatron.bridge.training.model_load_save import (
    build_and_load_model,
    load_megatron_model,
    load_model_config,
    load_tokenizer,
    save_megatron_model,
    temporary_distributed_context,
)

if __name__ == "__main__":
    checkpoint, output = sys.argv[1:]
    model_cfg, mlm_args = load_model_config(checkpoint)
    assert model_cfg.num_layers > 0 and mlm_args is None
    tokenizer = load_tokenizer(checkpoint)
    assert tokenizer.detokenize(tokenizer.tokenize("the cat"))

    model = load_megatron_model(checkpoint, use_cpu_init=True, return_state_dict=False)
    weights = load_megatron_model(checkpoint, return_state_dict=True, use_cpu_init=True)
    assert any(name.endswith("embedding.word_embeddings.weight") for name in weights)

    with temporary_distributed_context(backend="gloo"):
        built = build_and_load_model(checkpoint, model_cfg, use_cpu_init=True, mlm_args=mlm_args)
        save_megatron_model(built, output)
    again = load_megatron_model(output, use_cpu_init=True)
    for one, other in zip(model[0].parameters(), again[0].parameters(), strict=True):
        assert torch.equal(one, other)
