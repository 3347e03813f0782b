# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The mutants of the load."""

from tests.mutants.changes import condition, expression, moved, several, value, without_call, without_operand
from tests.mutants.rows.mutant import NOT_OFFLOADED, OFFLOADED, RESHARDED, Mutant

_STILL = "tests/functional_tests/test_offloaded_finetune.py::test_a_step_at_learning_rate_zero_leaves_the_weights"
_GUARDED = (
    "tests/functional_tests/test_guarded_load.py::test_a_load_that_leaves_wrong_copies_ends_before_the_first_step"
)
_MAIN = "tests/functional_tests/test_main_params.py::test_masters_hold_what_the_checkpoint_holds"
_LOAD_PLAN = "tests/unit_tests/training/run_state/test_load_plan.py::test_"
_PLAN = f"{_LOAD_PLAN}plan"
_FOUND_BY_NAME = f"{_LOAD_PLAN}optimizer_state_is_found_where_the_common_state_has_none"

_RELOAD = "reload_model_params"
_SYNC = "sync_hybrid_optimizer_param_copies"
_CHECK = "check_hybrid_optimizer_param_copies"
_AFTER = "tests/unit_tests/training/test_masters_after_load.py::test_"
_IN_PART = (
    "tests/functional_tests/test_sync_matrix.py::"
    "test_masters_follow_the_weights_in_a_chain_that_is_offloaded_in_part[experts_on_the_device]"
)

THE_LOAD = (
    Mutant(
        name="stock Core",
        breaks="no sync and no guard: the first step writes random weights",
        where="megatron.bridge.training.checkpointing:bring_masters_in_line",
        change=several(without_call(_SYNC), without_call(_CHECK)),
        tests=(f"{_STILL}[1.0-False]",),
    ),
    Mutant(
        name="load without sync",
        breaks="the guard ends every finetune",
        where="megatron.bridge.training.checkpointing:bring_masters_in_line",
        change=without_call(_SYNC),
        tests=(f"{_STILL}[1.0-False]",),
    ),
    Mutant(
        name="sync before the weights",
        breaks="copies follow the weights that are about to be replaced",
        where="megatron.bridge.training.checkpointing:load_checkpoint",
        change=several(
            value("loaded", "{}", of="bring_masters_in_line"),
            moved("bring_masters_in_line", before="load_megatron"),
        ),
        tests=(f"{_STILL}[1.0-False]",),
    ),
    Mutant(
        name="guard before the sync",
        breaks="every finetune is refused",
        where="megatron.bridge.training.checkpointing:bring_masters_in_line",
        change=moved(_CHECK, before=_SYNC),
        tests=(f"{_STILL}[1.0-False]",),
    ),
    Mutant(
        name="sync after a resume too",
        breaks="restored masters are rounded to the weights",
        where="megatron.bridge.training.checkpointing:bring_masters_in_line",
        change=condition("restored", around=_SYNC, becomes="True"),
        tests=(OFFLOADED,),
    ),
    Mutant(
        name="load without guard",
        breaks="a run with stale copies starts",
        where="megatron.bridge.training.checkpointing:bring_masters_in_line",
        change=without_call(_CHECK),
        tests=(f"{_GUARDED}[copies of random weights]",),
    ),
    Mutant(
        name="load's guard never exact",
        breaks="a run whose masters are not the loaded weights starts",
        where="megatron.bridge.training.checkpointing:bring_masters_in_line",
        change=value("exact", "False", of=_CHECK),
        tests=(f"{_GUARDED}[bits that the weights don't have]",),
    ),
    Mutant(
        name="load's guard always exact",
        breaks="a resume is refused",
        where="megatron.bridge.training.checkpointing:bring_masters_in_line",
        change=value("exact", "True", of=_CHECK),
        tests=(f"{_GUARDED}[nothing wrong]",),
    ),
    Mutant(
        name="FP32 weights not handed on",
        breaks="load_main_params_from_ckpt gives rounded masters with offload",
        where="megatron.bridge.training.checkpointing:bring_masters_in_line",
        change=value(1, "None", of=_SYNC),
        tests=(f"{_MAIN}[True]",),
    ),
    Mutant(
        name="the sync in the reload's place",
        breaks="members of a chain that aren't offloaded keep masters of random weights",
        where="megatron.bridge.training.checkpointing:bring_masters_in_line",
        change=condition("restored", around=_RELOAD, becomes="_ and not cfg.optimizer.optimizer_cpu_offload"),
        tests=(_IN_PART,),
    ),
    Mutant(
        name="another manager's load isn't looked at",
        breaks="the first step writes stale masters over what the manager loaded",
        where="megatron.bridge.training.setup:load_and_check",
        change=without_call("check_hybrid_optimizer_param_copies"),
        tests=(f"{_AFTER}masters_that_do_not_follow_another_managers_load_are_found",),
    ),
    Mutant(
        name="another manager's load isn't looked at without offload",
        breaks="the first step writes stale masters over what the manager loaded",
        where="megatron.bridge.training.setup:load_and_check",
        change=without_call("check_masters_on_device"),
        tests=(f"{_AFTER}without_offload_too",),
    ),
    Mutant(
        name="state that a script built, in a format of its own",
        breaks="a load takes it for the format that the checkpoint names",
        where="megatron.bridge.training.run_state.content:generate_state_dict",
        change=value("fully", "False"),
        tests=(
            "tests/unit_tests/training/run_state/test_content.py::"
            "test_the_optimizer_is_in_the_format_that_the_checkpoint_names",
        ),
    ),
    Mutant(
        name="the sync before the reload",
        breaks="Core's reload has the last word on what the sync wrote",
        where="megatron.bridge.training.checkpointing:bring_masters_in_line",
        change=moved(_SYNC, before=_RELOAD),
        tests=(f"{_AFTER}weights_alone_are_followed_by_the_reload_and_then_the_sync",),
    ),
    Mutant(
        name="the sync under the reload's condition",
        breaks="an offloaded run in FP32 trains random weights",
        where="megatron.bridge.training.checkpointing:bring_masters_in_line",
        change=condition("restored", around=_SYNC, becomes="_ and cfg.model.bf16"),
        tests=(f"{_AFTER}fp32_weights_need_the_sync_alone",),
    ),
    Mutant(
        name="no reload without offload",
        breaks="masters stay random where nothing is offloaded",
        where="megatron.bridge.training.checkpointing:bring_masters_in_line",
        change=without_call(_RELOAD),
        tests=(f"{_MAIN}[False]",),
    ),
    Mutant(
        name="format of the run that loads",
        breaks="a checkpoint is read in the format that the run would save",
        where="megatron.bridge.training.run_state.planned_load:load_megatron",
        change=expression("plan.content_metadata[key]", "metadata[key]"),
        tests=(NOT_OFFLOADED, RESHARDED),
    ),
    Mutant(
        name="experts' optimizer overlooked",
        breaks="a model with experts starts with a fresh optimizer",
        where="megatron.bridge.checkpoint.iterations:OPTIMIZER_KEY",
        change=value(0, r'r"optimizer\."', of="compile"),
        tests=(_FOUND_BY_NAME,),
    ),
    Mutant(
        name="plan made again",
        breaks="what is loaded is decided twice, and a directory that changes in between is loaded as nobody checked",
        where="megatron.bridge.training.setup:setup",
        change=value("plan", "None", of="CheckpointLoadContext"),
        tests=("tests/functional_tests/test_load_cases.py::test_resume_restores_everything_and_goes_on[rank 0]",),
    ),
    Mutant(
        name="finetune needs no weights",
        breaks="a finetune that finds nothing to load trains random weights",
        where="megatron.bridge.training.finetune:finetune",
        change=value("load_required", "False"),
        tests=(
            "tests/unit_tests/training/run_state/test_load_plan.py::"
            "test_the_verb_alone_says_whether_a_run_must_find_weights",
        ),
    ),
    Mutant(
        name="finetune=True resumes",
        breaks="a new run takes the checkpoint's optimizer",
        where="megatron.bridge.training.run_state.load_plan:_plan_resume",
        change=condition("finetune"),
        tests=(f"{_PLAN}[finetune=true]",),
    ),
    Mutant(
        name="load_optim=False restores it",
        breaks="the checkpoint's optimizer comes unasked",
        where="megatron.bridge.training.run_state.load_plan:_whole_resume",
        change=without_operand("load_optim"),
        tests=(f"{_PLAN}[load_optim=false]",),
    ),
)
