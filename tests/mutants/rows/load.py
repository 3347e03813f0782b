# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The mutants of the load."""

from tests.mutants.rows.mutant import NOT_OFFLOADED, OFFLOADED, RESHARDED, Mutant

LOAD = "src/megatron/bridge/training/checkpointing.py"
PLAN = "src/megatron/bridge/training/run_state/load_plan.py"

_STILL = "tests/functional_tests/test_offloaded_finetune.py::test_a_step_at_learning_rate_zero_leaves_the_weights"
_GUARDED = (
    "tests/functional_tests/test_guarded_load.py::test_a_load_that_leaves_wrong_copies_ends_before_the_first_step"
)
_MAIN = "tests/functional_tests/test_main_params.py::test_masters_hold_what_the_checkpoint_holds"
_LOAD_PLAN = "tests/unit_tests/training/run_state/test_load_plan.py::test_"
_PLAN = f"{_LOAD_PLAN}plan"
_FOUND_BY_NAME = f"{_LOAD_PLAN}optimizer_state_is_found_where_the_common_state_has_none"

_RELOAD = """        if not restored and (cfg.model.fp16 or cfg.model.bf16):
            optimizer.reload_model_params(state_dict=main_params)
"""
_SYNC = """            if not restored:  # after the reload, which leaves offloaded copies as they were
                sync_hybrid_optimizer_param_copies(optimizer, main_params)
"""
_CHECK = """            check_hybrid_optimizer_param_copies(optimizer, exact=not restored and main_params is None)
"""
_BRING = _SYNC + _CHECK
_AFTER = "tests/unit_tests/training/test_masters_after_load.py::test_"
_IN_PART = (
    "tests/functional_tests/test_sync_matrix.py::"
    "test_masters_follow_the_weights_in_a_chain_that_is_offloaded_in_part[experts_on_the_device]"
)

THE_LOAD = (
    Mutant(
        name="stock Core",
        breaks="no sync and no guard: the first step writes random weights",
        file=LOAD,
        text=_BRING,
        replacement="            pass\n",
        tests=(f"{_STILL}[1.0-False]",),
    ),
    Mutant(
        name="load without sync",
        breaks="the guard ends every finetune",
        file=LOAD,
        text=_BRING,
        replacement=_BRING.replace("sync_hybrid_optimizer_param_copies(optimizer, main_params)", "pass"),
        tests=(f"{_STILL}[1.0-False]",),
    ),
    Mutant(
        name="sync before the weights",
        breaks="copies follow the weights that are about to be replaced",
        file=LOAD,
        text="""    if plan.source is Source.HUGGING_FACE:
        _load_hf_weights(model, plan.path)
        loaded = {}
    else:
        loaded = _load_megatron(state.cfg, plan, model, optimizer, opt_param_scheduler, strict=strict, context=context)
    if optimizer is not None:
        _bring_masters_in_line(state.cfg, optimizer, restored=plan.optimizer, loaded=loaded)
""",
        replacement="""    if optimizer is not None:
        _bring_masters_in_line(state.cfg, optimizer, restored=plan.optimizer, loaded={})
    if plan.source is Source.HUGGING_FACE:
        _load_hf_weights(model, plan.path)
        loaded = {}
    else:
        loaded = _load_megatron(state.cfg, plan, model, optimizer, opt_param_scheduler, strict=strict, context=context)
""",
        tests=(f"{_STILL}[1.0-False]",),
    ),
    Mutant(
        name="guard before the sync",
        breaks="every finetune is refused",
        file=LOAD,
        text=_BRING,
        replacement=_CHECK + _SYNC,
        tests=(f"{_STILL}[1.0-False]",),
    ),
    Mutant(
        name="sync after a resume too",
        breaks="restored masters are rounded to the weights",
        file=LOAD,
        text=_BRING,
        replacement=_BRING.replace("if not restored:", "if True:"),
        tests=(OFFLOADED,),
    ),
    Mutant(
        name="load without guard",
        breaks="a run with stale copies starts",
        file=LOAD,
        text=_BRING,
        replacement=_SYNC,
        tests=(f"{_GUARDED}[copies of random weights]",),
    ),
    Mutant(
        name="load's guard never exact",
        breaks="a run whose masters are not the loaded weights starts",
        file=LOAD,
        text=_BRING,
        replacement=_BRING.replace("exact=not restored and main_params is None", "exact=False"),
        tests=(f"{_GUARDED}[bits that the weights don't have]",),
    ),
    Mutant(
        name="load's guard always exact",
        breaks="a resume is refused",
        file=LOAD,
        text=_BRING,
        replacement=_BRING.replace("exact=not restored and main_params is None", "exact=True"),
        tests=(f"{_GUARDED}[nothing wrong]",),
    ),
    Mutant(
        name="FP32 weights not handed on",
        breaks="load_main_params_from_ckpt gives rounded masters with offload",
        file=LOAD,
        text=_BRING,
        replacement=_BRING.replace("(optimizer, main_params)", "(optimizer)"),
        tests=(f"{_MAIN}[True]",),
    ),
    Mutant(
        name="the sync in the reload's place",
        breaks="members of a chain that aren't offloaded keep masters of random weights",
        file=LOAD,
        text=_RELOAD,
        replacement=_RELOAD.replace("if not", "if not cfg.optimizer.optimizer_cpu_offload and not"),
        tests=(_IN_PART,),
    ),
    Mutant(
        name="the sync before the reload",
        breaks="Core's reload has the last word on what the sync wrote",
        file=LOAD,
        text=_RELOAD + "        if cfg.optimizer.optimizer_cpu_offload:\n" + _BRING,
        replacement="        if cfg.optimizer.optimizer_cpu_offload:\n" + _BRING + _RELOAD,
        tests=(f"{_AFTER}weights_alone_are_followed_by_the_reload_and_then_the_sync",),
    ),
    Mutant(
        name="the sync under the reload's condition",
        breaks="an offloaded run in FP32 trains random weights",
        file=LOAD,
        text=_SYNC,
        replacement=_SYNC.replace("if not restored:", "if not restored and cfg.model.bf16:"),
        tests=(f"{_AFTER}fp32_weights_need_the_sync_alone",),
    ),
    Mutant(
        name="no reload without offload",
        breaks="masters stay random where nothing is offloaded",
        file=LOAD,
        text="optimizer.reload_model_params(state_dict=main_params)",
        replacement="pass",
        tests=(f"{_MAIN}[False]",),
    ),
    Mutant(
        name="format of the run that loads",
        breaks="a checkpoint is read in the format that the run would save",
        file=LOAD,
        text="    metadata.update((key, plan.content_metadata[key])",
        replacement="    metadata.update((key, metadata[key])",
        tests=(NOT_OFFLOADED, RESHARDED),
    ),
    Mutant(
        name="experts' optimizer overlooked",
        breaks="a model with experts starts with a fresh optimizer",
        file="src/megatron/bridge/checkpoint/layout.py",
        text='r"(chained_\\d+\\.)?optimizer\\."',
        replacement='r"optimizer\\."',
        tests=(_FOUND_BY_NAME,),
    ),
    Mutant(
        name="finetune needs no weights",
        breaks="a finetune that finds nothing to load trains random weights",
        file="src/megatron/bridge/training/finetune.py",
        text="load_required=True",
        replacement="load_required=False",
        tests=(
            "tests/unit_tests/training/run_state/test_load_plan.py::"
            "test_the_verb_alone_says_whether_a_run_must_find_weights",
        ),
    ),
    Mutant(
        name="finetune=True resumes",
        breaks="a new run takes the checkpoint's optimizer",
        file=PLAN,
        text="    if checkpoint.finetune:\n",
        replacement="    if False:\n",
        tests=(f"{_PLAN}[finetune=true]",),
    ),
    Mutant(
        name="load_optim=False restores it",
        breaks="the checkpoint's optimizer comes unasked",
        file=PLAN,
        text="with_optimizer = cfg.checkpoint.load_optim and holds_optimizer",
        replacement="with_optimizer = holds_optimizer",
        tests=(f"{_PLAN}[load_optim=false]",),
    ),
)
