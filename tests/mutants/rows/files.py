# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The mutants of checkpoints' files: what is damaged must be found."""

from tests.mutants.changes import condition, expression, value, without_call, without_element, without_operand
from tests.mutants.rows.mutant import Mutant

_BAD_INPUT = "tests/functional_tests/test_bad_input.py::test_"
_BOMBS = "tests/unit_tests/utils/test_expansion_limits.py::test_"
_INTERPRETERS = "tests/unit_tests/checkpoint/test_interpreters.py::test_"
_MANIFEST = "tests/unit_tests/checkpoint/test_manifest.py::test_"

THE_FILES = (
    Mutant(
        name="tensors not compared",
        breaks="a flipped bit is trained on",
        where="megatron.bridge.checkpoint.sharded_state:load_sharded",
        change=condition("verify"),
        tests=(f"{_BAD_INPUT}a_damaged_checkpoint[tensors]",),
    ),
    Mutant(
        name="small files not compared",
        breaks="a flipped bit in the configuration is believed",
        where="megatron.bridge.checkpoint.iterations:resolve_checkpoint",
        change=without_call("check_files_of"),
        tests=(f"{_BAD_INPUT}a_damaged_checkpoint[configuration]",),
    ),
    Mutant(
        name="checksum of the last write alone",
        breaks="whole files count as damaged",
        where="megatron.bridge.checkpoint.manifest:ChecksumWriter.write",
        change=value("_checksum", "zlib.crc32(data)"),
        tests=(f"{_MANIFEST}what_was_summed_while_it_was_written_is_not_read_again",),
    ),
    Mutant(
        name="sizes alone",
        breaks="a file whose bits were flipped passes",
        where="megatron.bridge.checkpoint.manifest:damage_of",
        change=condition("found", "checksum", becomes="True"),
        tests=(f"{_MANIFEST}every_damage_is_found_and_names_its_file",),
    ),
    Mutant(
        name="a part read from the start of its tensor",
        breaks="a rank gets another rank's rows after the number of ranks changed",
        where="megatron.bridge.checkpoint.sharded_state:PlainReader._read_in_place",
        change=without_operand("storage_offsets"),
        tests=("tests/unit_tests/checkpoint/test_plain_reader.py::test_what_is_read_is_what_was_stored",),
    ),
    Mutant(
        name="archives unfolded unseen",
        breaks="a stranger's train_state.pt takes all memory",
        where="megatron.bridge.utils.expansion_limits:check_archive",
        change=condition("deflated"),
        tests=(f"{_BOMBS}others_do_not",),
    ),
    Mutant(
        name="shared parts counted once",
        breaks="a load of a stranger's configuration never ends",
        where="megatron.bridge.utils.expansion_limits:check_expansion",
        change=condition("LARGEST_EXPANSION"),
        tests=(f"{_BOMBS}what_is_too_much",),
    ),
    Mutant(
        name="descriptions lead anywhere",
        breaks="a stranger's checkpoint reads files outside its directory",
        where="megatron.bridge.checkpoint.safe_pickle:_check_description",
        change=condition("is_below"),
        tests=("tests/unit_tests/checkpoint/test_safe_pickle.py::test_a_description_that_leads_elsewhere",),
    ),
    Mutant(
        name="any attribute by name",
        breaks="a stranger's pickle reaches what no member is",
        where="megatron.bridge.checkpoint.inert_objects:MemberLookup.__call__",
        change=condition("found", becomes="(found := getattr(owner, name) if found is None else found) is None"),
        tests=(f"{_INTERPRETERS}nothing_is_taken_from_anything_else",),
    ),
    Mutant(
        name="any name for a member of an enumeration that isn't here",
        breaks="a stranger's `mro` counts as a member",
        where="megatron.bridge.checkpoint.inert_objects:MemberLookup.__call__",
        change=without_operand("_can_be_a_members_name"),
        tests=(f"{_INTERPRETERS}nothing_but_a_member_is_taken_from_one_of_megatrons",),
    ),
    Mutant(
        name="members of an enumeration by value alone",
        breaks="what CPython 3.11.2 wrote is refused",
        where="megatron.bridge.checkpoint.inert_objects:MemberLookup.__call__",
        change=expression("owner.named(name)", "None"),
        tests=(f"{_INTERPRETERS}a_description_of_each_interpreter_is_read[3.11.2]",),
    ),
    Mutant(
        name="signals by class alone",
        breaks="a signal that CPython 3.10 or 3.11.2 stored is refused",
        where="megatron.bridge.checkpoint.safe_pickle:PLAIN_DATA",
        change=without_element("signal", "member"),
        tests=(f"{_INTERPRETERS}a_blob_of_each_interpreter_is_read[3.10.13]",),
    ),
)
