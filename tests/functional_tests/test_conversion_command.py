# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""`python -m megatron.bridge.convert`, as typed."""

import subprocess
import sys

import pytest

from megatron.bridge.convert import build_parser
from tests.unit_tests.models.tiny_llama import save_tiny_llama


def convert(*args):
    command = [sys.executable, "-W", "ignore", "-m", "megatron.bridge.convert", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_import_and_export_give_the_same_file(tmp_path):
    directory = save_tiny_llama(tmp_path / "llama", tie_word_embeddings=True)
    done = convert("import", "--hf-model", directory, "--megatron-path", tmp_path / "megatron")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"imported {directory} to {tmp_path / 'megatron' / 'iter_0000000'}"
    assert "reading weights" in done.stderr and "layer spec: " in done.stderr
    done = convert("export", "--megatron-path", tmp_path / "megatron", "--hf-path", tmp_path / "hf", "--no-progress")
    assert done.returncode == 0, done.stderr
    assert "exporting weights" not in done.stderr
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == (directory / "model.safetensors").read_bytes()


def test_roundtrip_says_what_it_found(tmp_path):
    directory = save_tiny_llama(tmp_path / "llama")
    done = convert("roundtrip", "--hf-model", directory)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("all 39 tensors are bit-equal after Hugging Face -> Megatron -> Hugging Face")


def test_error_is_one_line_and_a_status(tmp_path):
    done = convert("import", "--hf-model", tmp_path, "--megatron-path", tmp_path / "megatron")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.strip() == (
        f"import: {tmp_path / 'config.json'} is missing: expected the directory of a Hugging Face model"
    )


@pytest.mark.parametrize("missing", [["import"], ["export", "--hf-path", "x"], ["roundtrip"], []])
def test_required_arguments(missing, capsys):
    with pytest.raises(SystemExit, match="2"):
        build_parser().parse_args(missing)
    assert "required" in capsys.readouterr().err
