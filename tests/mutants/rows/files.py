# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The mutants of checkpoints' files: what is damaged must be found."""

from tests.mutants.rows.mutant import Mutant

_BAD_INPUT = "tests/functional_tests/test_bad_input.py::test_"
_BOMBS = "tests/unit_tests/utils/test_expansion_limits.py::test_"
_INTERPRETERS = "tests/unit_tests/checkpoint/test_interpreters.py::test_"
_MANIFEST = "tests/unit_tests/checkpoint/test_manifest.py::test_"
CHECKPOINT = "src/megatron/bridge/checkpoint/"

THE_FILES = (
    Mutant(
        name="tensors not compared",
        breaks="a flipped bit is trained on",
        file=f"{CHECKPOINT}sharded_state.py",
        text="        if verify:\n",
        replacement="        if False:\n",
        tests=(f"{_BAD_INPUT}a_damaged_checkpoint[tensors]",),
    ),
    Mutant(
        name="small files not compared",
        breaks="a flipped bit in the configuration is believed",
        file=f"{CHECKPOINT}layout.py",
        text="    check_files_of(directory, lambda name: is_small_file(name) and not name.startswith(removed))\n",
        replacement="",
        tests=(f"{_BAD_INPUT}a_damaged_checkpoint[configuration]",),
    ),
    Mutant(
        name="checksum of the last write alone",
        breaks="whole files count as damaged",
        file=f"{CHECKPOINT}manifest.py",
        text="        self._checksum = zlib.crc32(data, self._checksum)\n",
        replacement="        self._checksum = zlib.crc32(data)\n",
        tests=(f"{_MANIFEST}what_was_summed_while_it_was_written_is_not_read_again",),
    ),
    Mutant(
        name="sizes alone",
        breaks="a file whose bits were flipped passes",
        file=f"{CHECKPOINT}manifest.py",
        text="    return None if found == checksum else",
        replacement="    return None if True else",
        tests=(f"{_MANIFEST}every_damage_is_found_and_names_its_file",),
    ),
    Mutant(
        name="a part read from the start of its tensor",
        breaks="a rank gets another rank's rows after the number of ranks changed",
        file=f"{CHECKPOINT}sharded_state.py",
        text=" + item.storage_offsets[0] * stored.stride(0)",
        replacement="",
        tests=("tests/unit_tests/checkpoint/test_plain_reader.py::test_what_is_read_is_what_was_stored",),
    ),
    Mutant(
        name="archives unfolded unseen",
        breaks="a stranger's train_state.pt takes all memory",
        file="src/megatron/bridge/utils/expansion_limits.py",
        text="        if deflated is not None:\n",
        replacement="        if False:\n",
        tests=(f"{_BOMBS}others_do_not",),
    ),
    Mutant(
        name="shared parts counted once",
        breaks="a load of a stranger's configuration never ends",
        file="src/megatron/bridge/utils/expansion_limits.py",
        text="    if size > max(LARGEST_EXPANSION, 4 * num_bytes):\n",
        replacement="    if False:\n",
        tests=(f"{_BOMBS}what_is_too_much",),
    ),
    Mutant(
        name="descriptions lead anywhere",
        breaks="a stranger's checkpoint reads files outside its directory",
        file=f"{CHECKPOINT}safe_pickle.py",
        text="        if not is_below(part.relative_path):\n",
        replacement="        if False:\n",
        tests=("tests/unit_tests/checkpoint/test_safe_pickle.py::test_a_description_that_leads_elsewhere",),
    ),
    Mutant(
        name="any attribute by name",
        breaks="a stranger's pickle reaches what no member is",
        file=f"{CHECKPOINT}inert_objects.py",
        text="        if found is None:\n",
        replacement="        found = getattr(owner, name) if found is None else found\n        if found is None:\n",
        tests=(f"{_INTERPRETERS}nothing_is_taken_from_anything_else",),
    ),
    Mutant(
        name="any name for a member of an enumeration that isn't here",
        breaks="a stranger's `mro` counts as a member",
        file=f"{CHECKPOINT}inert_objects.py",
        text=" and _can_be_a_members_name(name)",
        replacement="",
        tests=(f"{_INTERPRETERS}nothing_but_a_member_is_taken_from_one_of_megatrons",),
    ),
    Mutant(
        name="members of an enumeration by value alone",
        breaks="what CPython 3.11.2 wrote is refused",
        file=f"{CHECKPOINT}inert_objects.py",
        text="                found = owner.named(name)\n",
        replacement="                pass\n",
        tests=(f"{_INTERPRETERS}a_description_of_each_interpreter_is_read[3.11.2]",),
    ),
    Mutant(
        name="signals by class alone",
        breaks="a signal that CPython 3.10 or 3.11.2 stored is refused",
        file=f"{CHECKPOINT}safe_pickle.py",
        text='    **{f"signal.{name}": member for name, member in signal.Signals.__members__.items()},\n',
        replacement="",
        tests=(f"{_INTERPRETERS}a_blob_of_each_interpreter_is_read[3.10.13]",),
    ),
)
