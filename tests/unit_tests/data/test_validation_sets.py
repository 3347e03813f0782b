# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
import pytest

from megatron.bridge.data.config import DatasetBuildContext
from megatron.bridge.data.validation_sets import named_sets, names_of_sets


def context(*, several=True, names=None):
    return DatasetBuildContext(1, 1, 1, multiple_validation_sets=several, validation_set_names=names)


def test_one_set_has_no_name():
    samples = [{"tokens": 1}]  # a provider may return a plain list of samples
    assert named_sets(samples, context(several=False)) is None and named_sets(None, context()) is None


def test_sets_are_called_by_their_keys_the_names_that_are_asked_for_or_their_numbers():
    assert named_sets({"a": [1], "b": [2]}, context(several=False)) == {"a": [1], "b": [2]}
    assert named_sets([[1], [2]], context()) == {"0": [1], "1": [2]}
    assert named_sets(([1], [2]), context(names=("x", "y"))) == {"x": [1], "y": [2]}


@pytest.mark.parametrize(
    ("valid", "names", "message"),
    [
        (range(3), None, "multiple_validation_sets=true, but the data has one validation set"),
        ([[1], [2]], ("x",), "validation_set_names=.'x'.: expected 2 names"),
        ({"a": [1], "b": [2]}, ("a", "c"), r"validation_set_names=\['a', 'c'\], but the data's sets are \['a', 'b'\]"),
        ([{"tokens": 1}], None, "the validation set '0' is a dict: expected a dataset"),
        ({"a": None}, None, "the validation set 'a' is a NoneType"),
    ],
)
def test_what_is_no_set_of_that_name_is_refused(valid, names, message):
    with pytest.raises(ValueError, match=message):
        named_sets(valid, context(names=names))


def test_names_follow_from_paths():
    paths = ["data/books", "data/code/validation.jsonl", "held.out.jsonl", "data/v1.5/", "corpora/web_text_document"]
    assert names_of_sets(context(), paths) == ["books", "code", "held.out", "v1.5", "web_text_document"]
