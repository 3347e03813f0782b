# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Data of the hub, by name: looked at, built outside a run, and trained on."""

import sys

from common import finetuning_config

from megatron.bridge.data.builders import (
    DirectHFSFTDatasetBuilder,
    DirectHFSFTDatasetConfig,
    GPTSFTDatasetConfig,
    HFDatasetSourceConfig,
    PromptCompletionSFTPreprocessingConfig,
)
from megatron.bridge.data.sources.hf import hf_dataset_supports_split, load_and_adapt_hf_dataset
from megatron.bridge.training.config import TokenizerConfig
from megatron.bridge.training.finetune import finetune
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.tokenizers.tokenizer import build_tokenizer


def process_example(example, tokenizer=None):
    return {"input": f"Question: {example['question']} Answer:", "output": example["answers"][0]}


if __name__ == "__main__":
    hf_model, data, output = sys.argv[1:]
    source = HFDatasetSourceConfig(dataset_name=data, split="train[:6]", process_example_fn=process_example)
    assert hf_dataset_supports_split(source, "validation") and not hf_dataset_supports_split(source, "test")
    rows = load_and_adapt_hf_dataset(source, "train[:6]")
    assert len(rows) == 6 and rows[0] == {"input": "Question: where sat 0 Answer:", "output": "on the mat"}

    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=hf_model))
    direct = DirectHFSFTDatasetConfig(seq_length=32, hf_dataset=source, do_test=False)
    train, validation, test = DirectHFSFTDatasetBuilder(direct, tokenizer).build()
    assert (len(train), len(validation), test) == (6, 2, None)

    cfg = finetuning_config(hf_model, data, output)
    cfg.dataset = GPTSFTDatasetConfig(
        seq_length=32,
        hf_dataset=HFDatasetSourceConfig(dataset_name=data),
        preprocessing=PromptCompletionSFTPreprocessingConfig(prompt_column="question", completion_column="title"),
        path_to_cache=f"{output}/tokens",
        do_test=False,
    )
    finetune(config=cfg, forward_step_func=forward_step)
