# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What a row says; and the cells of the resume matrix that rows of several subjects name."""

from dataclasses import dataclass

from tests.mutants.changes import Change


@dataclass(frozen=True)
class Mutant:
    """One way to break the code."""

    name: str
    breaks: str
    """What goes wrong, in a few words."""

    where: str
    """The module and, in it, the function, class or constant: `package.module:Class.method`."""

    change: Change
    """What is changed there."""

    tests: tuple[str, ...]
    """Pytest's node ids, of which one must fail."""


RESUME = "tests/functional_tests/test_resume_matrix.py::test_resumes"
NOT_OFFLOADED = f"{RESUME}[dense-DP2-bf16-shards-0.0-serial-dp-as_it_was]"
OFFLOADED = f"{RESUME}_in_fresh_processes"
EXPERTS = f"{RESUME}[experts-EP2-fp16-aware-0.5-overlap-dp-as_it_was]"
RESHARDED = f"{RESUME}[dense-DP2-bf16-shards-0.0-serial-fully-PP_2]"
