# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Which fields of a configuration were set."""

import copy
import dataclasses
import inspect
import pickle
from dataclasses import dataclass, field

from megatron.bridge.utils.set_fields import (
    RemembersSetFields,
    forget_set_fields,
    set_fields,
    writes_that_nobody_set,
)


@dataclass
class Section(RemembersSetFields):
    size: int
    flag: bool = False
    names: list = field(default_factory=list)


def test_what_the_constructor_was_given_and_what_was_assigned():
    section = Section(3, flag=False)
    assert set_fields(section) == {"size", "flag"}
    section.names = []
    section._other = 1  # no field
    assert set_fields(section) == {"size", "flag", "names"}
    forget_set_fields(section, ["flag"])
    assert set_fields(section) == {"size", "names"}
    forget_set_fields(section)
    assert not set_fields(section) and section == Section(3)


def test_a_copy_set_nothing_that_is_a_default():
    replaced = dataclasses.replace(Section(3, flag=True), size=4)
    assert set_fields(replaced) == {"size", "flag"}
    section = Section(3)
    section.flag = True
    for same in (copy.copy(section), copy.deepcopy(section), pickle.loads(pickle.dumps(section))):
        assert set_fields(same) == {"size", "flag"}
        same.names = ["a"]
    assert set_fields(section) == {"size", "flag"}


def test_derived_values_were_not_set():
    section = Section(3)
    with writes_that_nobody_set(section, object()):
        section.flag = True
    assert section.flag and set_fields(section) == {"size"}


def test_the_signature_stays_readable():
    assert list(inspect.signature(Section).parameters) == ["size", "flag", "names"]
