# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The mutants of the sync and of the guard after it."""

from tests.mutants.rows.mutant import Mutant

COPIES = "src/megatron/bridge/training/cpu_offload/param_copies.py"

_SYNC = "tests/unit_tests/training/cpu_offload/test_param_copies.py::test_rebuild_"
_GUARD = "tests/unit_tests/training/cpu_offload/test_param_copies.py::test_guard_"
_REAL = "tests/unit_tests/training/test_checkpointing.py::test_sync_hybrid_optimizer_param_copies_on_real_optimizers"

_ENTRY = "        yield _Entry(param, copies, stepped_on)\n"
_WRITE = "            _write(entry.copies, _values(distributed_optimizer, entry.param, sources))\n"

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
        text="in _hybrids(optimizer):\n        sources",
        replacement="in _hybrids(optimizer)[:1]:\n        sources",
        tests=(f"{_SYNC}finds_hybrids_at_any_depth",),
    ),
    Mutant(
        name="first level of a chain",
        breaks="a chain in a chain is left out",
        file=COPIES,
        text="            yield from _leaves(child, root or optimizer)\n",
        replacement="            yield from () if isinstance(child, ChainedOptimizer) else _leaves(child, optimizer)\n",
        tests=(f"{_SYNC}finds_hybrids_at_any_depth",),
    ),
    Mutant(
        name="state_dict= ignored",
        breaks="FP32 weights reach the masters rounded",
        file=COPIES,
        text="_sources(distributed_optimizer, state_dict, root)",
        replacement="None",
        tests=(f"{_SYNC}takes_the_state_dict_rather_than_rounded_weights",),
    ),
    Mutant(
        name="chunks counted by each optimizer",
        breaks="an optimizer of later chunks reads the first chunks' tensors",
        file=COPIES,
        text='state_dict[f"{prefix}{number}"] for',
        replacement='state_dict[f"{prefix}{at}"] for',
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
        text="    if _is_quantised(source):",
        replacement="    if False:",
        tests=(f"{_SYNC}takes_quantised_weights_as_core_reads_them[alone]",),
    ),
    Mutant(
        name="modules of a Mimo model overlooked",
        breaks="a model of several modules trains random weights",
        file=COPIES,
        text='                yield from _leaves(_attribute(info, "optimizer"))\n',
        replacement="                pass\n",
        tests=(f"{_SYNC}finds_the_optimizers_of_a_mimo_models_modules",),
    ),
    Mutant(
        name="optimizers that can't be found let pass",
        breaks="what a newer Core wraps in another way stays stale unnoticed",
        file=COPIES,
        text="    if inner is None and not may_be_a_stub",
        replacement="    if False and not may_be_a_stub",
        tests=(f"{_SYNC}refuses_an_optimizer_whose_own_it_cannot_find",),
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
