# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The rules across sections of a configuration: one function a rule, named after it. A rule reads and never changes.

A file holds the rules on one subject; `RULES` is all of them, in the order in which they speak.
"""

from collections.abc import Callable

from megatron.bridge.training.config.rules.batches import (
    check_evaluation_batch_is_divisible,
    check_global_batch_is_divisible,
    check_sequence_lengths_agree,
)
from megatron.bridge.training.config.rules.checkpoint import (
    check_background_writer_is_a_thread,
    check_exchange_suits_the_backend,
    check_non_persistent_checkpoints_have_a_place,
    check_peft,
    check_pretrained_checkpoint_exists,
)
from megatron.bridge.training.config.rules.context_parallel import CONTEXT_PARALLEL_RULES
from megatron.bridge.training.config.rules.experts import EXPERT_RULES
from megatron.bridge.training.config.rules.monitoring import (
    check_profiles_have_a_place,
    check_progress_has_a_place,
    check_trackers_are_installed,
)
from megatron.bridge.training.config.rules.optimizer import OPTIMIZER_RULES
from megatron.bridge.training.config.rules.parallel import PARALLEL_RULES, check_virtual_pipeline_fits
from megatron.bridge.training.config.rules.schedule import (
    check_learning_rates_are_ordered,
    check_schedule_counts_as_the_run_does,
    check_schedule_fits_the_run,
    check_weight_decay_grows,
)
from megatron.bridge.training.config.rules.state_formats import STATE_FORMAT_RULES
from megatron.bridge.training.config.rules.values import VALUE_RULES
from megatron.bridge.training.config.sections import RunSections
from megatron.bridge.training.config.unsupported import check_options_are_built

RULES: tuple[Callable[[RunSections, int], None], ...] = (
    *VALUE_RULES,
    *PARALLEL_RULES,
    *EXPERT_RULES,
    check_global_batch_is_divisible,
    check_evaluation_batch_is_divisible,
    check_virtual_pipeline_fits,
    check_sequence_lengths_agree,
    *CONTEXT_PARALLEL_RULES,
    *OPTIMIZER_RULES,
    *STATE_FORMAT_RULES,
    check_schedule_counts_as_the_run_does,
    check_schedule_fits_the_run,
    check_learning_rates_are_ordered,
    check_weight_decay_grows,
    check_options_are_built,
    check_pretrained_checkpoint_exists,
    check_peft,
    check_non_persistent_checkpoints_have_a_place,
    check_background_writer_is_a_thread,
    check_exchange_suits_the_backend,
    check_trackers_are_installed,
    check_profiles_have_a_place,
    check_progress_has_a_place,
)
"""Every rule, in the order in which they speak: what is wrong first is said first."""
