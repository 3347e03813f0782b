# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Which fields of a configuration someone set, and which hold their class's default.

Where one section writes into another, a value that the user gave must not be lost. A dataclass that extends
`RemembersSetFields` knows which values were given: to its constructor, or by an assignment later.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from megatron.bridge.utils.section import ConstructorSignature, DropsOptionsOfOtherCores, Section

_RECORD = "_set_fields"


class RemembersSetFields(Section, metaclass=DropsOptionsOfOtherCores):
    """Base of a dataclass that remembers which of its fields were set."""

    __signature__ = ConstructorSignature()  # `__new__` alone would hide the fields
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Note what the constructor was given.

        A constructor that got every field makes a copy, as `dataclasses.replace` and a written file do: a default
        among them was not set by anyone.
        """
        new = super().__new__(cls)
        fields = [field for field in dataclasses.fields(cls) if field.init]
        given = {**dict(zip([field.name for field in fields if not field.kw_only], args, strict=False)), **kwargs}
        is_copy = all(field.name in given for field in fields)
        kept = [field.name for field in fields if field.name in given and not (is_copy and _is_default(field, given))]
        object.__setattr__(new, _RECORD, frozenset(kept))
        return new

    if not TYPE_CHECKING:  # a type checker would allow every name

        def __setattr__(self, name: str, value: Any) -> None:
            """Set a field, and note it unless the constructor does it."""
            if name in self.__dict__ and name in self.__dataclass_fields__:
                object.__setattr__(self, _RECORD, set_fields(self) | {name})
            super().__setattr__(name, value)


def _is_default(field: dataclasses.Field, given: dict[str, Any]) -> bool:
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return given[field.name] is default or given[field.name] == default


def set_fields(section: Any) -> frozenset[str]:
    """Names of the fields that were set; none of a class that doesn't remember."""
    return getattr(section, _RECORD, frozenset())


def forget_set_fields(section: Any, names: Iterable[str] | None = None) -> None:
    """From now on these fields count as defaults. None: all of them."""
    if isinstance(section, RemembersSetFields):
        left = frozenset() if names is None else set_fields(section) - frozenset(names)
        object.__setattr__(section, _RECORD, left)


@contextlib.contextmanager
def writes_that_nobody_set(*sections: Any) -> Iterator[None]:
    """Inside, fields that are written don't count as set: they are derived."""
    before = [(section, set_fields(section)) for section in sections if isinstance(section, RemembersSetFields)]
    try:
        yield
    finally:
        for section, record in before:
            object.__setattr__(section, _RECORD, record)
