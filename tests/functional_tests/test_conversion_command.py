# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""`python -m megatron.bridge.convert`, as typed."""

import contextlib
import io
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron.bridge.convert import build_parser, main
from tests.rigs.families import MODELS
from tests.rigs.ranks import run_on_ranks
from tests.unit_tests.models.tiny_llama import save_tiny_llama, save_tiny_model

SCRIPTS = Path(__file__).parents[2] / "scripts" / "conversion"


def as_typed(*args):
    command = [sys.executable, "-W", "ignore", "-m", "megatron.bridge.convert", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=1500)


def on_rank(*args, main=main):
    """The same command inside a rank that has paid for the imports: (status, output, errors)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(arg) for arg in args])
    return status, out.getvalue().strip(), err.getvalue().strip()


def by_scripts(*runs):
    """`scripts/conversion` inside a rank, one script after the other."""
    return [on_rank(*args, main=runpy.run_path(str(SCRIPTS / f"{name}.py"))["main"]) for name, *args in runs]


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


def test_the_scripts_take_the_options_of_megatron_bridge(tmp_path):
    """`--not-strict` lets an export leave out a tensor that the model's own files have."""
    directory = save_tiny_llama(tmp_path / "llama")
    checkpoint, exported = tmp_path / "megatron", tmp_path / "hf"
    names = ("--hf-model", directory, "--megatron-path", checkpoint, "--trust-remote-code", "--no-progress")
    both_ways = ("convert", "roundtrip", "--hf-model", directory, "--no-progress")
    done = run_on_ranks(
        by_scripts,
        1,
        ("import", *names, "--torch-dtype", "bfloat16", "--device-map", "auto"),
        ("export", *names, "--hf-path", exported),
        both_ways,
    )[0]
    assert [status for status, _, _ in done] == [0, 0, 0], done
    assert load_file(exported / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    tensors = load_file(directory / "model.safetensors")
    save_file({**tensors, "model.more": torch.zeros(2)}, directory / "model.safetensors")
    command = ("export", *names, "--hf-path", tmp_path / "again")
    strict, loose = run_on_ranks(by_scripts, 1, command, (*command, "--not-strict"))[0]
    assert strict[0] == 1 and "model.more" in strict[2].splitlines()[-1]
    assert loose[0] == 0 and "model.more" not in load_file(tmp_path / "again" / "model.safetensors")


def test_roundtrip_says_what_it_found(tmp_path):
    directory = save_tiny_llama(tmp_path / "llama")
    status, output, errors = run_on_ranks(on_rank, 2, "roundtrip", "--hf-model", directory, "--tp", 2)[0]
    assert status == 0
    lines = output.splitlines()
    assert lines[0].split() == ["tensor", "shape", "result"]
    assert lines[1].split() == ["model.embed_tokens.weight", "[96,", "32]", "equal"]
    assert len(lines) == 1 + 39 + 1
    assert lines[-1].endswith("all 39 tensors are bit-exact after Hugging Face -> Megatron -> back")
    assert "exporting weights" in errors


def test_roundtrip_that_loses_something_fails(tmp_path):
    """bfloat16 weights under a configuration that says float16: the cast loses bits."""
    directory = save_tiny_llama(tmp_path / "llama", dtype=torch.bfloat16)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    status, output, _ = run_on_ranks(on_rank, 1, "roundtrip", "--hf-model", directory, "--no-progress")[0]
    assert status == 1
    assert output.splitlines()[-1].endswith("39 of 39 tensors differ")
    assert "float16, in the file bfloat16 (96, 32)" in output.splitlines()[1]


def test_experts_convert_on_two_processes(tmp_path):
    directory = save_tiny_model(tmp_path / "moe", "Qwen3MoeForCausalLM", **MODELS["qwen3_moe"].options)
    checkpoint, exported = tmp_path / "megatron", tmp_path / "hf"
    shared = ("--tp", 2, "--ep", 2, "--etp", 1, "--no-progress")
    for status, _, errors in run_on_ranks(
        on_rank, 2, "import", "--hf-model", directory, "--megatron-path", checkpoint, "--dtype", "bfloat16", *shared
    ):
        assert status == 0, errors
    sizes = ("--pp", 2, "--vp", 2, "--no-progress")
    command = ("export", "--megatron-path", checkpoint, "--hf-path", exported, *sizes)
    for status, _, errors in run_on_ranks(on_rank, 2, *command):
        assert status == 0, errors
    before, after = (load_file(path / "model.safetensors") for path in (directory, exported))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name].bfloat16()) for name in before)
    assert json.loads((exported / "config.json").read_text())["dtype"] == "bfloat16"
    command = ("export", "--megatron-path", checkpoint, "--hf-path", exported, "--dtype", "float32", "--no-progress")
    assert run_on_ranks(on_rank, 1, *command)[0][0] == 0
    widened = load_file(exported / "model.safetensors")
    assert all(torch.equal(widened[name], after[name].float()) for name in after)
    assert json.loads((exported / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize(
    ("model", "sizes", "message"),
    [
        ("llama", ("--ep", 2), "no experts don't divide among expert_model_parallel_size=2"),
        ("llama", ("--tp", 3), "tensor_model_parallel_size=3 x "),
        ("llama", ("--pp", 2, "--vp", 3), "num_layers=4 doesn't divide among 6 pipeline stages"),
        ("mixtral", ("--ep", 4), "expert_model_parallel_size=4"),
    ],
)
def test_layouts_that_leave_a_remainder_are_refused(tmp_path, model, sizes, message):
    directory = save_tiny_model(tmp_path, MODELS[model].architecture, **MODELS[model].options)
    for status, _, errors in run_on_ranks(on_rank, 2, "roundtrip", "--hf-model", directory, *sizes):
        assert status == 1
        assert message in errors.splitlines()[-1] and "Traceback" not in errors


def test_error_is_one_line_and_a_status(tmp_path):
    status, output, errors = run_on_ranks(on_rank, 2, "import", "--hf-model", tmp_path, "--megatron-path", "x")[0]
    assert (status, output) == (1, "")
    assert errors == f"import: {tmp_path / 'config.json'} is missing: expected the directory of a Hugging Face model"


def spoil_weight(directory):
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, directory / "model.safetensors")


def spoil_config(**values):
    def spoil(directory):
        config = json.loads((directory / "config.json").read_text())
        kept = {name: value for name, value in {**config, **values}.items() if value is not None}
        (directory / "config.json").write_text(json.dumps(kept))

    return spoil


def write_tokenizer(**content):
    return lambda directory: (directory / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_weight, "model.safetensors: 'model.layers.1.mlp.up_proj.weight' holds NaN or infinite values"),
        (spoil_config(architectures=["Gemma2ForCausalLM"]), "which needs soft-capped attention scores and logits"),
        (
            lambda directory: (directory / "adapter_config.json").touch(),
            "adapter_config.json: the directory holds adap",
        ),
        (lambda directory: (directory / "generation_config.json").write_text("{"), "_config.json is not valid JSON"),
        (spoil_config(num_hidden_layers=None), "config.json lacks 'num_hidden_layers', which LlamaForCausalLM needs"),
        (write_tokenizer(model={"vocab": {"a": 96}}), "tokenizer.json has ids up to 96, but config.json says vocab_"),
        (write_tokenizer(added_tokens=[{"id": 100}]), "tokenizer.json has ids up to 100"),
        (write_tokenizer(added_tokens=[{}]), "tokenizer.json is damaged"),
        (lambda directory: (directory / "model.safetensors").unlink(), "model.safetensors is missing"),
    ],
    ids=["nan", "gemma", "adapters", "generation", "config", "vocabulary", "added_token", "tokenizer", "missing"],
)
def test_what_cannot_be_imported_is_named_and_leaves_nothing(tmp_path, spoil, message):
    directory = save_tiny_llama(tmp_path / "llama")
    spoil(directory)
    command = ("import", "--hf-model", directory, "--megatron-path", tmp_path / "megatron", "--no-progress")
    for status, output, errors in run_on_ranks(on_rank, 2, *command):
        assert (status, output) == (1, "")
        assert message in errors.splitlines()[-1] and "Traceback" not in errors
    assert not (tmp_path / "megatron").exists()


@pytest.mark.parametrize("missing", [["import"], ["export", "--hf-path", "x"], ["roundtrip"], []])
def test_required_arguments(missing, capsys):
    with pytest.raises(SystemExit, match="2"):
        build_parser().parse_args(missing)
    assert "required" in capsys.readouterr().err
