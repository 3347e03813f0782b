# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Sections of a configuration, on which a name that nobody knows can't be set: a typo would be silent.

The classes hold what works. A name that only Megatron Bridge has is known to `unbuilt_options.py`: it can be given,
set and read like a field, and a rule of the configuration refuses what isn't neutral.
"""

import abc
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any, ClassVar

from megatron.bridge.utils.field_types import nearest
from megatron.bridge.utils.other_cores import option_of_another_core
from megatron.bridge.utils.unbuilt_options import WithoutEffect, unbuilt_names, unbuilt_option

_OPEN = "_is_open"


class ConstructorSignature:
    """`inspect.signature(cls)` shows what a constructor takes: NeMo-Run lets nothing else through."""

    def __get__(self, instance: Any, owner: Any) -> inspect.Signature:
        own = inspect.signature(owner.__init__)
        fields = [one for one in list(own.parameters.values())[1:] if one.name[0] != "_"]
        unbuilt = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option.neutral, annotation=option.hint)
            for name in unbuilt_names(getattr(owner, "_section", ""))
            if (option := option_of(owner, name)) is not None
        ]
        return own.replace(parameters=[*fields, *unbuilt])


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
                if is_dropped(type(self), name, value):
                    return
                names = _public_names(type(self))
                raise AttributeError(
                    f"{type(self).__name__} has no option {name}: {nearest(name, names)}"
                    "set one of its fields, or add the field in a dataclass that extends it"
                )
            super().__setattr__(name, value)


def is_dropped(cls: type, name: str, value: Any) -> bool:
    """Whether a value is given to an option that only another Core has, and asks for nothing.

    Raises:
        AttributeError: It asks for something.
    """
    option = option_of_another_core(cls, name)
    if option is not None and option.is_asked_for(value):
        raise AttributeError(option.refusal(cls.__name__))
    return option is not None


class DropsOptionsOfOtherCores(abc.ABCMeta):
    """A section of Core's takes, in its constructor too, what asks for nothing in another Core."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make the section of what this Core has."""
        kept = {name: value for name, value in kwargs.items() if not is_dropped(cls, name, value)}
        return super().__call__(*args, **kept)


class _TakesUnbuiltOptions(abc.ABCMeta):
    """What a section's constructor is given beside its fields is set after it."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        unbuilt = {name: kwargs.pop(name) for name in tuple(kwargs) if option_of(cls, name) is not None}
        section = super().__call__(*args, **kwargs)
        for name, value in unbuilt.items():
            setattr(section, name, value)
        return section


@dataclass(kw_only=True)
class BridgeSection(Section, metaclass=_TakesUnbuiltOptions):
    """A section that Megatron Bridge has too, with options that aren't built here: they are kept as they were set."""

    __signature__ = ConstructorSignature()

    _section: ClassVar[str] = ""
    """Its name in the table; empty: the container's."""

    _unbuilt: dict[str, Any] = field(default_factory=dict, repr=False)
    """What was set and isn't neutral; a field, so that copies and comparisons have it."""

    if not TYPE_CHECKING:  # a type checker would allow every name

        def __setattr__(self, name: str, value: Any) -> None:
            """Set a field, or keep what isn't built."""
            option = option_of(type(self), name)
            if option is None:
                super().__setattr__(name, value)
                return
            left = {key: item for key, item in unbuilt_values(self).items() if key != name}
            self._unbuilt = left if _is_same(value, option.neutral) else {**left, name: value}

        def __getattr__(self, name: str) -> Any:
            """What isn't built, where it was set, or its neutral value."""
            option = option_of(type(self), name)
            if option is None:
                message = f"{type(self).__name__} has no option {name}: {nearest(name, _public_names(type(self)))}"
                raise AttributeError(f"{message}set one of its fields")
            return unbuilt_values(self).get(name, option.neutral)


def option_of(cls: type, name: str) -> WithoutEffect | None:
    """Default and type of an option that isn't built, on a section of this class; None: the class has it, or nobody."""
    if not issubclass(cls, BridgeSection) or name.startswith("_") or name in _all_fields(cls) or hasattr(cls, name):
        return None
    return unbuilt_option(f"{cls._section}.{name}".lstrip("."))


def unbuilt_values(section: Any) -> dict[str, Any]:
    """The options of a section that aren't built and were set to something; none of anything else."""
    return getattr(section, "__dict__", {}).get("_unbuilt", {})


def _is_same(value: Any, default: Any) -> bool:
    return value is default or (type(value) is type(default) and value == default)


def open_to_all_names(section: Section) -> None:
    """From now on every name can be set: Core has the object, and hangs into it what its version needs."""
    object.__setattr__(section, _OPEN, True)


def _is_known(section: Section, name: str) -> bool:
    """Whether a name can be set: a field, what its class has, a private one, or one that a subclass's methods use."""
    cls = type(section)
    return (
        name.startswith("_")
        or name in _all_fields(cls)
        or hasattr(cls, name)
        or _OPEN in section.__dict__
        or any(name in base.__dict__.get("__annotations__", ()) or name in _names_in(base) for base in _own(cls))
    )


def _all_fields(cls: type) -> dict[str, Any]:
    return getattr(cls, "__dataclass_fields__", {})


def _public_names(cls: type) -> list[str]:
    """The fields that a caller may set."""
    return [one.name for one in _all_fields(cls).values() if one.init and not one.name.startswith("_")]


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
