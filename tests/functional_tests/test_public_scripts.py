# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Scripts in the forms that users have: those in `public_scripts/` take public names only, and know of no tests.

They run in the ranks that the other tests use too. What a script does itself is asserted there.
"""

import importlib.util
import itertools
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron.bridge.utils.distributed import destroy_model_parallel
from tests.rigs.ranks import run_on_ranks

SCRIPTS = Path(__file__).parent / "public_scripts"


def _run(name, store, *arguments):
    """As `python name.py arguments` does; the ranks of a script that takes the process group down get another one."""
    before, path, modules = sys.argv, list(sys.path), set(sys.modules)
    backend, rank, world_size = dist.get_backend(), dist.get_rank(), dist.get_world_size()
    sys.argv = [str(SCRIPTS / f"{name}.py"), *map(str, arguments)]
    sys.path.insert(0, str(SCRIPTS))
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        sys.argv, sys.path[:] = before, path
        for module in set(sys.modules) - modules:
            if str(getattr(sys.modules[module], "__file__", None)).startswith(str(SCRIPTS)):
                del sys.modules[module]
        if not dist.is_initialized():
            destroy_model_parallel()
            dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world_size)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """A new file for each process group that ranks keep for the tests that follow: it must outlive the test."""
    directory = tmp_path_factory.mktemp("stores")
    return (directory / str(number) for number in itertools.count())


@pytest.fixture
def run(stores):
    def run_script(name, *arguments, ranks=1):
        run_on_ranks(_run, ranks, name, next(stores), *arguments)

    return run_script


@pytest.fixture(scope="module")
def model(inputs):
    return inputs / "my-model"


@pytest.fixture(scope="module")
def data(inputs):
    return inputs / "my-data"


@pytest.fixture(scope="module")
def checkpoint(model, stores, tmp_path_factory):
    """A Megatron checkpoint, as the conversion script imports it."""
    directory = tmp_path_factory.mktemp("imported")
    arguments = "import", "--hf-model", model, "--megatron-path", directory / "pretrained", "--torch-dtype", "bfloat16"
    run_on_ranks(_run, 1, "convert_checkpoints", next(stores), *arguments, "--device-map", "auto")
    return directory / "pretrained"


def _tracker(directory):
    return (directory / "latest_checkpointed_iteration.txt").read_text()


def _assert_same_weights(exported, model):
    """The weights of a Hugging Face directory are those of the model that they come from, cast."""
    ours, theirs = (load_file(path / "model.safetensors") for path in (exported, model))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name].to(ours[name].dtype)) for name in ours)


def test_a_recipe_a_file_and_overrides(run, model, data, tmp_path):
    (tmp_path / "more.yaml").write_text(
        "model: {num_layers: 4, hidden_size: 32, ffn_hidden_size: 48, num_attention_heads: 4, num_query_groups: 2,\n"
        "        kv_channels: 8, vocab_size: 328, rotary_base: 10000, rope_scaling: false, seq_length: 32,\n"
        "        layernorm_epsilon: 1.0e-6, share_embeddings_and_output_weights: false}\n"
        "train: {train_iters: 2, global_batch_size: 4}\n"
        "scheduler: {lr_warmup_iters: 1}\n"
    )
    places = ["--pretrained-checkpoint", model, "--dataset-root", data]
    overrides = [f"tokenizer.tokenizer_model={model}", "logger.tensorboard_dir=null"]
    overrides += [f"checkpoint.{name}={tmp_path / 'saved'}" for name in ("save", "load")]
    overrides += ["optimizer.optimizer_cpu_offload=true", "optimizer.optimizer_offload_fraction=1.0"]
    run("recipe_with_overrides", "--config-file", tmp_path / "more.yaml", *places, *overrides, ranks=2)
    assert _tracker(tmp_path / "saved") == "2"


def test_overrides_through_omegaconf(run, model, data, tmp_path):
    (tmp_path / "more.yaml").write_text(
        "model: {num_layers: 4, hidden_size: 32, ffn_hidden_size: 48, num_attention_heads: 4, num_query_groups: 2,\n"
        "        kv_channels: 8, vocab_size: 328, rotary_base: 10000, qk_layernorm: false, seq_length: 32,\n"
        "        layernorm_epsilon: 1.0e-6, share_embeddings_and_output_weights: false}\n"
        "train: {train_iters: 1, global_batch_size: 4}\n"
    )
    overrides = [f"dataset.dataset_root={data}", "dataset.do_test=false", "dataset.seq_length=32"]
    overrides += [f"checkpoint.{name}={tmp_path / 'saved'}" for name in ("save", "load")]
    overrides += [f"tokenizer.tokenizer_model={model}", "logger.tensorboard_dir=null", "scheduler.lr_warmup_iters=0"]
    arguments = "--config-file", tmp_path / "more.yaml", "--pretrained-checkpoint", model
    run("omegaconf_overrides", *arguments, *overrides)
    assert _tracker(tmp_path / "saved") == "1"


def test_a_configuration_by_hand_and_the_way_back(run, model, data, tmp_path):
    run("configuration_by_hand", model, data, tmp_path, ranks=2)
    assert _tracker(tmp_path / "checkpoints") == "2"
    run("export_checkpoint", model, tmp_path / "checkpoints", tmp_path / "hf", ranks=2)
    assert (tmp_path / "hf" / "model.safetensors").is_file() and (tmp_path / "hf" / "tokenizer.json").is_file()


def test_the_quick_start_of_conversion(run, model, tmp_path):
    run("quick_start_convert", model, tmp_path / "exported")
    _assert_same_weights(tmp_path / "exported", model)


def test_the_quick_start_of_training(run, tmp_path):
    run("quick_start_pretrain", tmp_path)
    assert _tracker(tmp_path / "checkpoints") == "2" and any((tmp_path / "tb_logs").iterdir())


def test_the_quick_start_of_finetuning(run, model, data, tmp_path):
    run("quick_start_finetune", "--hf-model", model, "--dataset-root", data, "--output", tmp_path)
    assert _tracker(tmp_path / "checkpoints") == "2"


def test_a_model_of_ones_own(run, model, tmp_path):
    own = Path(shutil.copytree(model, tmp_path / "camel"))
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(
        json.dumps(config | {"architectures": ["CamelForCausalLM"], "model_type": "camel"})
    )
    run("own_model", own, tmp_path / "exported")
    _assert_same_weights(tmp_path / "exported", model)


def test_forward_steps_of_two_three_and_four_arguments(run, model, data, tmp_path):
    run("forward_steps", model, data, tmp_path)
    assert [_tracker(tmp_path / name) for name in ("two", "three", "four", "class")] == ["1"] * 4


def test_callbacks_as_classes_and_as_functions(run, model, data, tmp_path):
    run("callbacks", model, data, tmp_path)


def test_a_dataset_of_ones_own(run, model, data, tmp_path):
    run("own_dataset", model, data, tmp_path)
    assert _tracker(tmp_path) == "2"


def test_adapters_from_the_first_step_to_the_merged_model(run, model, data, tmp_path):
    run("lora_cycle", model, data, tmp_path)
    assert (tmp_path / "peft" / "adapter_model.safetensors").is_file()
    run("merge_lora", model, tmp_path / "adapters" / "iter_0000004", tmp_path / "merged_by_hand")
    _assert_same_weights(tmp_path / "merged_by_hand", tmp_path / "merged")


def test_conversion_back(run, model, checkpoint, tmp_path):
    arguments = "export", "--hf-model", model, "--megatron-path", checkpoint, "--hf-path", tmp_path / "exported"
    run("convert_checkpoints", *arguments)
    _assert_same_weights(tmp_path / "exported", model)


def test_a_round_trip_at_two_layouts(run, model, tmp_path):
    saved = "--megatron-save-path", tmp_path / "megatron"
    run("roundtrip_multi_gpu", "--hf-model-id", model, "--output-dir", tmp_path / "tp", *saved, "--tp", 2, ranks=2)
    loaded = "--megatron-load-path", tmp_path / "megatron"
    run("roundtrip_multi_gpu", "--hf-model-id", model, "--output-dir", tmp_path / "pp", *loaded, "--pp", 2, ranks=2)
    for name in ("tp", "pp"):
        _assert_same_weights(tmp_path / name, model)


def test_models_out_of_checkpoints_and_into_them(run, checkpoint, tmp_path):
    run("load_save_models", checkpoint, tmp_path / "saved")


def test_generation_without_an_engine(run, model):
    run("generate_text", "--hf_model_path", model, "--pp", 2, ranks=2)


def test_generation_with_the_engine(run, model, tmp_path):
    prompts = ["the cat sat", "on"]
    arguments = "--hf-model-path", model, "--output", tmp_path / "texts.jsonl", "--max-new-tokens", 3
    run("text_generation", *arguments, "--prompts", *prompts)
    rows = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == prompts and all(row["text"] for row in rows)


def test_data_of_the_hub(run, model, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"question": f"where sat {index}", "title": "cats", "answers": ["on the mat"]} for index in range(8)]
    saved = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(rows), "dev": datasets.Dataset.from_list(rows[:2])}
    )
    saved.save_to_disk(tmp_path / "cats")
    run("hub_data", model, tmp_path / "cats", tmp_path / "run")
    assert _tracker(tmp_path / "run") == "2"


def test_what_an_rl_framework_does(run, model, data, tmp_path):
    run("rl_framework", model, data, tmp_path)


def test_a_loop_of_ones_own(run, model, data, tmp_path):
    run("custom_loop", model, data, tmp_path)
    assert _tracker(tmp_path) == "3"
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if line["split"] == "train"] == [1, 2] and steps[0]["throughput"] > 0


def test_a_checkpoint_manager_of_ones_own(run, model, data, tmp_path):
    run("checkpoint_manager", model, data, tmp_path)


@pytest.mark.any_core
@pytest.mark.skipif(importlib.util.find_spec("nemo_run") is None, reason="nemo_run is not installed")
def test_a_launch_with_plugins(tmp_path):
    command = [sys.executable, str(SCRIPTS / "launch_nemo_run.py"), str(SCRIPTS / "quick_start_pretrain.py")]
    environment = os.environ | {"NEMORUN_HOME": str(tmp_path), "COLUMNS": "300"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "train.exit_signal_handler=true" in done.stdout and "profiling.profile_step_end=2" in done.stdout
