# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Command-line overrides: what they set, and what they refuse with the nearest valid name."""

import pytest
import torch
from megatron.core.transformer.enums import AttnBackend

from megatron.bridge.training.config import ProfilingConfig, RNGConfig
from megatron.bridge.training.config.mixed_precision import MixedPrecisionConfig
from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides
from megatron.bridge.utils.overrides import apply_overrides
from tests.rigs.config_examples import make_config


def value_at(cfg, path):
    for name in path.split("."):
        cfg = cfg[name] if isinstance(cfg, dict) else getattr(cfg, name)
    return cfg


@pytest.mark.parametrize(
    ("override", "path", "expected"),
    [
        ("train.train_iters=50", "train.train_iters", 50),
        ("train.train_iters=null", "train.train_iters", None),
        ("train.train_iters=None", "train.train_iters", None),
        ("train.exit_signal=SIGUSR1", "train.exit_signal.name", "SIGUSR1"),
        ("train.iterations_to_skip=[3,4]", "train.iterations_to_skip", [3, 4]),
        ("train.iterations_to_skip=[]", "train.iterations_to_skip", []),
        ("logger.timing_log_level=2", "logger.timing_log_level", 2),
        ("optimizer.lr=1e-5", "optimizer.lr", 1e-5),
        ("optimizer.lr=1", "optimizer.lr", 1.0),
        ("optimizer.lr=5.e-6", "optimizer.lr", 5e-6),
        ("optimizer.exp_avg_dtype=bf16", "optimizer.exp_avg_dtype", torch.bfloat16),
        ("optimizer.initial_loss_scale=65536", "optimizer.initial_loss_scale", 65536.0),
        ("model.bf16=true", "model.bf16", True),
        ("model.bf16=True", "model.bf16", True),
        ("model.params_dtype=torch.float16", "model.params_dtype", torch.float16),
        ("model.pipeline_dtype=null", "model.pipeline_dtype", None),
        ("model.attention_backend=flash", "model.attention_backend", AttnBackend.flash),
        ("model.activation_func=torch.nn.functional.gelu", "model.activation_func", torch.nn.functional.gelu),
        ("model.window_size=[128,0]", "model.window_size", (128, 0)),
        ("model.moe_layer_freq=[1,0]", "model.moe_layer_freq", [1, 0]),
        ("model.recompute_granularity=full", "model.recompute_granularity", "full"),
        ("model.seq_length=4096", "model.seq_length", 4096),
        ("checkpoint.save=null", "checkpoint.save", None),
        ("checkpoint.save=/a/b c=d", "checkpoint.save", "/a/b c=d"),
        ("checkpoint.save='null'", "checkpoint.save", "null"),
        ("checkpoint.save=2026", "checkpoint.save", "2026"),
        ("checkpoint.save=true", "checkpoint.save", "true"),
        ("checkpoint.save=a: b", "checkpoint.save", "a: b"),
        ("checkpoint.save=", "checkpoint.save", ""),
        ("checkpoint.non_persistent_ckpt_type=local", "checkpoint.non_persistent_ckpt_type", "local"),
        ("dataset.dataset_root=a/b", "dataset.dataset_root", "a/b"),
        (
            "dataset.dataset_kwargs={chat: true, add_bos: false}",
            "dataset.dataset_kwargs",
            {"chat": True, "add_bos": False},
        ),
        ("dataset.dataset_kwargs={chat:true}", "dataset.dataset_kwargs", {"chat": True}),
        ("dataset.dataset_kwargs.chat=true", "dataset.dataset_kwargs", {"chat": True}),
        ("+dataset.dataset_kwargs.chat=true", "dataset.dataset_kwargs.chat", True),
        ("env_vars.OMP_NUM_THREADS=1", "env_vars", {"OMP_NUM_THREADS": "1"}),
        ("mixed_precision=bf16_mixed", "mixed_precision", "bf16_mixed"),
        ("mixed_precision.bf16=true", "mixed_precision", MixedPrecisionConfig(bf16=True)),
        ("profiling.profile_ranks=[0,1]", "profiling", ProfilingConfig(profile_ranks=[0, 1])),
        ("profiling={}", "profiling", ProfilingConfig()),
        ("rng={seed: 7}", "rng", RNGConfig(seed=7)),
        ("++rng.seed=8", "rng.seed", 8),
        ("logger.memory_keys={a: b}", "logger.memory_keys", {"a": "b"}),
    ],
)
def test_an_override_sets_one_option(override, path, expected):
    before = ("checkpoint.save=before", "model.pipeline_dtype=float16", "train.iterations_to_skip=[9]")
    cfg, untouched = make_config(*before), make_config(*before)
    assert apply_overrides(cfg, [override]) is cfg
    value = value_at(cfg, path)
    assert value == expected and type(value) is type(expected)
    assert cfg != untouched
    setattr(cfg, override.strip("+").split(".")[0].split("=")[0], getattr(untouched, path.split(".")[0]))
    assert cfg == untouched  # nothing outside that section


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.train_itres=50", "unknown option train.train_itres: did you mean train.train_iters?"),
        ("trian.train_iters=50", "unknown option trian.train_iters: did you mean train.train_iters?"),
        ("train_iters=50", "unknown option train_iters: did you mean train.train_iters?"),
        ("optimiser.lr=1", "unknown option optimiser.lr: did you mean optimizer.lr?"),
        ("optimizer.max_lr=1", "OptimizerConfig has no field max_lr"),
        ("model.num_layer=3", "did you mean model.num_layers?"),
        ("checkpoint.sync_offload=false", "CheckpointConfig has no field sync_offload"),
        ("scheduler.lr_decay_steps=3", "unknown option scheduler.lr_decay_steps"),
        ("data_parallel_size=3", "unknown option data_parallel_size"),
        ("_checkpoint_load_required=true", "unknown option _checkpoint_load_required"),
        ("+train.brand_new=3", "TrainingConfig has no field brand_new"),
        ("train.train_iters=50.0", "train.train_iters is 50.0 (float): expected int or null"),
        ("train.train_iters=1e3", "train.train_iters is 1000.0 (float): expected int or null"),
        ("train.train_iters=true", "train.train_iters is True (bool): expected int or null"),
        ("train.train_iters=many", "train.train_iters is many (str): expected int or null"),
        ("train.train_iters=", "train.train_iters is  (str): expected int or null"),
        ("optimizer.lr=fast", "optimizer.lr is fast (str): expected float or null"),
        ("optimizer.lr=[1]", "optimizer.lr is [1] (list): expected float or null"),
        ("optimizer.weight_decay=null", "optimizer.weight_decay is null: expected float"),
        ("optimizer.exp_avg_dtype=float61", "expected a dtype such as bfloat16"),
        ("model.bf16=1", "model.bf16 is 1 (int): expected true or false"),
        ("model.bf16=yes", "model.bf16 is yes (str): expected true or false"),
        ("model.attention_backend=flush", "did you mean flash?"),
        ("model.activation_func=os.system", "model.activation_func is os.system (str): expected a function"),
        ("model.recompute_granularity=ful", "expected one of full, selective or null; did you mean full?"),
        ("model.window_size=[1]", "expected tuple of int, int or null"),
        ("dist.device=gpu", "dist.device is gpu (str): expected one of auto, cuda, cpu"),
        ("logger.timing_log_level=3", "expected one of 0, 1, 2"),
        ("logger.timing_log_level=true", "expected one of 0, 1, 2"),
        ("train.iterations_to_skip=[1,a]", "train.iterations_to_skip[1] is a (str): expected int"),
        ("train={train_itres: 3}", "did you mean train.train_iters?"),
        ("train=3", "train is 3 (int): expected TrainingConfig"),
        ("train.train_iters.x=3", "train.train_iters is a int and has no option x"),
        ("peft.dim=3", "peft is null and has no option dim"),
        ("~train.train_iters", "write train.train_iters=null"),
        ("~env_vars.X", "there is no such entry"),
        ("train.train_iters", "can't be read: expected key=value"),
        ("=3", "can't be read: expected key=value"),
        ("--lr=3", "can't be read: expected key=value"),
        ("dataset.dataset_kwargs={chat", "expected dict of text, Any or null"),
        ("peft={_target_: os.system, command: ls}", "peft._target_ is os.system"),
        ("mixed_precision=[3]", "mixed_precision is [3] (list): expected text or MixedPrecisionConfig or null"),
    ],
)
def test_a_bad_override_is_refused_with_the_way_out(override, message):
    cfg = make_config()
    with pytest.raises(ValueError) as error:
        apply_overrides(cfg, [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert cfg == make_config()


def test_later_overrides_win_and_entries_can_be_removed():
    cfg = apply_overrides(
        make_config(), ["train.train_iters=1", "train.train_iters=2", "env_vars={A: b, C: d}", "~env_vars.A"]
    )
    assert cfg.train.train_iters == 2
    assert cfg.env_vars == {"C": "d"}


def test_a_section_is_replaced_by_a_target():
    cfg = apply_overrides(
        make_config(), ["dataset={_target_: megatron.bridge.training.config.MockGPTDatasetConfig, seq_length: 32}"]
    )
    assert type(cfg.dataset).__name__ == "MockGPTDatasetConfig"
    cfg.validate(1)


def test_file_first_then_command_line(tmp_path):
    path = tmp_path / "overrides.yaml"
    path.write_text(
        "train: {train_iters: 7, micro_batch_size: 4}\n"
        "optimizer: {lr: 3e-4, exp_avg_dtype: float32}\n"
        "profiling: {profile_ranks: [1]}\n"
        "checkpoint: {save: null}\n"
        "env_vars: {A: '1'}\n"
    )
    cfg = make_config("checkpoint.save=here")
    result = process_config_with_overrides(cfg, config_filepath=path, cli_overrides=["train.train_iters=9"])
    assert result is cfg
    assert (cfg.train.train_iters, cfg.train.micro_batch_size, cfg.train.global_batch_size) == (9, 4, 8)
    assert (cfg.optimizer.lr, cfg.checkpoint.save, cfg.env_vars) == (3e-4, None, {"A": "1"})
    assert cfg.profiling == ProfilingConfig(profile_ranks=[1])


def test_a_saved_run_config_can_be_the_file(tmp_path):
    path = tmp_path / "run_config.yaml"
    saved = make_config("train.train_iters=77", "model.attention_backend=unfused")
    saved.to_yaml(path)
    assert process_config_with_overrides(make_config(), path) == saved


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {train_itres: 3}", "did you mean train.train_iters?"),
        ("train: {train_iters: x}", "train.train_iters is x (str)"),
        ("train: 3", "train is 3 (int): expected TrainingConfig"),
        ("- a", "holds list: expected options by section"),
        ("peft: {_target_: os.system}", "peft._target_ is os.system"),
    ],
)
def test_a_bad_file_is_named(text, message, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        process_config_with_overrides(make_config(), path)
    assert str(error.value).startswith(str(path)) and message in str(error.value)


def test_nothing_to_override():
    assert process_config_with_overrides(make_config()) == make_config()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("results/my #1", "results/my #1"),
        ("#1", "#1"),
        ("~", "~"),
        ("|", "|"),
        ("a: b", "a: b"),
        ("'a #1'", "a #1"),
        ("'null'", "null"),
        (" x ", "x"),
        ("", ""),
        ("Null", None),
    ],
)
def test_a_text_stands_as_it_is_unless_it_is_quoted_or_null(text, value):
    assert apply_overrides(make_config(), [f"checkpoint.save={text}"]).checkpoint.save == value


def test_a_files_keys_may_be_paths(tmp_path):
    cfg, path = make_config(), tmp_path / "more.yaml"
    path.write_text(
        "optimizer.lr: 1e-3\nprofiling.record_shapes: true\nenv_vars.NCCL_DEBUG: INFO\ntrain: {train_iters: 3}\n"
    )
    process_config_with_overrides(cfg, path)
    assert (cfg.optimizer.lr, cfg.profiling.record_shapes, cfg.train.train_iters) == (1e-3, True, 3)
    assert cfg.env_vars == {"NCCL_DEBUG": "INFO"}
    for text, error in (
        ("optimizer.lrr: 1", r"unknown option optimizer\.lrr: did you mean optimizer\.lr\?"),
        ("optimiser.lr: 1", r"unknown option optimiser\.lr: did you mean optimizer\.lr\?"),
        ("optimizer.lr: fast", r"optimizer\.lr is fast \(str\): expected float"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"more\.yaml: {error}"):
            process_config_with_overrides(cfg, path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer: {lr: 1}\noptimizer.lr: 2", "optimizer.lr comes twice, in its section and as a path of names"),
        ("optimizer.lr: 2\noptimizer: {lr: 1}", "optimizer.lr comes twice"),
        ("env_vars: {A: '1'}\nenv_vars.A: '2'", "env_vars.A comes twice"),
        ("peft: {_target_: megatron.bridge.peft.lora.LoRA, dim: 8}\npeft.dim: 4", "peft.dim comes twice"),
        (
            "profiling: null\nprofiling.record_shapes: true",
            "profiling has a value of its own beside profiling.record_sh",
        ),
    ],
)
def test_an_option_with_two_values_in_a_file_is_refused(text, message, tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"twice.yaml: {message}.*: leave one of them out$"):
        process_config_with_overrides(make_config(), path)


@pytest.mark.parametrize("is_first", [False, True])
def test_a_path_counts_on_top_of_its_section_whichever_comes_first(is_first, tmp_path):
    sections = ["peft: {_target_: megatron.bridge.peft.lora.LoRA, dim: 8}", "env_vars: {A: '1'}"]
    paths = ["peft.alpha: 64", "env_vars.B: '2'"]
    path = tmp_path / "both.yaml"
    path.write_text("\n".join([*paths, *sections] if is_first else [*sections, *paths]))
    cfg = process_config_with_overrides(make_config(), path)
    assert (cfg.peft.dim, cfg.peft.alpha, cfg.env_vars) == (8, 64, {"A": "1", "B": "2"})
