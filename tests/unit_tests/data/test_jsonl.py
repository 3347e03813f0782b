# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
import pytest

from megatron.bridge.data.jsonl import read_rows


def test_rows_come_with_their_line_numbers_and_blank_lines_are_skipped(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": "\xc3\xa9"}')
    assert list(read_rows(path)) == [(1, {"a": 1}), (4, {"a": "é"})]


@pytest.mark.parametrize(
    ("third_line", "message"),
    [
        (b'{"a": 1', "not valid JSON .*column 8"),
        (b"[1, 2]", "a JSON list: expected an object"),
        (b'"text"', "a JSON str: expected an object"),
        (b'{"a": "\xff"}', "not UTF-8 .*byte 7"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": {"b": 1, "c": 2, "b": 3}}', r"not valid JSON \(the key 'b' stands twice in an object\)"),
    ],
)
def test_a_bad_line_is_named(tmp_path, third_line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n\n' + third_line + b"\n")
    rows = read_rows(path)
    assert next(rows) == (1, {"a": 1})
    with pytest.raises(ValueError, match=rf"a\.jsonl:3: {message}") as caught:
        next(rows)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"b\.jsonl does not exist"):
        next(read_rows(tmp_path / "b.jsonl"))


def test_what_cannot_be_read_is_named(tmp_path):
    (tmp_path / "c.jsonl").mkdir()
    with pytest.raises(ValueError, match=r"c\.jsonl cannot be read \(Is a directory\)"):
        next(read_rows(tmp_path / "c.jsonl"))


@pytest.mark.parametrize(
    ("content", "what"), [(b"\x1f\x8b\x08", "gzip"), (b"PAR1", "Parquet"), (b"\xff\xfe{", "UTF-16")]
)
def test_a_file_of_another_format_is_named(tmp_path, content, what):
    path = tmp_path / "training.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"training\.jsonl is .*{what}"):
        next(read_rows(path))
