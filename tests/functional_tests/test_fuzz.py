# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A few inputs of `make fuzz` for every reader, and that it finds readers that break the rule."""

import json
import os

import pytest

from tests.fuzz import Reader, feed, readers

INPUTS = 40


@pytest.fixture(scope="module")
def all_readers():
    return readers()


def test_readers_keep_the_rule(all_readers):
    assert len(all_readers) >= 12
    for reader in all_readers:
        feed(reader, inputs=INPUTS, seed=5)
        assert reader.accepted + reader.refused >= INPUTS


def test_valid_inputs_are_read(all_readers, tmp_path):
    """Otherwise every input would be refused at the door, and nothing behind it tried."""
    needs_more = {"latest_checkpointed_iteration.txt", "run_config.yaml", "YAML", "train_state.pt", ".metadata"}
    for reader in all_readers:
        if reader.name not in needs_more:
            for number, seed in enumerate(reader.seeds):
                path = tmp_path / reader.name / str(number) / reader.name
                path.parent.mkdir(parents=True)
                path.write_bytes(seed)
                reader.read(path)


def _bare(path):
    return json.loads(path.read_bytes())["a"][3]


def _lines(path):
    raise ValueError("one\ntwo")


def _runs(path):
    os.mkdir("hacked")


@pytest.mark.parametrize(
    ("read", "words"),
    [(_bare, ["KeyError", "IndexError", "TypeError"]), (_lines, ["not one line"]), (_runs, ["executed"])],
)
def test_a_reader_that_breaks_it_is_found(read, words):
    reader = Reader("broken.json", read, (b'{"a": [1, 2]}',), (b'"b"', b"[]", b"3"))
    with pytest.raises(BaseException) as found:
        feed(reader, inputs=300, seed=1)
    said = f"{type(found.value).__name__}: {found.value} {getattr(found.value, 'exceptions', '')}"
    assert any(word in said for word in words), said
