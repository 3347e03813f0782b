# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""`python -m megatron.bridge.convert`, as typed."""

import contextlib
import io
import subprocess
import sys

import pytest

from megatron.bridge.convert import build_parser, main
from tests.ranks import run_on_ranks
from tests.unit_tests.models.tiny_llama import save_tiny_llama


def as_typed(*args):
    command = [sys.executable, "-W", "ignore", "-m", "megatron.bridge.convert", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def on_rank(*args):
    """The same command inside a rank that has paid for the imports: (status, output, errors)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(arg) for arg in args])
    return status, out.getvalue().strip(), err.getvalue().strip()


def test_import_and_export_give_the_same_file(tmp_path):
    directory = save_tiny_llama(tmp_path / "llama", tie_word_embeddings=True)
    checkpoint, exported = tmp_path / "megatron", tmp_path / "hf"
    done = as_typed("import", "--hf-model", directory, "--megatron-path", checkpoint)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"imported {directory} to {checkpoint / 'iter_0000000'}"
    assert "reading weights" in done.stderr and "layer spec: " in done.stderr
    arguments = ("export", "--megatron-path", checkpoint, "--hf-path", exported, "--no-progress", "--pp", 2)
    first, second = run_on_ranks(on_rank, 2, *arguments)
    assert first[:2] == (0, f"exported {checkpoint} to {exported}") and "exporting weights" not in first[2]
    assert second[:2] == (0, "")
    assert (exported / "model.safetensors").read_bytes() == (directory / "model.safetensors").read_bytes()


def test_roundtrip_says_what_it_found(tmp_path):
    directory = save_tiny_llama(tmp_path / "llama")
    status, output, errors = run_on_ranks(on_rank, 2, "roundtrip", "--hf-model", directory, "--tp", 2)[0]
    assert status == 0
    assert output.endswith("all 39 tensors are bit-equal after Hugging Face -> Megatron -> Hugging Face")
    assert "exporting weights" in errors


def test_error_is_one_line_and_a_status(tmp_path):
    status, output, errors = run_on_ranks(on_rank, 2, "import", "--hf-model", tmp_path, "--megatron-path", "x")[0]
    assert (status, output) == (1, "")
    assert errors == f"import: {tmp_path / 'config.json'} is missing: expected the directory of a Hugging Face model"


@pytest.mark.parametrize("missing", [["import"], ["export", "--hf-path", "x"], ["roundtrip"], []])
def test_required_arguments(missing, capsys):
    with pytest.raises(SystemExit, match="2"):
        build_parser().parse_args(missing)
    assert "required" in capsys.readouterr().err
