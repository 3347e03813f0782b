# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The conversion quick start: a model to Megatron and back, saved and as a stream of weights."""

import sys

from megatron.bridge import AutoBridge

if __name__ == "__main__":
    hf_model, output = sys.argv[1:]
    bridge = AutoBridge.from_hf_pretrained(hf_model, trust_remote_code=True)

    provider = bridge.to_megatron_provider()
    provider.tensor_model_parallel_size = 1
    provider.pipeline_model_parallel_size = 1
    provider.finalize()
    model = provider.provide_distributed_model(wrap_with_ddp=False)

    bridge.save_hf_pretrained(model, output)
    for name, weight in bridge.export_hf_weights(model, cpu=True):
        print(name, tuple(weight.shape))
