# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The mutants of how a run stops, restarts and hangs."""

from tests.mutants.rows.mutant import Mutant

_PREEMPTION = "tests/functional_tests/test_preemption.py::test_"
_HANG = "tests/functional_tests/test_hang.py::test_"
_DELIVERY = "tests/unit_tests/training/monitoring/test_metrics_queue.py::test_"
_FINITE = "tests/functional_tests/test_finite_steps.py::test_"
SOURCE = "src/megatron/bridge/"

RUNS = (
    Mutant(
        name="a signal of one rank",
        breaks="the rank that got it stops alone",
        file=f"{SOURCE}training/monitoring/preemption.py",
        text="        dist.all_reduce(last_rank, op=dist.ReduceOp.MAX)\n",
        replacement="",
        tests=(f"{_PREEMPTION}a_run_stopped_again_and_again_ends_as_the_uninterrupted_one",),
    ),
    Mutant(
        name="a stop without its code",
        breaks="a run that must go on looks like one that is done",
        file=f"{SOURCE}training/train.py",
        text="    if is_preempted:\n        raise Preempted(state.train_state.step)\n",
        replacement="",
        tests=(f"{_PREEMPTION}a_run_stopped_again_and_again_ends_as_the_uninterrupted_one",),
    ),
    Mutant(
        name="a restart among the dead",
        breaks="the ranks of a restart look for those of the start before",
        file=f"{SOURCE}utils/rendezvous.py",
        text='            if store.check([f"{name}/all"]) and word in store.get(f"{name}/all").decode().split():\n',
        replacement='            if store.check([f"{name}/all"]):\n',
        tests=("tests/unit_tests/utils/test_rendezvous.py::test_ranks_of_a_start_meet_behind_one_that_is_over",),
    ),
    Mutant(
        name="steps to skip counted from 0",
        breaks="the step that the log shows as bad is trained, and a good one is not",
        file=f"{SOURCE}training/train.py",
        text="train_state.step + 1 in train_config.iterations_to_skip",
        replacement="train_state.step in train_config.iterations_to_skip",
        tests=(
            "tests/functional_tests/test_what_a_step_says.py::test_steps_are_skipped_by_the_numbers_that_the_log_shows",
        ),
    ),
    Mutant(
        name="a gradient of NaN is stepped on",
        breaks="all weights become NaN",
        file=f"{SOURCE}core_repairs/finite_gradients.py",
        text="            if not math.isfinite(norm):\n",
        replacement="            if False:\n",
        tests=(f"{_FINITE}a_gradient_that_is_not_a_number_ends_the_run_before_the_step[precision-aware]",),
    ),
    Mutant(
        name="a loss of NaN on one rank",
        breaks="that rank ends alone, or nobody does",
        file=f"{SOURCE}training/micro_batches.py",
        text="    if checked_as is not None:\n",
        replacement="    if False:\n",
        tests=(f"{_FINITE}so_does_one_of_an_evaluation",),
    ),
    Mutant(
        name="weights of NaN are saved",
        breaks="the last good checkpoint is removed for one that can't be trained on",
        file=f"{SOURCE}training/checkpointing.py",
        text="    check_weights_are_finite(model, state.train_state.step)\n",
        replacement="",
        tests=(f"{_FINITE}weights_that_are_not_numbers_are_not_saved",),
    ),
    Mutant(
        name="nobody watches",
        breaks="a rank that is stuck never ends and never says where",
        file=f"{SOURCE}training/monitoring/hang_watchdog.py",
        text="        if self._thread is None and world_size() > 1:\n",
        replacement="        if False:\n",
        tests=(f"{_HANG}a_rank_that_hangs_and_the_one_that_waits_for_it_show_their_stacks_and_end",),
    ),
    Mutant(
        name="workers die at the signal",
        breaks="the last step before the save has no batch",
        file=f"{SOURCE}data/loaders.py",
        text="        worker_init_fn=_take_signals_as_the_run_does,\n",
        replacement="",
        tests=("tests/unit_tests/data/test_loaders.py::test_a_worker_lives_on_at_a_signal_that_the_run_catches",),
    ),
    Mutant(
        name="a parameter counted twice",
        breaks="the summary's number of parameters grows with tensor parallelism",
        file=f"{SOURCE}training/monitoring/summary.py",
        text="param_is_not_shared(param) and param_is_not_tensor_parallel_duplicate(param)",
        replacement="param_is_not_shared(param)",
        tests=("tests/functional_tests/test_run_report.py::test_each_parameter_is_counted_once_in_every_layout",),
    ),
    Mutant(
        name="ranks don't agree on what is reported",
        breaks="a figure that is a mean on one rank and a sum on another is added up",
        file=f"{SOURCE}training/monitoring/reported_losses.py",
        text="""        if agreed.setdefault(name, is_per_token) != is_per_token:
            raise _two_forms(name)
""",
        replacement="        agreed.setdefault(name, is_per_token)\n",
        tests=(
            "tests/functional_tests/test_own_losses.py::test_ranks_that_report_unlike_figures_agree_and_none_waits",
        ),
    ),
    Mutant(
        name="routers' losses add up over steps",
        breaks="the load-balancing loss grows with each step",
        file=f"{SOURCE}training/train.py",
        text="    clear_router_losses()\n",
        replacement="",
        tests=("tests/functional_tests/test_router_losses.py::test_what_is_shown_is_what_the_routers_logits_give",),
    ),
    Mutant(
        name="a torn line stays",
        breaks="the metrics file of a killed run can't be read any more",
        file=f"{SOURCE}training/monitoring/metrics.py",
        text="        _cut_torn_line(self.path)\n",
        replacement="",
        tests=(
            "tests/unit_tests/training/monitoring/test_metrics.py::"
            "test_a_resumed_file_has_the_last_line_of_each_step_and_no_torn_one",
        ),
    ),
    Mutant(
        name="configuration: mixed precision overwrites what was set",
        breaks="ddp.grad_reduce_in_fp32=false is dropped, and the run sums in FP32",
        file="src/megatron/bridge/training/config/precedence.py",
        text="        resolved = resolved.with_values(**kept)\n",
        replacement="        pass\n",
        tests=("tests/unit_tests/training/config/test_precedence.py::test_a_value_set_in_a_section_counts",),
    ),
    Mutant(
        name="configuration: a section's own number format dropped",
        breaks="model.bf16=false runs in BF16",
        file="src/megatron/bridge/training/config/precedence.py",
        text="        if name in _FORMATS or source in set_fields(resolved):\n",
        replacement="        if False:\n",
        tests=("tests/unit_tests/training/config/test_precedence.py::test_a_format_of_one_section_alone_is_refused",),
    ),
    Mutant(
        name="a tracker that is away ends the run",
        breaks="what a service's outage costs is all steps since the last save",
        file=f"{SOURCE}training/monitoring/metrics_queue.py",
        text="        except BaseException as error:  # a thread's SystemExit would end it without a word\n",
        replacement="        except KeyError as error:\n",
        tests=(f"{_DELIVERY}what_was_missed_comes_later_and_in_order[at once]",),
    ),
    Mutant(
        name="configuration: an option that nobody reads passes",
        breaks="train.manual_gc_eval changes nothing, and nothing says so",
        file="src/megatron/bridge/training/train.py",
        text="train_config.manual_gc and train_config.manual_gc_eval\n",
        replacement="train_config.manual_gc\n",
        tests=(
            "tests/unit_tests/training/config/test_options_have_an_effect.py::"
            "test_an_option_is_read_or_refused_or_named_in_the_log[train-TrainingConfig-manual_gc_eval]",
        ),
    ),
    Mutant(
        name="a clean-up that fails ends the run",
        breaks="a complete checkpoint's run dies of an old one that can't be removed",
        file="src/megatron/bridge/utils/files.py",
        text="            path.unlink(missing_ok=True)\n    except OSError as error:\n",
        replacement="            path.unlink(missing_ok=True)\n    except KeyError as error:\n",
        tests=("tests/unit_tests/checkpoint/test_layout.py::test_what_cannot_be_removed_is_a_warning_and_tried_again",),
    ),
)
