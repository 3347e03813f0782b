# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The mutants of the sync and of the guard after it."""

from tests.mutants.changes import condition, expression, several, value, without_call, without_operand
from tests.mutants.rows.mutant import Mutant

_SYNC = "tests/unit_tests/training/cpu_offload/test_param_copies.py::test_rebuild_"
_GUARD = "tests/unit_tests/training/cpu_offload/test_param_copies.py::test_guard_"
_REAL = "tests/unit_tests/training/test_checkpointing.py::test_sync_hybrid_optimizer_param_copies_on_real_optimizers"


THE_SYNC = (
    Mutant(
        name="no level 1",
        breaks="FP32 shards keep their old values",
        where="megatron.bridge.training.cpu_offload.param_copies:_entries",
        change=value(1, "copies if main is None else copies[1:]", of="_Entry"),
        tests=(f"{_REAL}[0.5-False-False]",),
    ),
    Mutant(
        name="no level 2",
        breaks="CPU copies keep their old values",
        where="megatron.bridge.training.cpu_offload.param_copies:_entries",
        change=value(1, "copies if main is None else copies[:1]", of="_Entry"),
        tests=(f"{_REAL}[1.0-False-False]",),
    ),
    Mutant(
        name="no level 3, mocked",
        breaks="precision-aware FP32 copies keep their old values",
        where="megatron.bridge.training.cpu_offload.param_copies:_entries",
        change=value(1, "() if main is None else copies", of="_Entry"),
        tests=(f"{_SYNC}writes_a_precision_aware_master_once",),
    ),
    Mutant(
        name="no level 3, real",
        breaks="precision-aware FP32 copies keep their old values",
        where="megatron.bridge.training.cpu_offload.param_copies:_entries",
        change=value(1, "() if main is None else copies", of="_Entry"),
        tests=(f"{_REAL}[1.0-False-True]",),
    ),
    Mutant(
        name="first slice on every rank",
        breaks="copies hold another rank's part of the weight",
        where="megatron.bridge.training.cpu_offload.param_copies:_values",
        change=several(expression("owned.start", "0"), expression("owned.end", "owned.end - owned.start")),
        tests=(f"{_SYNC}refreshes_shards_and_clones",),
    ),
    Mutant(
        name="first optimizer of a chain",
        breaks="the others' copies keep their old values",
        where="megatron.bridge.training.cpu_offload.param_copies:rebuild_param_copies",
        change=expression("_hybrids(optimizer)", "_hybrids(optimizer)[:1]"),
        tests=(f"{_SYNC}finds_hybrids_at_any_depth",),
    ),
    Mutant(
        name="first level of a chain",
        breaks="a chain in a chain is left out",
        where="megatron.bridge.training.cpu_offload.param_copies:_leaves",
        change=expression(
            "_leaves(child, root or optimizer)",
            "() if isinstance(child, ChainedOptimizer) else _leaves(child, optimizer)",
        ),
        tests=(f"{_SYNC}finds_hybrids_at_any_depth",),
    ),
    Mutant(
        name="state_dict= ignored",
        breaks="FP32 weights reach the masters rounded",
        where="megatron.bridge.training.cpu_offload.param_copies:rebuild_param_copies",
        change=value("sources", "None"),
        tests=(f"{_SYNC}takes_the_state_dict_rather_than_rounded_weights",),
    ),
    Mutant(
        name="chunks counted by each optimizer",
        breaks="an optimizer of later chunks reads the first chunks' tensors",
        where="megatron.bridge.training.cpu_offload.param_copies:_sources",
        change=expression('state_dict[f"{prefix}{number}"]', 'state_dict[f"{prefix}{at}"]'),
        tests=(f"{_SYNC}gives_each_optimizer_its_chunks_of_a_state_dict",),
    ),
    Mutant(
        name="shapes not compared",
        breaks="another model's state dict becomes the masters",
        where="megatron.bridge.training.cpu_offload.param_copies:_values",
        change=condition("shape"),
        tests=(f"{_SYNC}refuses_a_state_dict_of_another_shape",),
    ),
    Mutant(
        name="FP8 not dequantised",
        breaks="masters hold codes",
        where="megatron.bridge.training.cpu_offload.param_copies:_values",
        change=condition("_is_quantised"),
        tests=(f"{_SYNC}takes_quantised_weights_as_core_reads_them[alone]",),
    ),
    Mutant(
        name="modules of a Mimo model overlooked",
        breaks="a model of several modules trains random weights",
        where="megatron.bridge.training.cpu_offload.param_copies:_leaves",
        change=condition("is_active"),
        tests=(f"{_SYNC}finds_the_optimizers_of_a_mimo_models_modules",),
    ),
    Mutant(
        name="optimizers that can't be found let pass",
        breaks="what a newer Core wraps in another way stays stale unnoticed",
        where="megatron.bridge.training.cpu_offload.param_copies:_wrapped",
        change=condition("may_be_a_stub"),
        tests=(f"{_SYNC}refuses_an_optimizer_whose_own_it_cannot_find",),
    ),
    Mutant(
        name="unknown tensors let pass",
        breaks="what a newer Core steps on stays stale unnoticed",
        where="megatron.bridge.training.cpu_offload.param_copies:_entries",
        change=condition("stepped", "known"),
        tests=(f"{_SYNC}refuses_what_it_does_not_know",),
    ),
    Mutant(
        name="another wrapper let pass",
        breaks="a hybrid outside the distributed optimizer is taken for one inside",
        where="megatron.bridge.training.cpu_offload.param_copies:_hybrids",
        change=condition("leaf", "DistributedOptimizer"),
        tests=(f"{_SYNC}refuses_what_it_does_not_know",),
    ),
    Mutant(
        name="moments reset",
        breaks="a sync in the middle of a run forgets Adam's state",
        where="megatron.bridge.training.cpu_offload.param_copies:rebuild_param_copies",
        change=expression(
            "_entries(distributed_optimizer)",
            """([state["exp_avg"].zero_() for part in distributed_optimizer.optimizer.sub_optimizers
            for state in part.state.values()], _entries(distributed_optimizer))[1]""",
        ),
        tests=(f"{_REAL}[1.0-False-False]",),
    ),
)

THE_GUARD = (
    Mutant(
        name="guard compares nothing",
        breaks="stale copies go unnoticed",
        where="megatron.bridge.training.cpu_offload.param_copies:check_hybrid_optimizer_param_copies",
        change=without_call("_compare"),
        tests=(f"{_GUARD}names_the_stale_parameter[False]",),
    ),
    Mutant(
        name="guard never exact",
        breaks="copies that round to the weights pass for the weights",
        where="megatron.bridge.training.cpu_offload.param_copies:_compare",
        change=condition("exact"),
        tests=(f"{_GUARD}lets_restored_masters_hold_bits_that_the_weights_lost",),
    ),
    Mutant(
        name="guard always exact",
        breaks="a resume is refused",
        where="megatron.bridge.training.cpu_offload.param_copies:_compare",
        change=condition("exact", becomes="True"),
        tests=(f"{_GUARD}lets_restored_masters_hold_bits_that_the_weights_lost",),
    ),
    Mutant(
        name="guard of the first slice",
        breaks="every finetune on several ranks is refused",
        where="megatron.bridge.training.cpu_offload.param_copies:check_hybrid_optimizer_param_copies",
        change=several(expression("owned.start", "0"), expression("owned.end", "owned.size")),
        tests=(f"{_GUARD}names_the_stale_parameter[False]",),
    ),
    Mutant(
        name="guard of one copy",
        breaks="a stale FP32 shard goes unnoticed",
        where="megatron.bridge.training.cpu_offload.param_copies:check_hybrid_optimizer_param_copies",
        change=without_operand("entry", "copies"),
        tests=(f"{_GUARD}looks_at_every_copy",),
    ),
)
