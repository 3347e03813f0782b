# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The mutants of the data and of generation."""

from tests.mutants.rows.mutant import Mutant

_PACKED = "tests/functional_tests/test_packing.py::test_"
_CONVERSATIONS = "tests/unit_tests/data/test_conversations.py::test_"
_CACHE = "tests/unit_tests/data/test_cache.py::test_"
_GENERATE = "tests/functional_tests/test_generate.py::test_"
SOURCE = "src/megatron/bridge/"

THE_DATA = (
    Mutant(
        name="packed without a mask",
        breaks="samples of a row see those before them",
        file=f"{SOURCE}models/packed_attention.py",
        text="    return ~(same & causal)[:, None]\n",
        replacement="    return ~(causal & causal)[None, None].expand(len(same), 1, -1, -1)\n",
        tests=(f"{_PACKED}a_sample_moves_no_other_and_costs_what_it_costs_alone",),
    ),
    Mutant(
        name="packed beside a window",
        breaks="Core's window replaces the samples' mask, unsaid",
        file=f"{SOURCE}models/packed_attention.py",
        text="            if softmax.window_size is not None:\n",
        replacement="            if False:\n",
        tests=(f"{_PACKED}what_would_look_across_is_refused",),
    ),
    Mutant(
        name="tokens of old content",
        breaks="changed data is trained on as it was",
        file=f"{SOURCE}data/sft.py",
        text="        digest = source.digest()\n",
        replacement='        digest = "the same"\n',
        tests=(f"{_CACHE}changed_data_is_tokenised_anew_though_size_and_time_are_the_same",),
    ),
    Mutant(
        name="a prompt that wasn't asked for",
        breaks="is learned behind each answer",
        file=f"{SOURCE}data/answers.py",
        text="    if turn is None or rendering.tokenizer.heeds_generation_prompt(rendering.tools):\n",
        replacement="    if True:\n",
        tests=(f"{_CONVERSATIONS}answers_are_found_in_the_rendering_of_the_whole",),
    ),
    Mutant(
        name="a flagged turn whose marks touch another's",
        breaks="is learned",
        file=f"{SOURCE}data/chat.py",
        text="mark and owners[bisect_right(ends, start)] not in said.unlearned",
        replacement="mark",
        tests=(f"{_CONVERSATIONS}a_flag_counts_with_marks_too",),
    ),
    Mutant(
        name="everyone tokenises",
        breaks="all processes of a machine do the same work",
        file=f"{SOURCE}data/sft.py",
        text="prepare if tokenises else None",
        replacement="prepare",
        tests=(f"{_CACHE}the_first_process_of_a_machine_tokenises_and_the_others_wait",),
    ),
    Mutant(
        name="draws from padding",
        breaks="another layout says something else",
        file=f"{SOURCE}models/generation.py",
        text="logits[0, -1, :vocab_size]",
        replacement="logits[0, -1]",
        tests=(f"{_GENERATE}two_ranks_say_what_one_says",),
    ),
)
