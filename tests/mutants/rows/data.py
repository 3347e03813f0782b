# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The mutants of the data and of generation."""

from tests.mutants.changes import condition, expression, value, without_operand
from tests.mutants.rows.mutant import Mutant

_PACKED = "tests/functional_tests/test_packing.py::test_"
_CONVERSATIONS = "tests/unit_tests/data/test_conversations.py::test_"
_CACHE = "tests/unit_tests/data/test_cache.py::test_"
_GENERATE = "tests/functional_tests/test_generate.py::test_"
_BATCHES = "tests/functional_tests/test_text_generation.py::test_"
_QWEN3_NEXT = "tests/functional_tests/test_qwen3_next.py::test_"

THE_DATA = (
    Mutant(
        name="packed without a mask",
        breaks="samples of a row see those before them",
        where="megatron.bridge.models.packed_attention:separate_causal_mask",
        change=expression("same", "torch.ones_like(same)"),
        tests=(f"{_PACKED}a_sample_moves_no_other_and_costs_what_it_costs_alone",),
    ),
    Mutant(
        name="packed states",
        breaks="Gated DeltaNet's state reaches from a packed sample into the next",
        where="megatron.bridge.models.delta_rule:_reach_of",
        change=condition("sample_of"),
        tests=("tests/unit_tests/models/test_delta_rule.py::test_samples_are_computed_as_if_alone",),
    ),
    Mutant(
        name="packed convolution",
        breaks="Gated DeltaNet's convolution reaches from a packed sample into the next",
        where="megatron.bridge.models.gated_delta_net:GatedDeltaNet._convolved",
        change=expression("sample_of", "None"),
        tests=(f"{_QWEN3_NEXT}checkpoint_and_export_say_the_same_and_packed_samples_what_they_say_alone",),
    ),
    Mutant(
        name="a norm of each rank's heads",
        breaks="tensor-parallel ranks train different weights of Gated DeltaNet's norm",
        where="megatron.bridge.models.gated_delta_net:GatedDeltaNet._gated_norm",
        change=expression(
            "copy_to_tensor_model_parallel_region(self.norm_weight.float(), group=self.tp_group)",
            "self.norm_weight.float()",
        ),
        tests=(f"{_QWEN3_NEXT}offload_and_recomputation_change_no_bit_and_ranks_keep_what_they_share",),
    ),
    Mutant(
        name="packed beside a window",
        breaks="Core's window replaces the samples' mask, unsaid",
        where="megatron.bridge.models.packed_attention:check_samples_are_kept_apart",
        change=condition("window_size"),
        tests=(f"{_PACKED}what_would_look_across_is_refused",),
    ),
    Mutant(
        name="packs whose labels are the tokens",
        breaks="rows that were packed beforehand teach the model to repeat its input",
        where="megatron.bridge.data.prepacked:PrepackedDataset.__getitem__",
        change=expression("np.append(ids[1:], 0)", "ids"),
        tests=("tests/unit_tests/data/test_prepacked.py::test_rows_are_read_exactly",),
    ),
    Mutant(
        name="tokens of another column",
        breaks="a run on another column of conversations trains on the tokens that were kept of the first",
        where="megatron.bridge.data.sources.renamed:RenamedSource.digest",
        change=expression("self.columns.messages_column", "None"),
        tests=(
            "tests/unit_tests/data/test_preprocessing_config.py::test_the_column_that_is_named_is_learned_wherever_rows_lie",
        ),
    ),
    Mutant(
        name="ranks with other samples",
        breaks="ranks that share a batch train on different tokens, unsaid",
        where="megatron.bridge.data.same_data:check_same_on_all_ranks",
        change=condition("others"),
        tests=(f"{_CACHE}ranks_with_other_samples_end_together",),
    ),
    Mutant(
        name="a blend that begins again",
        breaks="a run that resumes sees samples that it has seen, and others never",
        where="megatron.bridge.data.blends:draws",
        change=expression("start - sum(first)", "0"),
        tests=("tests/unit_tests/data/test_blends.py::test_draws_come_as_the_weights_say_from_any_position",),
    ),
    Mutant(
        name="each epoch cut to whole batches",
        breaks="a run of several epochs has fewer steps than its samples make",
        where="megatron.bridge.training.config.derived:with_known_length",
        change=expression(
            "samples // global_batch_size(cfg, world_size)",
            "cfg.train.num_epochs * (samples_per_epoch // global_batch_size(cfg, world_size))",
        ),
        tests=(
            "tests/unit_tests/training/config/test_update.py::test_epochs_follow_without_a_gap_and_what_is_left_is_said",
        ),
    ),
    Mutant(
        name="the steps of a run that has begun with another batch",
        breaks="an epoch resumed with a larger global batch ends before its samples do",
        where="megatron.bridge.training.config.update:count_steps_left",
        change=expression(
            "step + max(0, (total or 0) - consumed_samples) // derived.global_batch_size", "derived.train_iters"
        ),
        tests=(
            "tests/unit_tests/training/config/test_update.py::test_what_is_left_of_a_resumed_run_is_counted_in_samples",
        ),
    ),
    Mutant(
        name="one set for all",
        breaks="a set is reported under another's name",
        where="megatron.bridge.training.eval:evaluate_split",
        change=expression("means(totals).items()", "means(sums).items()"),
        tests=("tests/functional_tests/test_blended_finetune.py::test_sets_together_are_what_one_joined_set_is",),
    ),
    Mutant(
        name="tokens of old content",
        breaks="changed data is trained on as it was",
        where="megatron.bridge.data.sft:_through_cache.prepare",
        change=value("digest", '"the same"'),
        tests=(f"{_CACHE}changed_data_is_tokenised_anew_though_size_and_time_are_the_same",),
    ),
    Mutant(
        name="a prompt that wasn't asked for",
        breaks="is learned behind each answer",
        where="megatron.bridge.data.answers:_unasked_prompt",
        change=condition("heeds_generation_prompt", becomes="True"),
        tests=(f"{_CONVERSATIONS}answers_are_found_in_the_rendering_of_the_whole",),
    ),
    Mutant(
        name="a flagged turn whose marks touch another's",
        breaks="is learned",
        where="megatron.bridge.data.chat:ChatFormat._as_marked",
        change=without_operand("owners", "unlearned"),
        tests=(f"{_CONVERSATIONS}a_flag_counts_with_marks_too",),
    ),
    Mutant(
        name="everyone tokenises",
        breaks="all processes of a machine do the same work",
        where="megatron.bridge.data.sft:_through_cache",
        change=condition("tokenises", becomes="True"),
        tests=(f"{_CACHE}the_first_process_of_a_machine_tokenises_and_the_others_wait",),
    ),
    Mutant(
        name="draws from padding",
        breaks="another layout says something else",
        where="megatron.bridge.models.generation:_next_logits.forward",
        change=expression("logits[:, -1, :vocab_size]", "logits[:, -1]"),
        tests=(f"{_GENERATE}two_ranks_say_what_one_says",),
    ),
    Mutant(
        name="one generator for a batch",
        breaks="what a prompt draws depends on the others",
        where="megatron.bridge.models.generation:generate_together",
        change=expression("generators[index]", "generators[0]"),
        tests=(f"{_BATCHES}draws_do_not_depend_on_the_batch",),
    ),
)
