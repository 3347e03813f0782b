# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Rows whose columns a configuration names."""

from dataclasses import replace

import pytest

from megatron.bridge.data.builders import (
    ChatSFTPreprocessingConfig,
    HFDatasetSourceConfig,
    PromptCompletionSFTPreprocessingConfig,
)
from tests.unit_tests.data.hf_data import build, text_of, texts


def test_columns_by_their_names(tokenizer):
    rows = [{"prompt": "the cat", "completion": "sat"}]
    columns = PromptCompletionSFTPreprocessingConfig(prompt_column="prompt", completion_column="completion")
    source = HFDatasetSourceConfig(dataset_dict=rows)
    train, _, _ = build(tokenizer, source, preprocessing=columns, do_validation=False)
    assert text_of(train[0], tokenizer) == "the cat sat<|im_end|>"
    assert tokenizer.ids_to_text(train[0]["labels"][train[0]["loss_mask"] == 1].tolist()) == " sat<|im_end|>"


def test_named_columns_of_a_known_dataset_are_its_own(squad, tokenizer, monkeypatch):
    monkeypatch.chdir(squad.parent)
    columns = PromptCompletionSFTPreprocessingConfig(prompt_column="question", completion_column="context")
    train, _, _ = build(tokenizer, "squad", preprocessing=columns)
    assert text_of(train[0], tokenizer) == "who? the cat 0<|im_end|>"


def test_conversations_in_a_column_of_their_own(tokenizer):
    turns = [{"role": "user", "content": "the cat?"}, {"role": "assistant", "content": "sat"}]
    template = "{% for m in messages %}{{ style }}{{ m['role'] }}:{{ m['content'] }}<|im_end|>{% endfor %}"
    chat = ChatSFTPreprocessingConfig(
        messages_column="chat", chat_template=template, chat_template_kwargs={"style": "* "}
    )
    source = HFDatasetSourceConfig(
        dataset_dict=[{"chat": turns}, {"chat": turns, "chat_template_kwargs": {"style": "- "}}]
    )
    train, _, _ = build(tokenizer, source, preprocessing=chat, do_validation=False)
    assert texts(train, tokenizer) == [
        f"{style}user:the cat?<|im_end|>{style}assistant:sat<|im_end|>" for style in ("* ", "- ")
    ]
    with pytest.raises(ValueError, match=r"dataset_dict \(alone\):1: no field 'talk' \(found: 'chat'\)"):
        build(tokenizer, source, preprocessing=replace(chat, messages_column="talk"), do_validation=False)


@pytest.mark.parametrize("place", ["dataset_root", "hf_dataset", "blend"])
def test_the_column_that_is_named_is_learned_wherever_rows_lie(write_jsonl, tokenizer, place):
    def talk(answer):
        return [{"role": "user", "content": "the cat?"}, {"role": "assistant", "content": answer}]

    spoken = [{"from": "human", "value": "the cat?"}, {"from": "gpt", "value": "spoken"}]
    row = {"chosen": talk("good"), "rejected": talk("bad"), "messages": talk("other"), "conversation": spoken}
    path = str(write_jsonl([row]))
    where = {"dataset_root": path, "hf_dataset": path, "blend": ([path], None)}[place]
    fields = {"do_validation": False, place: where}
    template = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}<|im_end|>{% endfor %}"
    answers = {None: "other", "chosen": "good", "rejected": "bad", "messages": "other", "conversation": "spoken"}
    for column, answer in answers.items():  # tokens are kept: each column has its own
        chat = ChatSFTPreprocessingConfig(messages_column=column, chat_template=template)
        train, _, _ = build(tokenizer, fields.pop("hf_dataset", None), preprocessing=chat, **fields)
        assert texts(train, tokenizer) == [f"user:the cat?<|im_end|>assistant:{answer}<|im_end|>"]
        fields[place] = where


def test_named_tools_go_before_others():
    chat = ChatSFTPreprocessingConfig(messages_column="conversations", tools_column="functions")
    row = {"tools": ["a"], "functions": ["b"], "conversations": [{"from": "human"}], "messages": [], "id": 1}
    assert chat.renamed(row) == {"id": 1, "tools": ["b"], "conversations": [{"from": "human"}]}
    assert chat.renamed({"messages": [], "tools": ["a"]}) == {"messages": [], "tools": ["a"]}


def test_preprocessing_and_dataset_kwargs_must_agree(tokenizer):
    with pytest.raises(ValueError, match=r"dataset_kwargs.add_bos=True and dataset.preprocessing, which means False"):
        build(
            tokenizer,
            "squad",
            preprocessing=PromptCompletionSFTPreprocessingConfig(),
            dataset_kwargs={"add_bos": True},
        )
