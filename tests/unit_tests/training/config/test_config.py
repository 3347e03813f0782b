# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The configuration as a whole: public names, sections, derived values, what `runtime_config_update` writes, YAML."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig as CoreDDPConfig
from megatron.core.optimizer import OptimizerConfig as CoreOptimizerConfig

import megatron.bridge.training.config as config_module
from megatron.bridge.training.config import (
    CheckpointConfig,
    ConfigContainer,
    DistributedDataParallelConfig,
    DistributedInitConfig,
    FinetuningDatasetConfig,
    GPTSFTDatasetConfig,
    OptimizerConfig,
    OptimizerConfigOverrideProvider,
    OptimizerConfigOverrideProviderContext,
    ProfilingConfig,
    RNGConfig,
    SchedulerConfig,
    TrainingConfig,
    ValidationConfig,
    runtime_config_update,
)
from megatron.bridge.training.config.mixed_precision import MixedPrecisionConfig, get_mixed_precision_config, register
from tests.rigs.config_examples import make_config


def test_every_public_name_is_there():
    for name in config_module.__all__:
        assert hasattr(config_module, name)
    assert FinetuningDatasetConfig is GPTSFTDatasetConfig


def test_importing_it_loads_neither_transformers_nor_cuda():
    code = (
        "import sys, torch, megatron.bridge.training.config\n"
        "heavy = {'transformers', 'tokenizers', 'datasets', 'nemo_run'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=500)


def test_every_field_says_what_it_is():
    import ast
    import inspect

    for cls in (CheckpointConfig, TrainingConfig, ValidationConfig, SchedulerConfig, ConfigContainer, ProfilingConfig):
        body = ast.parse(inspect.getsource(cls)).body[0].body
        for node, following in zip(body, [*body[1:], None], strict=True):
            if isinstance(node, ast.AnnAssign):
                is_text = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                assert is_text, f"{cls.__name__}.{node.target.id} has no text"


def test_checkpoint_defaults_are_the_known_ones():
    cfg = CheckpointConfig()
    expected = {
        "save": None,
        "save_interval": None,
        "most_recent_k": -1,
        "save_optim": True,
        "load_optim": True,
        "load_rng": True,
        "finetune": False,
        "ckpt_format": "torch_dist",
        "fully_parallel_save": True,
        "fully_parallel_load": False,
        "async_save": False,
        "dist_ckpt_strictness": "assume_ok_unexpected",
        "non_persistent_local_ckpt_algo": "fully_parallel",
        "replication_factor": 2,
        "save_tokenizer_assets": True,
    }
    assert {name: getattr(cfg, name) for name in expected} == expected
    assert not [
        name for name in cfg.__dataclass_fields__ if "sync" in name and name != "async_save" and "async" not in name
    ]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (TrainingConfig(train_iters=1), "train.micro_batch_size is not set"),
        (TrainingConfig(micro_batch_size=0, train_iters=1), "train.micro_batch_size is 0"),
        (TrainingConfig(micro_batch_size=1), "train.train_iters and train.train_samples are both unset"),
        (TrainingConfig(micro_batch_size=1, train_iters=1, train_samples=1), "are both set"),
        (TrainingConfig(micro_batch_size=1, train_iters=-1), "train.train_iters is -1"),
        (ValidationConfig(eval_iters=-1), "validation.eval_iters is -1"),
        (ValidationConfig(eval_interval=0), "validation.eval_interval is 0"),
        (SchedulerConfig(lr_decay_iters=0), "scheduler.lr_decay_iters is 0"),
        (SchedulerConfig(lr_warmup_fraction=1.0), "scheduler.lr_warmup_fraction=1.0"),
        (SchedulerConfig(lr_warmup_fraction=0.1, lr_warmup_iters=2), "the warm-up has one length"),
        (
            SchedulerConfig(override_opt_param_scheduler=True, use_checkpoint_opt_param_scheduler=True),
            "the schedule comes from one place",
        ),
        (RNGConfig(seed=-1), "rng.seed is -1"),
        (DistributedInitConfig(device="cpu", distributed_backend="nccl"), "set dist.distributed_backend=gloo"),
        (DistributedInitConfig(distributed_timeout_minutes=0), "dist.distributed_timeout_minutes is 0"),
        (config_module.LoggerConfig(log_interval=0), "logger.log_interval is 0"),
        (ProfilingConfig(profile_step_start=5, profile_step_end=4), "expected 0 <= start <= end"),
        (CheckpointConfig(save_interval=0), "checkpoint.save_interval is 0"),
        (CheckpointConfig(most_recent_k=0), "checkpoint.most_recent_k is 0"),
        (CheckpointConfig(load_main_params_from_ckpt=True), "set checkpoint.load_optim=false"),
        (CheckpointConfig(ckpt_step=3), "checkpoint.ckpt_step=3 without checkpoint.load"),
        (CheckpointConfig(ckpt_step=-1, load="run"), "checkpoint.ckpt_step is -1: it is the number"),
        (CheckpointConfig(async_save=True), "checkpoint.async_save=true without checkpoint.save"),
        (MixedPrecisionConfig(fp16=True, bf16=True), "weights have one format"),
        (MixedPrecisionConfig(fp8_param=True), "they are one choice"),
    ],
)
def test_a_section_refuses_its_own_fields(section, message):
    before = dataclasses.asdict(section)
    with pytest.raises(ValueError) as error:
        section.finalize()
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert dataclasses.asdict(section) == before


def test_default_sections_are_fine():
    for cls in (ValidationConfig, SchedulerConfig, RNGConfig, DistributedInitConfig, CheckpointConfig, ProfilingConfig):
        cls().finalize()


# --- Core's classes -------------------------------------------------------------------------------------------------


def test_the_optimizer_config_waits_for_finalize_and_can_be_finalized_again():
    config = OptimizerConfig(exp_avg_dtype=torch.bfloat16)  # Core's own class refuses this at once
    assert isinstance(config, CoreOptimizerConfig)
    with pytest.raises(ValueError, match="^optimizer: exp_avg_dtype"):
        config.finalize()
    config.exp_avg_dtype = torch.float32
    config.finalize()
    once = dict(vars(config))
    assert once["use_precision_aware_optimizer_no_fp8_or_ds_fp8"] is False
    config.finalize()
    assert vars(config) == once


def test_the_ddp_config_waits_for_finalize_and_can_be_finalized_again():
    config = DistributedDataParallelConfig(reuse_grad_buf_for_mxfp8_param_ag=True)
    assert isinstance(config, CoreDDPConfig)
    with pytest.raises(ValueError, match="^ddp: "):
        config.finalize()
    config.fp8_param_gather = True
    config.finalize()
    once = dict(vars(config))
    config.finalize()
    assert vars(config) == once


def test_the_override_provider_gives_cores_usual_overrides():
    context = OptimizerConfigOverrideProviderContext(
        scheduler_config=SchedulerConfig(), optimizer_config=OptimizerConfig(lr=1.0, decoupled_lr=0.5), model=None
    )
    overrides = OptimizerConfigOverrideProvider().build_config_overrides(context)
    assert {"wd_mult": 0.0} in overrides.values()
    # The flag is what Core up to 0.16.1 tells groups in a checkpoint apart by; rates alone it confuses.
    assert {"max_lr": 0.5, "is_decoupled_lr": True} in overrides.values()


# --- derived values -------------------------------------------------------------------------------------------------


def test_derived_values():
    derived = make_config("model.tensor_model_parallel_size=2", "validation.eval_interval=5").derive(4)
    assert (derived.world_size, derived.model_parallel_size, derived.data_parallel_size) == (4, 2, 2)
    assert (derived.global_batch_size, derived.num_microbatches, derived.train_iters) == (8, 2, 20)
    assert (derived.lr_decay_steps, derived.lr_warmup_steps, derived.wd_incr_steps) == (160, 16, 160)
    assert derived.wsd_decay_steps is None
    assert (derived.start_weight_decay, derived.end_weight_decay, derived.min_lr) == (0.01, 0.01, 0.0)
    assert (derived.train_samples, derived.valid_samples, derived.test_samples) == (160, 5 * 100 * 8, 800)
    with pytest.raises(dataclasses.FrozenInstanceError):
        derived.train_iters = 3


def test_an_unset_global_batch_is_one_micro_batch_a_rank():
    derived = make_config("train.global_batch_size=null").derive(3)
    assert (derived.global_batch_size, derived.num_microbatches) == (6, 1)


def test_derived_values_are_asked_for_again_at_another_size():
    """None is derived at each size; what the first update worked out is never taken for the user's choice."""
    cfg = make_config("train.global_batch_size=null")
    runtime_config_update(cfg)
    assert cfg.train.global_batch_size is None and cfg.scheduler.lr_decay_steps == 40
    derived = cfg.derive(3)
    assert (derived.global_batch_size, derived.num_microbatches, derived.lr_decay_steps) == (6, 1, 120)


def test_a_run_in_samples_counts_in_samples():
    derived = make_config(
        "train.train_iters=null",
        "train.train_samples=100",
        "scheduler.lr_warmup_iters=0",
        "scheduler.lr_warmup_fraction=0.25",
        "scheduler.lr_wsd_decay_samples=40",
    ).derive(1)
    assert (derived.train_iters, derived.train_samples) == (12, 100)
    assert (derived.lr_decay_steps, derived.lr_warmup_steps, derived.wsd_decay_steps) == (100, 25, 40)


def test_evaluation_settings_and_their_old_names():
    cfg = make_config("validation.eval_iters=5", "validation.eval_interval=7")
    assert (cfg.derive(1).eval_iters, cfg.derive(1).eval_interval) == (5, 7)
    cfg.train.eval_iters, cfg.train.eval_interval, cfg.train.skip_train = 3, 4, True
    derived = cfg.derive(1)
    assert (derived.eval_iters, derived.eval_interval, derived.skip_train) == (3, 4, True)
    assert make_config("validation.full_validation=true").derive(1).eval_iters is None
    assert make_config("validation.eval_iters=null").derive(1).valid_samples is None


def test_data_parallel_size():
    cfg = make_config("model.pipeline_model_parallel_size=2")
    assert cfg.get_data_parallel_size(6) == 3
    assert cfg.data_parallel_size is None
    cfg.set_data_parallel_size(4)
    assert cfg.data_parallel_size == 2
    with pytest.raises(ValueError, match="3 ranks can't be shared"):
        cfg.get_data_parallel_size(3)


# --- what is written ------------------------------------------------------------------------------------------------


def test_runtime_update_resolves_everything_once(monkeypatch):
    monkeypatch.delenv("MEGATRON_TEST_VARIABLE", raising=False)
    monkeypatch.setenv("MEGATRON_TEST_SET", "before")
    cfg = make_config(
        "mixed_precision=bf16_mixed",
        "ddp.overlap_grad_reduce=true",
        "ddp.overlap_param_gather=true",
        "train.eval_iters=3",
        "env_vars.MEGATRON_TEST_VARIABLE=1",
        "env_vars.MEGATRON_TEST_SET=after",
    )
    runtime_config_update(cfg)
    assert (cfg.model.bf16, cfg.optimizer.bf16, cfg.model.fp16) == (True, True, False)
    assert cfg.model.params_dtype is cfg.model.pipeline_dtype is cfg.optimizer.params_dtype is torch.bfloat16
    assert cfg.ddp.grad_reduce_in_fp32 is True
    assert cfg.optimizer.use_distributed_optimizer and cfg.optimizer.overlap_param_gather
    assert (cfg.validation.eval_iters, cfg.train.eval_iters) == (3, None)
    assert (cfg.scheduler.lr_decay_steps, cfg.scheduler.lr_warmup_steps) == (160, 16)
    assert cfg.data_parallel_size == 1
    import os

    assert (os.environ["MEGATRON_TEST_VARIABLE"], os.environ["MEGATRON_TEST_SET"]) == ("1", "before")
    monkeypatch.delenv("MEGATRON_TEST_VARIABLE")

    once = cfg.to_dict()
    runtime_config_update(cfg)
    assert cfg.to_dict() == once


def test_a_variable_of_the_environment_has_no_parts():
    with pytest.raises(
        ValueError, match=r"env_vars\.A is {'B': '1'}: expected a text; names of variables have no dots"
    ):
        runtime_config_update(make_config("env_vars.A.B=1"))


def test_pipeline_stages_exchange_the_weights_format_unless_told_otherwise(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    cfg = make_config("model.pipeline_model_parallel_size=2")
    runtime_config_update(cfg)
    assert cfg.model.pipeline_dtype is torch.float32


def test_mixed_precision_by_name():
    assert get_mixed_precision_config("fp16_mixed").fp16
    made = MixedPrecisionConfig(bf16=True)
    assert get_mixed_precision_config(made) is made
    first, second = get_mixed_precision_config("bf16_mixed"), get_mixed_precision_config("bf16_mixed")
    assert first == second and first is not second
    with pytest.raises(ValueError, match=r"mixed_precision=bf16_mixd: unknown name; did you mean bf16_mixed\?"):
        get_mixed_precision_config("bf16_mixd")


def test_mixed_precision_can_be_registered():
    @register
    def my_half_mixed():
        return MixedPrecisionConfig(bf16=True, grad_reduce_in_fp32=False)

    cfg = make_config("mixed_precision=my_half_mixed")
    runtime_config_update(cfg)
    assert cfg.model.bf16 and cfg.ddp.grad_reduce_in_fp32 is False


def test_mixed_precision_without_fp8_leaves_the_models_fp8_alone():
    cfg = make_config("model.fp8=hybrid", "model.fp8_recipe=delayed", "model.fp8_param=true")
    get_mixed_precision_config("bf16_mixed").setup(cfg.model, cfg.optimizer, cfg.ddp)
    assert (cfg.model.fp8, cfg.model.fp8_recipe, cfg.model.fp8_param) == ("hybrid", "delayed", True)


def test_mixed_precision_with_fp8_reaches_all_three_sections():
    cfg = make_config("model.fp16=true")
    get_mixed_precision_config("bf16_with_fp8_current_scaling_mixed").setup(cfg.model, cfg.optimizer, cfg.ddp)
    assert (cfg.model.fp8, cfg.model.fp8_recipe, cfg.model.fp8_param) == ("hybrid", "tensorwise", True)
    assert (cfg.optimizer.fp8_recipe, cfg.ddp.fp8_param_gather) == ("tensorwise", True)
    assert (cfg.model.bf16, cfg.model.fp16) == (True, False)


def test_validate_finalizes_the_model():
    cfg = make_config("model.kv_channels=null")
    cfg.validate(1)
    assert cfg.model.kv_channels == 8


def test_non_default_values_are_logged(caplog):
    caplog.set_level("INFO")
    make_config().log_non_default_values()
    assert "train: micro_batch_size=2, global_batch_size=8, train_iters=20" in caplog.text
    assert "scheduler: lr_decay_style='cosine', lr_warmup_iters=2" in caplog.text
    assert "validation" not in caplog.text
