# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Recipes by name, what a command line makes of them, and their table in the documentation."""

import importlib
import inspect
import pickle
import re
import runpy
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from megatron.bridge import recipes
from megatron.bridge.planning.memory import resolve
from megatron.bridge.planning.world import planned_world
from megatron.bridge.recipes.build import RecipeRequest, smallest_world_size
from tests.rigs.hub import put_into_cache, use_hub
from tests.unit_tests.models.tiny_llama import save_tiny_model

ROOT = Path(__file__).parents[3]
RUN_RECIPE = ROOT / "scripts" / "training" / "run_recipe.py"


def run_recipe(*arguments):
    return runpy.run_path(str(RUN_RECIPE))["main"](list(map(str, arguments)))


@pytest.mark.parametrize("option", ["--list", "--help"])
def test_it_answers_without_torch(option):
    code = f"import sys, runpy; sys.argv = ['run_recipe.py', {option!r}]\ntry: runpy.run_path({str(RUN_RECIPE)!r}, "
    code += "run_name='__main__')\nfinally: assert not {'torch', 'megatron.core'} & set(sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert shown.returncode == 0, shown.stderr
    if option == "--list":
        assert shown.stdout.split() == sorted(recipes.all_recipes())


def test_a_recipe_is_a_function_of_its_module_that_can_be_sent():
    for name, recipe in recipes.all_recipes().items():
        assert pickle.loads(pickle.dumps(recipe)) is recipe is getattr(recipes, name)
        assert recipe.__name__ == name and recipe.__doc__
        is_peft = name.endswith("_peft_config")
        assert list(inspect.signature(recipe).parameters) == (["peft_scheme"] if is_peft else [])


@pytest.mark.parametrize("name", sorted(set(recipes.all_recipes()) - {"vanilla_gpt_pretrain_config"}))
def test_a_recipe_passes_the_checks_on_the_devices_that_it_is_meant_for(name):
    cfg = recipes.find_recipe(name)()
    family = next(
        import_module(f"megatron.bridge.recipes.{module}").FAMILY
        for module in recipes.FAMILIES
        if name in import_module(f"megatron.bridge.recipes.{module}").RECIPES
    )
    size, _, mode = name.removesuffix("_config").rpartition("_")
    layout = family.sizes[size].adapters if mode == "peft" else family.sizes[size].full
    assert layout.gpus % smallest_world_size(cfg) == 0
    resolved, left_open = resolve(cfg, world_size=layout.gpus)
    assert resolved.model.bf16 and resolved.data_parallel_size
    wanted = ["checkpoint.pretrained_checkpoint"]
    assert mode == "pretrain" or cfg.tokenizer.tokenizer_model == family.sizes[size].hf_name
    assert left_open == ([] if mode == "pretrain" else wanted)


def test_the_plain_gpt_is_of_gpt2s_size_and_passes_the_checks_on_one_device():
    cfg = recipes.find_recipe("vanilla_gpt_pretrain_config")()
    resolved, left_open = resolve(cfg, world_size=1)
    assert resolved.model.bf16 and left_open == []
    with planned_world(1):
        cfg.model.initialize_model_parallel(create_gloo_process_groups=False)
        (model,) = cfg.model.provide_distributed_model(wrap_with_ddp=False)
        assert sum(param.numel() for param in model.parameters()) == 124_439_808  # as its weights' index counts them


def test_a_fresh_configuration_each_time():
    first, second = recipes.qwen3_600m_peft_config(), recipes.qwen3_600m_peft_config("dora")
    assert first.model is not second.model and first.optimizer is not second.optimizer
    assert (type(first.peft).__name__, type(second.peft).__name__) == ("LoRA", "DoRA")


@pytest.mark.parametrize(
    ("recipe", "mode", "expected"),
    [
        ("llama32_1b_sft_config", None, ("llama32_1b_sft_config", "sft")),
        ("llama32_1b_sft_config", "finetune", ("llama32_1b_sft_config", "sft")),
        ("llama32_1b_peft_config", "finetune", ("llama32_1b_peft_config", "peft")),
        ("llama32_1b", "finetune", ("llama32_1b_sft_config", "sft")),
        ("llama32_1b", "dora", ("llama32_1b_peft_config", "peft")),
        ("llama32_1b", "canonical_lora", ("llama32_1b_peft_config", "peft")),
        ("llama32_1b", "pretrain", ("llama32_1b_pretrain_config", "pretrain")),
        ("meta-llama/Llama-3.2-1B-Instruct", "lora", ("llama32_1b_peft_config", "peft")),
        ("Qwen/Qwen3-0.6B", "sft", ("qwen3_600m_sft_config", "sft")),
        ("Qwen/Qwen3-Next-80B-A3B-Thinking", "sft", ("qwen3_next_80b_a3b_sft_config", "sft")),
        ("Qwen/Qwen3.5-35B-A3B-Base", "lora", ("qwen35_text_35b_a3b_peft_config", "peft")),
        ("deepseek-ai/DeepSeek-V3", "sft", ("deepseek_v3_sft_config", "sft")),
        ("mine:ours_sft_config", None, ("mine:ours_sft_config", "sft")),
        ("mine:ours", "peft", ("mine:ours", "peft")),
    ],
)
def test_name_and_mode(recipe, mode, expected):
    assert RecipeRequest(recipe=recipe, mode=mode).resolve() == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"recipe": "llama32_1b_sft_confg"}, "there is no recipe .*did you mean llama32_1b_sft_config"),
        ({"recipe": "some-org/Tiny-1B", "mode": "sft"}, "no recipe is for 'some-org/Tiny-1B': .*--hf-path some-org/T"),
        ({"recipe": "llama32_1b_sft_config", "mode": "pretrain"}, "or --recipe llama32_1b_pretrain_config"),
        ({"recipe": "llama32_1b_sft_config", "peft_scheme": "dora"}, "trains all weights"),
        ({"recipe": "nowhere:mine_sft_config"}, "No module named 'nowhere'"),
        ({"recipe": "llama32_1b_pretrain_config", "packed_sequence": True}, "whole rows already"),
        ({"recipe": "llama32_1b_sft_config", "hf_path": "nowhere/at all"}, "is no directory"),
        ({"recipe": "llama32_1b_sft_config", "overrides": ["train.train_iter=5"]}, "did you mean train.train_iters"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(fields, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as raised:
        RecipeRequest(**fields).build()
    assert "\n" not in str(raised.value)


def test_a_hugging_face_directory_gives_the_sizes_and_the_recipe_the_layout(tmp_path):
    save_tiny_model(tmp_path, "LlamaForCausalLM")
    overrides = ["model.tensor_model_parallel_size=2", "optimizer.lr=1"]
    request = RecipeRequest(
        recipe="llama31_70b",
        mode="dora",
        hf_path=str(tmp_path),
        seq_length=48,
        packed_sequence=True,
        overrides=overrides,
    )
    cfg = request.build()
    assert (cfg.model.num_layers, cfg.model.hidden_size, cfg.model.vocab_size) == (4, 32, 96)
    assert cfg.model.tensor_model_parallel_size == 2 and cfg.model.sequence_parallel  # an override, and the recipe's
    assert cfg.model.seq_length == cfg.dataset.seq_length == 48 and cfg.dataset.pack_size == 48
    assert type(cfg.peft).__name__ == "DoRA" and cfg.optimizer.lr == 1
    assert cfg.checkpoint.pretrained_checkpoint == cfg.tokenizer.tokenizer_model == str(tmp_path)


@pytest.mark.parametrize(("overrides", "multiple"), [([], 1), (["model.context_parallel_size=2"], 32)])
def test_packed_samples_of_shared_rows_are_padded(overrides, multiple):
    """Of TP 8 with sequence parallelism, to 2 x CP x TP."""
    request = RecipeRequest(recipe="llama31_70b", mode="sft", packed_sequence=True, overrides=overrides)
    assert request.build().dataset.packing.pad_seq_to_mult == multiple


@pytest.fixture
def cached_qwen3(tmp_path, monkeypatch):
    """A cache in which a model with other sizes than published has the name of a recipe's model."""
    monkeypatch.chdir(tmp_path)
    use_hub(monkeypatch, tmp_path / "hub")
    save_tiny_model(tmp_path / "qwen3", "Qwen3ForCausalLM")
    return put_into_cache(tmp_path / "hub", "Qwen/Qwen3-4B", tmp_path / "qwen3")


def test_a_cached_model_says_what_a_recipe_builds(cached_qwen3):
    cfg = recipes.qwen3_4b_sft_config()
    assert (cfg.model.num_layers, cfg.model.hidden_size, cfg.model.hf_model_id) == (4, 32, "Qwen/Qwen3-4B")
    assert cfg.model.tensor_model_parallel_size == 2 and cfg.model.seq_length == 2048  # the recipe's
    assert recipes.qwen3_600m_sft_config().model.num_layers == 28  # which isn't cached


@pytest.mark.parametrize("asked", [{"recipe": "Qwen/Qwen3-4B"}, {"recipe": "qwen3_600m", "hf_path": "Qwen/Qwen3-4B"}])
def test_a_run_keeps_the_name_of_a_model_on_the_hub(cached_qwen3, asked):
    cfg = RecipeRequest(mode="lora", **asked).build()
    assert cfg.model.num_layers == 4
    assert cfg.checkpoint.pretrained_checkpoint == cfg.tokenizer.tokenizer_model == "Qwen/Qwen3-4B"
    resolve(cfg, world_size=2)
    with pytest.raises(FileNotFoundError, match="'Qwen/Qwen3-8B' is no directory, and the hub's cache in .*hf d"):
        RecipeRequest(recipe="Qwen/Qwen3-8B", mode="sft").build()


def test_a_dry_run_shows_the_resolved_configuration_and_the_memory(capsys):
    arguments = "--recipe llama32_1b --mode sft --seq_length 512 --dry_run --world_size 2 train.train_iters=77"
    assert run_recipe(*arguments.split(), "optimizer.optimizer_cpu_offload=true") == 0
    shown = capsys.readouterr().out
    assert "train_iters: 77" in shown and "seq_length: 512" in shown
    assert (
        "mixed_precision:\n  _target_: megatron.bridge.training.mixed_precision.MixedPrecisionConfig" in shown
    )  # resolved
    assert "rank 0 of 2 (TP 1, PP 1, DP 2): 1,235,814,400 parameters" in shown
    assert "still to set: checkpoint.pretrained_checkpoint" in shown
    assert not torch.distributed.is_initialized()


def test_a_dry_run_of_what_cannot_work_ends_in_one_line(capsys):
    assert run_recipe("--recipe", "llama31_8b_sft_config", "--dry-run", "--world-size", 3) == 1
    assert re.fullmatch(r"run_recipe: 3 ranks can't be shared by .*\n", capsys.readouterr().err)


def test_the_memory_command_says_how_much_offload_makes_it_fit(capsys):
    from megatron.bridge.memory import main

    one_device = ["model.tensor_model_parallel_size=1", "model.sequence_parallel=false", "--world-size", "1"]
    assert main(["llama31_8b_sft_config", *one_device]) == 0
    table = capsys.readouterr().out
    documented = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert table.strip() in documented, "bring docs/recipes.md in line"


@pytest.mark.parametrize(
    ("recipe", "layout", "parameters"),
    [
        ("llama31_8b", "TP 2, PP 1, DP 512", 4_015_263_744),
        ("llama31_70b", "TP 8, PP 4, DP 32", 2_271_543_296),
        ("llama31_405b", "TP 8, PP 16, DP 8", 3_187_933_184),
    ],
)
def test_a_run_on_1024_ranks_is_planned(recipe, layout, parameters, capsys):
    from megatron.bridge.memory import main

    assert main([f"{recipe}_sft_config", "train.global_batch_size=1024", "--world-size", "1024"]) == 0
    shown = capsys.readouterr().out
    assert f"of 1024 ({layout}): {parameters:,} parameters" in shown


def documented_commands() -> list[str]:
    """The plans that docs/recipes.md and the commands' own descriptions show."""
    files = ("docs/recipes.md", "src/megatron/bridge/memory.py", "scripts/training/run_recipe.py")
    text = "\n".join((ROOT / file).read_text(encoding="utf-8") for file in files)
    plans = r"^ *python (?:-m megatron\.bridge\.memory|scripts/training/run_recipe\.py .*--dry-run).*$"
    return sorted({command.strip() for command in re.findall(plans, text, re.MULTILINE)})


@pytest.mark.parametrize("command", documented_commands())
def test_a_documented_plan_is_made(command, capsys):
    from megatron.bridge.memory import main

    is_dry_run = "--dry-run" in command
    arguments = command.split()[2 if is_dry_run else 3 :]
    assert (run_recipe if is_dry_run else main)(*(arguments if is_dry_run else [arguments])) == 0
    assert "GiB a device: " in capsys.readouterr().out


def recipe_table() -> str:
    """The sizes as the table of docs/recipes.md."""
    lines = ["| name | model | parameters | full finetune | adapters |", "|---|---|---|---|---|"]
    for family in (import_module(f"megatron.bridge.recipes.{name}").FAMILY for name in recipes.FAMILIES):
        for name, size in family.sizes.items():
            layouts = [
                f"{layout.gpus} GPU{'s' * (layout.gpus > 1)}" + (f": {layout}" if layout.gpus > 1 else "")
                for layout in (size.full, size.adapters)
            ]
            lines.append(f"| `{name}` | {size.hf_name} | {size.parameters:,} | {' | '.join(layouts)} |")
    return "\n".join(lines)


def test_the_documented_table_is_the_registry():
    documented = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert recipe_table() in documented, f"put this into docs/recipes.md:\n{recipe_table()}"


def test_the_documented_recipe_works(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "support_bot" in block]
    (tmp_path / "my_recipes.py").write_text(block)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    cfg = RecipeRequest(recipe="my_recipes:support_bot_sft_config").build()
    assert cfg.dataset.dataset_root == "data/support" and cfg.model.num_layers == 36


def test_the_public_pieces_of_a_recipe():
    from megatron.bridge.recipes.utils.finetune_utils import default_peft_config
    from megatron.bridge.recipes.utils.optimizer_utils import distributed_fused_adam_with_cosine_annealing

    optimizer, scheduler = distributed_fused_adam_with_cosine_annealing(max_lr=3e-4, lr_warmup_iters=10)
    assert (optimizer.lr, optimizer.min_lr, scheduler.lr_warmup_iters) == (3e-4, pytest.approx(3e-5), 10)
    assert optimizer.use_distributed_optimizer and scheduler.lr_decay_style == "cosine"
    assert default_peft_config("lora", dim=4).dim == 4
    with pytest.raises(ValueError, match="peft_scheme='qlora': expected one of lora, dora"):
        default_peft_config("qlora")
