# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Masks by markers, and a template's arguments from a row."""

import json

import pytest
import torch

from megatron.bridge.data.conversation_processing import (
    AssistantMaskBoundaryConfig,
    assistant_mask_boundary_config_from_markers,
    build_assistant_loss_mask,
    chat_template_kwargs_from_example,
)
from megatron.bridge.data.sft import load_sft_dataset
from megatron.bridge.data.sft_options import SFTOptions

TURNS = [
    {"role": "user", "content": "the cat?"},
    {"role": "assistant", "content": "sat"},
    {"role": "user", "content": "dog"},
    {"role": "assistant", "content": "ran to"},
]


def test_markers_find_what_a_run_learns(tokenizer, write_jsonl):
    dataset = load_sft_dataset(
        write_jsonl([{"messages": TURNS}]), tokenizer=tokenizer, seq_length=99, options=SFTOptions()
    )
    sample = dataset[0]
    ids = torch.cat([sample["tokens"][:1], sample["labels"]])
    for one in (tokenizer, tokenizer.hf_tokenizer):
        mask = build_assistant_loss_mask(ids, assistant_mask_boundary_config_from_markers(one))
        assert torch.equal(mask[1:], sample["loss_mask"]) and mask.sum() > 0
    bare = assistant_mask_boundary_config_from_markers(tokenizer, include_end=False)
    assert mask.sum() - build_assistant_loss_mask(ids, bare).sum() == 2


def test_rows_ends_and_lists():
    marks = AssistantMaskBoundaryConfig((8, 8), (9,))
    rows = torch.tensor([[1, 8, 8, 2, 9, 3], [8, 8, 4, 5, 6, 7]])
    expected = [[0, 0, 0, 1, 1, 0], [0, 0, 1, 1, 1, 1]]
    assert build_assistant_loss_mask(rows, marks).tolist() == expected
    assert build_assistant_loss_mask(rows[0].tolist(), marks).dtype == torch.float32
    assert build_assistant_loss_mask([1, 8, 2], marks).sum() == 0


def test_an_empty_marker_is_refused(tokenizer):
    with pytest.raises(ValueError, match="start_marker is empty"):
        assistant_mask_boundary_config_from_markers(tokenizer, "")


def test_a_row_gives_its_template_arguments():
    tools = [{"type": "function", "function": {"name": "f"}}]
    row = {"messages": TURNS, "tools": json.dumps(tools), "chat_template_kwargs": {"enable_thinking": False}}
    assert chat_template_kwargs_from_example(row) == {"tools": tools, "enable_thinking": False}
    assert chat_template_kwargs_from_example({"messages": TURNS, "tools": None}) == {}
    assert chat_template_kwargs_from_example({"documents": [{"text": "a"}]}) == {"documents": [{"text": "a"}]}


@pytest.mark.parametrize(
    ("said", "message"),
    [([1], "is a list of 1: expected an object"), ({"tools": []}, "has 'tools': expected arguments of the template")],
)
def test_arguments_that_are_none_are_refused(said, message):
    with pytest.raises(ValueError, match=message):
        chat_template_kwargs_from_example({"chat_template_kwargs": said})
