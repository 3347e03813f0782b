# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Splits and parts of them, and the functions that rows go through."""

import logging

import pytest

from megatron.bridge.data.builders import HFDatasetSourceConfig
from megatron.bridge.data.sources.hf import hf_dataset_supports_split, load_and_adapt_hf_dataset
from tests.unit_tests.data.hf_data import ROWS, build, texts


@pytest.mark.parametrize(
    ("split", "numbers"),
    [
        ("train[:3]", [0, 1, 2]),
        ("train[90%:]", [18, 19]),
        ("train[-2:]", [18, 19]),
        ("train[5:7]", [5, 6]),
        ("validation", [0, 1, 2]),
    ],
)
def test_parts_of_splits(squad, split, numbers):
    source = HFDatasetSourceConfig(str(squad), split=split)
    assert [int(row["id"]) for row in load_and_adapt_hf_dataset(source)] == numbers
    assert [int(row["id"]) for row in load_and_adapt_hf_dataset(str(squad), split=split)] == numbers


def test_which_splits_there_are(squad):
    for split, expected in (("train", True), ("training", True), ("validation", True), ("test", False), ("dev", False)):
        assert hf_dataset_supports_split(str(squad), split) == expected


def test_rows_are_filtered_and_adapted(squad, caplog):
    source = HFDatasetSourceConfig(
        path=str(squad),
        process_example_fn=lambda row, tokenizer: {"input": row["question"], "output": f"{tokenizer}{row['id']}"},
        filter_fn=lambda row: int(row["id"]) < 2,
    )
    with caplog.at_level(logging.INFO):
        rows = load_and_adapt_hf_dataset(source, tokenizer="T")
    assert rows == [{"input": "who?", "output": "T0"}, {"input": "who?", "output": "T1"}]
    assert "filter_fn left out 18 rows" in caplog.text


def test_another_function_makes_other_tokens(squad, tokenizer):
    def build_with(said):
        source = HFDatasetSourceConfig(str(squad), process_example_fn=lambda row: {"input": "a", "output": said})
        return texts(build(tokenizer, source)[0], tokenizer)[0]

    assert [build_with(said) for said in ("b", "c", "b")] == ["a b<|im_end|>", "a c<|im_end|>", "a b<|im_end|>"]


WORD = "b"


def answer():
    return WORD


def test_another_word_in_the_functions_module_makes_other_tokens(squad, tokenizer, monkeypatch):
    def build_with(function):
        return texts(build(tokenizer, HFDatasetSourceConfig(str(squad), process_example_fn=function))[0], tokenizer)[0]

    def by_keyword(word):
        def function(row, *, said=word):
            return {"input": "a", "output": said}

        return function

    assert [build_with(by_keyword(word)) for word in "bc"] == ["a b<|im_end|>", "a c<|im_end|>"]
    for function in (lambda row: {"input": "d", "output": WORD}, lambda row: {"input": "e", "output": answer()}):
        before = build_with(function)
        monkeypatch.setitem(globals(), "WORD", WORD + "f")
        assert build_with(function) == before.replace("<", "f<")


def test_a_second_argument_with_a_value_is_not_the_tokenizer(squad):
    source = HFDatasetSourceConfig(str(squad), filter_fn=lambda row, most=2: int(row["id"]) < most)
    assert len(load_and_adapt_hf_dataset(source)) == 2
    source.process_example_fn = lambda row, given=None: {"given": given}
    assert load_and_adapt_hf_dataset(source, tokenizer="T") == [{"given": "T"}] * 2


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda row: row["txt"],
            r"train.jsonl:1: process_example_fn <lambda> raised KeyError: 'txt' \(the row has: id",
        ),
        (lambda row: "text", "train.jsonl:1: process_example_fn returned str: expected a dict such as input, output"),
        (lambda row: {"input": "a"}, r"train.jsonl:1: no field 'output' \(found: 'input'\)"),
    ],
)
def test_a_function_that_fails_names_the_row(squad, tokenizer, function, message):
    with pytest.raises(ValueError, match=message):
        build(tokenizer, HFDatasetSourceConfig(str(squad), process_example_fn=function))


def test_rows_that_a_script_has_already(tokenizer):
    rows = [{"input": f"cat {number}", "output": "sat"} for number in range(4)]
    train, valid, _ = build(tokenizer, HFDatasetSourceConfig(dataset_dict={"train": rows, "validation": rows[:1]}))
    assert (len(train), len(valid)) == (4, 1)


def test_a_split_that_is_not_there_is_named(squad, tokenizer):
    with pytest.raises(FileNotFoundError, match="has no training split: expected 'train', or .* in hf_dataset.split"):
        build(tokenizer, HFDatasetSourceConfig(dataset_dict={"train_sft": ROWS}))
    with pytest.raises(FileNotFoundError, match=r"has no split 'dev' \(found: 'train', 'validation'\)"):
        load_and_adapt_hf_dataset(HFDatasetSourceConfig(str(squad), split="dev"))
    source = HFDatasetSourceConfig(str(squad), validation_split="dev", process_example_fn="squad")
    with pytest.raises(FileNotFoundError, match="has no split 'dev' .*: set hf_dataset.validation_split"):
        build(tokenizer, source)
    assert len(build(tokenizer, source, do_validation=False)[0]) == 20
