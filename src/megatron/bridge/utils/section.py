# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Sections of a configuration, on which a name that nobody knows can't be set: a typo would be silent."""

import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any

from megatron.bridge.utils.field_types import nearest

_OPEN = "_is_open"


class Section:
    """Base of a configuration's dataclass: only its fields and what its class has can be set.

    Private names are free, and so are those that the methods of a script's own subclass use.
    """

    if not TYPE_CHECKING:  # a type checker would allow every name

        def __setattr__(self, name: str, value: Any) -> None:
            """Set what is known.

            Raises:
                AttributeError: Nobody knows the name; it says the nearest.
            """
            if not _is_known(self, name):
                names = _public_names(type(self))
                raise AttributeError(
                    f"{type(self).__name__} has no option {name}: {nearest(name, names)}"
                    "set one of its fields, or add the field in a dataclass that extends it"
                )
            super().__setattr__(name, value)


def open_to_all_names(section: Section) -> None:
    """From now on every name can be set: Core has the object, and hangs into it what its version needs."""
    object.__setattr__(section, _OPEN, True)


def _is_known(section: Section, name: str) -> bool:
    """Whether a name can be set: a field, what its class has, a private one, or one that a subclass's methods use."""
    cls = type(section)
    return (
        name.startswith("_")
        or name in getattr(cls, "__dataclass_fields__", ())
        or hasattr(cls, name)
        or _OPEN in section.__dict__
        or any(name in base.__dict__.get("__annotations__", ()) or name in _names_in(base) for base in _own(cls))
    )


def _public_names(cls: type) -> list[str]:
    """The fields that a caller may set."""
    fields = getattr(cls, "__dataclass_fields__", {}).values()
    return [field.name for field in fields if field.init and not field.name.startswith("_")]


def _own(cls: type) -> list[type]:
    """The classes of a script's own among a class's bases."""
    return [base for base in cls.__mro__[:-1] if not base.__module__.startswith("megatron.")]


def _names_in(cls: type) -> set[str]:
    """The names of attributes that a class's methods use."""
    methods = (inspect.unwrap(getattr(item, "__func__", item)) for item in _callables(cls))
    return {name for method in methods if isinstance(method, FunctionType) for name in _names_in_code(method.__code__)}


def _callables(cls: type) -> Iterator[Any]:
    """What a class defines itself, accessors of its properties included."""
    for item in vars(cls).values():
        yield from (item.fget, item.fset) if isinstance(item, property) else (item,)


def _names_in_code(code: CodeType) -> Iterator[str]:
    """The names in a function and in those within it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in_code(constant)
