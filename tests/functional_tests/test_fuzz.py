# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A few inputs of `make fuzz` for every reader, and that it finds readers that break the rule."""

import json
import os
import time

import pytest

from tests.fuzz import __main__ as fuzz
from tests.fuzz.__main__ import BEGIN, END, Job, feed, readers, run_jobs, write_document
from tests.fuzz.data_readers import Reader

INPUTS = 30


@pytest.fixture(scope="module")
def all_readers():
    return readers()


def test_readers_keep_the_rule(all_readers):
    assert len(all_readers) >= 18
    for reader in all_readers:
        feed(reader, inputs=INPUTS, seed=5)
        assert reader.accepted + reader.refused >= INPUTS


def test_valid_inputs_are_read(all_readers, tmp_path):
    """Otherwise every input would be refused at the door, and nothing behind it tried."""
    needs_more = {"latest_checkpointed_iteration.txt", "run_config.yaml", "YAML"}
    needs_more |= {"train_state.pt", "data.pkl", ".metadata", "tokens.npz"}  # others than the first are hostile
    for reader in all_readers:
        if reader.name not in needs_more:
            for number, seed in enumerate(reader.seeds):
                _read(reader, seed, tmp_path / reader.name / str(number))
    for reader in all_readers[-3:]:
        _read(reader, reader.seeds[0], tmp_path / reader.name)


def _read(reader, content, directory):
    directory.mkdir(parents=True)
    (directory / reader.name).write_bytes(content)
    reader.read(directory / reader.name)


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


WORK = {
    "dies": (lambda job: os._exit(3), "its process died, exit code 3"),
    "hangs": (lambda job: time.sleep(6000), "it hung at input 0"),
    "takes all memory": (lambda job: bytearray(16 * fuzz.MEMORY_BYTES), "MemoryError"),
    "raises": (lambda job: 1 / 0, "ZeroDivisionError: division by zero"),
    "works": (lambda job: ["3"], ""),
}


@pytest.mark.any_core
def test_what_becomes_of_a_process_is_told(monkeypatch, capsys):
    jobs = [Job(name, work) for name, (work, _) in WORK.items()]
    run_jobs([job for job in jobs if job.name != "hangs"], at_once=4)
    monkeypatch.setattr(fuzz, "SECONDS_WITHOUT_PROGRESS", 5)
    run_jobs([job for job in jobs if job.name == "hangs"], at_once=1)
    for job in jobs:
        expected = WORK[job.name][1]
        assert expected in job.broken and bool(job.broken) == bool(expected)
    assert jobs[-1].cells == ["3"] and len(capsys.readouterr().out.splitlines()) >= len(jobs)


def test_the_document_gets_what_stands_between_the_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_document("new \\1", page)
    assert page.read_text() == f"before\n{BEGIN}\n\nnew \\1\n\n{END}\nafter\n"
    page.write_text("no marks")
    with pytest.raises(ValueError, match="once: put them back"):
        write_document("new", page)
