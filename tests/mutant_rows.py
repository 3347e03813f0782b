# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The mutants: what is broken, by which replacement, and the smallest tests that must notice it.

`tests/mutants.py` applies them.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One way to break the code."""

    name: str
    breaks: str
    """What goes wrong, in a few words."""

    file: str
    text: str
    """What is replaced; must be in the file exactly once."""

    replacement: str
    tests: tuple[str, ...]
    """Pytest's node ids, of which one must fail."""


COPIES = "src/megatron/bridge/training/cpu_offload/param_copies.py"
LOAD = "src/megatron/bridge/training/checkpointing.py"
PLAN = "src/megatron/bridge/training/checkpoint_plan.py"
INSTALL = "src/megatron/bridge/training/cpu_offload/install.py"

_SYNC = "tests/unit_tests/training/test_checkpointing.py::test_sync_hybrid_optimizer_param_copies_"
_GUARD = "tests/unit_tests/training/test_checkpointing.py::test_guard_"
_REAL = f"{_SYNC}on_real_optimizers"
_STILL = "tests/functional_tests/test_offloaded_finetune.py::test_a_step_at_learning_rate_zero_leaves_the_weights"
_GUARDED = (
    "tests/functional_tests/test_guarded_load.py::test_a_load_that_leaves_wrong_copies_ends_before_the_first_step"
)
_MAIN = "tests/functional_tests/test_main_params.py::test_masters_hold_what_the_checkpoint_holds"
_RESUME = "tests/functional_tests/test_resume_matrix.py::test_resumes"
_NOT_OFFLOADED = f"{_RESUME}[dense-DP2-bf16-shards-0.0-serial-dp-as_it_was]"
_OFFLOADED = f"{_RESUME}_in_fresh_processes"
_EXPERTS = f"{_RESUME}[experts-EP2-fp16-aware-0.5-overlap-dp-as_it_was]"
_RESHARDED = f"{_RESUME}[dense-DP2-bf16-shards-0.0-serial-fully-PP_2]"
_REPAIRED = "tests/functional_tests/test_repairs.py::test_"
_DEVICE = "tests/functional_tests/test_device_step.py::test_"
_COUNTS = f"{_DEVICE}a_device_optimizer_that_counts_in_its_groups_counts_on"
_PLAN = "tests/unit_tests/training/test_checkpoint_plan.py::test_plan"

_ENTRY = "        yield _Entry(param, copies, stepped_on)\n"
_WRITE = "            _write(entry.copies, _values(distributed_optimizer, entry.param, sources))\n"
_BRING = """        if not restored:
            sync_hybrid_optimizer_param_copies(optimizer, main_params)
        check_hybrid_optimizer_param_copies(optimizer, exact=not restored and main_params is None)
"""

THE_SYNC = (
    Mutant(
        name="no level 1",
        breaks="FP32 shards keep their old values",
        file=COPIES,
        text=_ENTRY,
        replacement=_ENTRY.replace("copies", "copies if main is None else copies[1:]"),
        tests=(f"{_REAL}[0.5-False-False]",),
    ),
    Mutant(
        name="no level 2",
        breaks="CPU clones keep their old values",
        file=COPIES,
        text=_ENTRY,
        replacement=_ENTRY.replace("copies", "copies if main is None else copies[:1]"),
        tests=(f"{_REAL}[1.0-False-False]",),
    ),
    Mutant(
        name="no level 3, mocked",
        breaks="precision-aware FP32 copies keep their old values",
        file=COPIES,
        text=_ENTRY,
        replacement=_ENTRY.replace("copies", "() if main is None else copies"),
        tests=(f"{_SYNC}writes_a_precision_aware_master_once",),
    ),
    Mutant(
        name="no level 3, real",
        breaks="precision-aware FP32 copies keep their old values",
        file=COPIES,
        text=_ENTRY,
        replacement=_ENTRY.replace("copies", "() if main is None else copies"),
        tests=(f"{_REAL}[1.0-False-True]",),
    ),
    Mutant(
        name="first slice on every rank",
        breaks="copies hold another rank's part of the weight",
        file=COPIES,
        text="[owned.start : owned.end]",
        replacement="[: owned.end - owned.start]",
        tests=(f"{_SYNC}refreshes_shards_and_clones",),
    ),
    Mutant(
        name="first optimizer of a chain",
        breaks="the others' copies keep their old values",
        file=COPIES,
        text="in find_hybrid_optimizers(optimizer):\n        sources",
        replacement="in find_hybrid_optimizers(optimizer)[:1]:\n        sources",
        tests=(f"{_SYNC}finds_hybrids_at_any_depth",),
    ),
    Mutant(
        name="first level of a chain",
        breaks="a chain in a chain is left out",
        file=COPIES,
        text='[leaf for child in _attribute(optimizer, "chained_optimizers") for leaf in _unchained(child)]',
        replacement='[c for c in _attribute(optimizer, "chained_optimizers") if not isinstance(c, ChainedOptimizer)]',
        tests=(f"{_SYNC}finds_hybrids_at_any_depth",),
    ),
    Mutant(
        name="state_dict= ignored",
        breaks="FP32 weights reach the masters rounded",
        file=COPIES,
        text="_sources(distributed_optimizer, state_dict, optimizer)",
        replacement="None",
        tests=(f"{_SYNC}takes_the_state_dict_rather_than_rounded_weights",),
    ),
    Mutant(
        name="chunks counted by each optimizer",
        breaks="an optimizer of later chunks reads the first chunks' tensors",
        file=COPIES,
        text="{chunks.index(chunk)}",
        replacement="{at}",
        tests=(f"{_SYNC}gives_each_optimizer_its_chunks_of_a_state_dict",),
    ),
    Mutant(
        name="shapes not compared",
        breaks="another model's state dict becomes the masters",
        file=COPIES,
        text="if source.shape != param.shape:",
        replacement="if False:",
        tests=(f"{_SYNC}refuses_a_state_dict_of_another_shape",),
    ),
    Mutant(
        name="FP8 not dequantised",
        breaks="masters hold codes",
        file=COPIES,
        text="    if fp8_utils.is_float8tensor(source):",
        replacement="    if False:",
        tests=(f"{_SYNC}takes_quantised_weights_through_cores_dequantiser",),
    ),
    Mutant(
        name="unknown tensors let pass",
        breaks="what a newer Core steps on stays stale unnoticed",
        file=COPIES,
        text="    if stepped != known:",
        replacement="    if False:",
        tests=(f"{_SYNC}refuses_what_it_does_not_know",),
    ),
    Mutant(
        name="another wrapper let pass",
        breaks="a hybrid outside the distributed optimizer is taken for one inside",
        file=COPIES,
        text="if not isinstance(leaf, DistributedOptimizer):",
        replacement="if False:",
        tests=(f"{_SYNC}refuses_what_it_does_not_know",),
    ),
    Mutant(
        name="moments reset",
        breaks="a sync in the middle of a run forgets Adam's state",
        file=COPIES,
        text=_WRITE,
        replacement=_WRITE
        + """            for part in distributed_optimizer.optimizer.sub_optimizers:
                for state in part.state.values():
                    state["exp_avg"].zero_()
""",
        tests=(f"{_REAL}[1.0-False-False]",),
    ),
)

THE_GUARD = (
    Mutant(
        name="guard compares nothing",
        breaks="stale copies go unnoticed",
        file=COPIES,
        text="            _compare(distributed_optimizer, alike, exact=exact)\n",
        replacement="            pass\n",
        tests=(f"{_GUARD}names_the_stale_parameter[False]",),
    ),
    Mutant(
        name="guard never exact",
        breaks="copies that round to the weights pass for the weights",
        file=COPIES,
        text="(copies if exact else copies.to(weights.dtype))",
        replacement="copies.to(weights.dtype)",
        tests=(f"{_GUARD}lets_restored_masters_hold_bits_that_the_weights_lost",),
    ),
    Mutant(
        name="guard always exact",
        breaks="a resume is refused",
        file=COPIES,
        text="(copies if exact else copies.to(weights.dtype))",
        replacement="copies",
        tests=(f"{_GUARD}lets_restored_masters_hold_bits_that_the_weights_lost",),
    ),
    Mutant(
        name="guard of the first slice",
        breaks="every finetune on several ranks is refused",
        file=COPIES,
        text="[owned.start : owned.end : stride]",
        replacement="[: owned.size : stride]",
        tests=(f"{_GUARD}names_the_stale_parameter[False]",),
    ),
    Mutant(
        name="guard of one copy",
        breaks="a stale FP32 shard goes unnoticed",
        file=COPIES,
        text="entry.copies or (entry.stepped_on,)",
        replacement="(entry.stepped_on,)",
        tests=(f"{_GUARD}looks_at_every_copy",),
    ),
)

THE_LOAD = (
    Mutant(
        name="stock Core",
        breaks="no sync and no guard: the first step writes random weights",
        file=LOAD,
        text=_BRING,
        replacement="        pass\n",
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
        replacement="".join([*_BRING.splitlines(keepends=True)[2:], *_BRING.splitlines(keepends=True)[:2]]),
        tests=(f"{_STILL}[1.0-False]",),
    ),
    Mutant(
        name="sync after a resume too",
        breaks="restored masters are rounded to the weights",
        file=LOAD,
        text=_BRING,
        replacement=_BRING.replace("if not restored:", "if True:"),
        tests=(_OFFLOADED,),
    ),
    Mutant(
        name="load without guard",
        breaks="a run with stale copies starts",
        file=LOAD,
        text=_BRING,
        replacement="".join(_BRING.splitlines(keepends=True)[:2]),
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
        tests=(_NOT_OFFLOADED, _RESHARDED),
    ),
    Mutant(
        name="experts' optimizer overlooked",
        breaks="a model with experts starts with a fresh optimizer",
        file=PLAN,
        text='r"(chained_\\d+\\.)?optimizer\\."',
        replacement='r"optimizer\\."',
        tests=(_EXPERTS,),
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


def _without(repair: str, row: str, *tests: str, kept: str = "") -> Mutant:
    """A repair left out; `kept` is what of its file stays in."""
    return Mutant(
        name=f"without {repair}",
        breaks=f"Core's defect is back: {repair}",
        file=INSTALL,
        text=f"    *{row}.REPAIRS,\n",
        replacement=kept and f"    *{row}.REPAIRS{kept},\n",
        tests=tests,
    )


THE_REPAIRS = (
    _without("load template", "load_template", _NOT_OFFLOADED, kept="[1:]"),
    _without("no dummy step", "load_template", f"{_REPAIRED}an_empty_optimizer_is_filled_without_a_step", kept="[:1]"),
    _without("master lookup", "master_lookup", _OFFLOADED),
    _without("state device", "state_device", f"{_REPAIRED}state_is_on_the_side_of_its_parameter"),
    _without("step counter", "step_counter", f"{_COUNTS}[nothing]", f"{_COUNTS}[half]"),
    _without("gradient wait", "gradient_wait", f"{_DEVICE}the_device_steps_when_its_gradients_are_cast"),
    _without("exact resume", "exact_resume", _OFFLOADED),
    _without("one master", "one_master", f"{_RESUME}[dense-DP2-bf16-shards-0.0-serial-fully-offload_on]"),
    _without("plain param groups", "plain_param_groups", f"{_REPAIRED}saved_param_groups_are_plain_data"),
    _without(
        "native FP32 parameters", "native_fp32", f"{_REPAIRED}state_is_found_under_its_own_parameter", kept="[1:]"
    ),
    _without(
        "native FP32 gradients",
        "native_fp32",
        f"{_REPAIRED}fp32_weights_on_the_device_move",
        kept="[:1]",
    ),
    _without("group order", "group_order", f"{_REPAIRED}state_is_found_under_its_own_parameter"),
    _without("reshardable state", "reshardable_state", _RESHARDED),
    Mutant(
        name="native FP32 parameters, views",
        breaks="a run with FP32 parameters can't be resumed: a view whose base was changed",
        file="src/megatron/bridge/training/cpu_offload/native_fp32.py",
        text="    leaf = shard.detach()\n",
        replacement="    with torch.no_grad():\n        leaf = shard.view(-1)\n",
        tests=(f"{_RESUME}[FP32norms-DP2-bf16-shards-0.5-serial-fully-as_it_was]",),
    ),
)


def _not_restored(what: str, breaks: str, file: str, text: str, replacement: str, test: str) -> Mutant:
    return Mutant(f"{what} not restored", breaks, f"src/megatron/bridge/training/{file}", text, replacement, (test,))


THE_RESUME = (
    _not_restored(
        "step",
        "Adam's bias correction starts anew",
        "cpu_offload/exact_resume.py",
        'state["step"] = torch.tensor(float(next(iter(steps))))',
        "pass",
        _OFFLOADED,
    ),
    _not_restored(
        "masters",
        "they keep what the optimizer was built on",
        "cpu_offload/reshardable_state.py",
        'for key, tensor in tensors.items() if key != "step"}',
        'for key, tensor in tensors.items() if key.startswith("exp_avg")}',
        _RESHARDED,
    ),
    _not_restored(
        "moments",
        "Adam's second moment starts at 0",
        "cpu_offload/reshardable_state.py",
        'for key, tensor in tensors.items() if key != "step"}',
        'for key, tensor in tensors.items() if key not in ("step", "exp_avg_sq")}',
        _RESHARDED,
    ),
    _not_restored(
        "random states",
        "dropout follows another course",
        "checkpointing.py",
        'restore_rng_state(loaded["rng_state"], data_parallel_random_init=cfg.rng.data_parallel_random_init)',
        "pass",
        _NOT_OFFLOADED,
    ),
    _not_restored(
        "random states of each expert-parallel rank",
        "all take the first rank's",
        "rng_state.py",
        "if data_parallel_random_init or is_of_each else 0",
        "if data_parallel_random_init else 0",
        _EXPERTS,
    ),
    _not_restored(
        "place in the data",
        "samples are seen again",
        "setup.py",
        "consumed_samples=state.train_state.consumed_train_samples,",
        "consumed_samples=0,",
        _NOT_OFFLOADED,
    ),
    _not_restored(
        "schedule",
        "the warm-up starts anew",
        "resumed_schedule.py",
        "    scheduler.load_state_dict(saved_schedule)\n",
        "",
        _NOT_OFFLOADED,
    ),
    _not_restored(
        "another number of optimizers",
        "experts can't be spread over other ranks",
        "resumed_schedule.py",
        'in_this_chain(optimizer, loaded["optimizer"])',
        'loaded["optimizer"]',
        f"{_RESUME}[experts-EP2-bf16-aware-0.5-overlap-fully-DP_2]",
    ),
)

_CELL = "tests/functional_tests/test_conversion_families.py::test_family_at_layout"
_COMMAND = "tests/functional_tests/test_conversion_command.py::test_"


def _converted_wrongly(name: str, breaks: str, file: str, text: str, replacement: str, test: str) -> Mutant:
    return Mutant(
        name=f"conversion: {name}",
        breaks=breaks,
        file=f"src/megatron/bridge/models/{file}",
        text=text,
        replacement=replacement,
        tests=(test,),
    )


THE_CONVERSION = (
    _converted_wrongly(
        "window",
        "each token sees one more",
        "decoder.py",
        "(window - 1, 0)",
        "(window, 0)",
        f"{_CELL}[mistral-one_process]",
    ),
    _converted_wrongly(
        "windows in some layers",
        "the others have one too",
        "decoder.py",
        "None if all(slides) else slides",
        "None",
        f"{_CELL}[qwen2_window-one_process]",
    ),
    _converted_wrongly(
        "query and key norms",
        "the wrong one gets the weight",
        "decoder.py",
        'q_layernorm.weight", f"{HF_LAYER}self_attn.q_norm',
        'q_layernorm.weight", f"{HF_LAYER}self_attn.k_norm',
        f"{_CELL}[qwen3-one_process]",
    ),
    _converted_wrongly(
        "weights of the chosen experts",
        "always add up to 1",
        "qwen3_moe.py",
        'not hf.get("norm_topk_prob", False)',
        "False",
        f"{_CELL}[qwen3_moe_mixed-one_process]",
    ),
    _converted_wrongly(
        "layers with an MLP",
        "the next one gets it",
        "qwen3_moe.py",
        "int(layer not in dense",
        "int(layer - 1 not in dense",
        f"{_CELL}[qwen3_moe_mixed-one_process]",
    ),
    _converted_wrongly(
        "gate and up of an expert",
        "change places",
        "mixtral.py",
        'gate="w1", up="w3"',
        'gate="w3", up="w1"',
        f"{_CELL}[mixtral-one_process]",
    ),
    _converted_wrongly(
        "expert parallelism",
        "each rank loads the first experts",
        "conversion/tasks.py",
        "per_rank * parallel_state.get_expert_model_parallel_rank()",
        "0",
        f"{_CELL}[mixtral-EP2]",
    ),
    _converted_wrongly(
        "expert tensor parallelism",
        "experts are cut as the other matrices",
        "conversion/tasks.py",
        "        return parallel_state.get_expert_tensor_parallel_group()\n",
        "        return parallel_state.get_tensor_model_parallel_group()\n",
        f"{_CELL}[mixtral-TP1_ETP2]",
    ),
    _converted_wrongly(
        "NaN",
        "is imported",
        "conversion/load.py",
        "not found.isfinite().all()",
        "False",
        f"{_COMMAND}what_cannot_be_imported_is_named_and_leaves_nothing[nan]",
    ),
    _converted_wrongly(
        "index that names a file elsewhere",
        "it is opened",
        "conversion/hf_weights.py",
        'Path(file).name != file or file == ".."',
        "False",
        "tests/unit_tests/models/test_hf_weights.py::test_wrong_index_is_named",
    ),
)

MUTANTS = (*THE_SYNC, *THE_GUARD, *THE_LOAD, *THE_REPAIRS, *THE_RESUME, *THE_CONVERSION)
