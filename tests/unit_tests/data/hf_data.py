# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Rows like SQuAD's, and datasets made of a source of rows."""

from megatron.bridge.data.builders import GPTSFTDatasetConfig
from megatron.bridge.data.builders.gpt_sft import GPTSFTDatasetBuilder

ROWS = [
    {"id": str(number), "context": f"the cat {number}", "question": "who?", "answers": {"text": ["the cat", "cat"]}}
    for number in range(20)
]


def text_of(sample, tokenizer):
    return tokenizer.ids_to_text([int(sample["tokens"][0]), *sample["labels"].tolist()])


def texts(dataset, tokenizer):
    return [text_of(dataset[place], tokenizer) for place in range(len(dataset))]


def build(tokenizer, hf_dataset, kind=GPTSFTDatasetConfig, **fields):
    return GPTSFTDatasetBuilder(kind(64, hf_dataset=hf_dataset, **{"do_test": False, **fields}), tokenizer).build()
