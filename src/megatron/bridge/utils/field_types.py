# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The types of dataclass fields, and values from files and command lines fitted to them."""

import collections.abc
import dataclasses
import difflib
import enum
import pathlib
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Optional, Union

import torch

from megatron.bridge.utils.targets import dtype_named, function_named

_SEQUENCES = (list, tuple, set, frozenset, collections.abc.Sequence, collections.abc.Iterable)
_MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)


def nearest(name: str, candidates: Iterable[str]) -> str:
    """'did you mean X? ' for the candidate most like `name`, or nothing when none is."""
    found = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return f"did you mean {found[0]}? " if found else ""


def field_hints(cls: type) -> dict[str, Any]:
    """The type of each dataclass field that a caller may set; a field whose default is None may be None.

    A type that can't be worked out counts as Any.
    """
    return {
        field.name: _hint_of(cls, field)
        for field in dataclasses.fields(cls)
        if field.init and not field.name.startswith("_")
    }


def _hint_of(cls: type, field: dataclasses.Field) -> Any:
    """The type of one field, with None added when that is its default."""
    hint = field.type
    if isinstance(hint, str):
        owner = next(base for base in cls.__mro__ if field.name in base.__dict__.get("__annotations__", {}))
        one_field = types.SimpleNamespace(__annotations__={field.name: hint})
        try:
            hint = typing.get_type_hints(one_field, vars(sys.modules[owner.__module__]))[field.name]
        except NameError:  # a name that is imported for type checkers only
            return Any
    return Optional[hint] if field.default is None else hint  # noqa: UP045  also takes what `|` doesn't


def describe(hint: Any) -> str:
    """A type in words for an error message."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is type(None):
        return "null"
    if origin in (Union, types.UnionType):
        return " or ".join(describe(arg) for arg in args)
    if origin is Literal:
        return "one of " + ", ".join(str(arg) for arg in args)
    if origin in (collections.abc.Callable, Callable) or hint in (Callable, typing.Callable):
        return "a function"
    if origin is not None and args:
        return f"{origin.__name__} of {', '.join(describe(arg) for arg in args if arg is not ...)}"
    names = {bool: "true or false", int: "int", float: "float", str: "text", torch.dtype: "a dtype such as bfloat16"}
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return "one of " + ", ".join(hint.__members__)
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def fit(value: Any, hint: Any, *, where: str) -> Any:
    """The value as the type wants it: an int for a float becomes one, names become dtypes, enums and functions.

    Args:
        value: A plain value, or an object already.
        hint: The field's type.
        where: The option, for the error.

    Raises:
        ValueError: The value doesn't fit; a float is no int, text is no number, and only true and false are bools.
    """
    try:
        return _fit(value, hint)
    except _MisfitError as misfit:
        kind = "null" if value is None else f"{_show(value)} ({type(value).__name__})"
        raise ValueError(f"{where} is {kind}: expected {describe(hint)}{misfit}") from None


class _MisfitError(Exception):
    """A value and a type that don't fit; the text, if any, ends the error's sentence."""


def _show(value: Any) -> str:
    """A value in an error: short, on one line."""
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


def _fit(value: Any, hint: Any) -> Any:
    """`fit` without the wording of its error."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or isinstance(hint, typing.TypeVar | typing.ForwardRef | str):
        return value
    if hint in (None, type(None)):
        return _expect(value, value is None)
    if origin in (Union, types.UnionType):
        return _fit_union(value, args)
    if origin is typing.Annotated:
        return _fit(value, args[0])
    if origin is Literal:
        return _fit_literal(value, args)
    if origin is collections.abc.Callable or hint in (Callable, typing.Callable):
        return _fit_function(value)
    if (origin or hint) in _SEQUENCES:
        return _fit_sequence(value, origin or hint, args)
    if (origin or hint) in _MAPPINGS:
        return _fit_mapping(value, args)
    return _fit_scalar(value, origin or hint)


def _expect(value: Any, holds: bool) -> Any:
    """The value, if it fits."""
    if not holds:
        raise _MisfitError
    return value


def _fit_union(value: Any, members: tuple) -> Any:
    """Try the members that need no change of type first, so that 1 stays an int in `float | int`."""
    for member in members:
        if type(value) is (typing.get_origin(member) or member):
            try:
                return _fit(value, member)
            except _MisfitError:
                continue
    for member in members:
        try:
            return _fit(value, member)
        except _MisfitError:
            continue
    texts = [text for member in members if typing.get_origin(member) is Literal for text in typing.get_args(member)]
    raise _MisfitError(_suggest(value, texts))


def _suggest(value: Any, choices: Iterable[Any]) -> str:
    """The end of an error's sentence: the choice most like what was written."""
    hint = nearest(str(value), [str(choice) for choice in choices]).strip()
    return f"; {hint}" if hint else ""


def _fit_literal(value: Any, choices: tuple) -> Any:
    """One of the choices, type and all (true is not 1)."""
    for choice in choices:
        if value == choice and type(value) is type(choice):
            return choice
    raise _MisfitError(_suggest(value, choices))


def _fit_function(value: Any) -> Any:
    """A function, or the name of one that may be named."""
    if isinstance(value, str):
        value = function_named(value)
    return _expect(value, callable(value))


def _fit_sequence(value: Any, container: type, args: tuple) -> Any:
    """A list for each kind of sequence but tuples and sets."""
    _expect(value, isinstance(value, list | tuple | set | frozenset))
    make = container if container in (tuple, set, frozenset) else list
    if make is tuple and args and args[-1] is not ...:
        _expect(value, len(value) == len(args))
        return tuple(_fit(item, hint) for item, hint in zip(value, args, strict=True))
    item_hint = args[0] if args else Any
    return make(_fit(item, item_hint) for item in value)


def _fit_mapping(value: Any, args: tuple) -> Any:
    """A dictionary with fitting keys and values."""
    _expect(value, isinstance(value, Mapping))
    key_hint, value_hint = args if len(args) == 2 else (Any, Any)
    return {_fit(key, key_hint): _fit(item, value_hint) for key, item in value.items()}


def _fit_scalar(value: Any, hint: type) -> Any:
    """Numbers, text, dtypes, enums, paths, and objects of other classes."""
    if hint is bool or hint is str:
        return _expect(value, type(value) is hint)
    if hint is int:
        return _expect(value, isinstance(value, int) and not isinstance(value, bool))
    if hint is float:
        return _fit_float(value)
    if hint is torch.dtype:
        found = dtype_named(value) if isinstance(value, str) else value
        return _expect(found, isinstance(found, torch.dtype))
    if isinstance(hint, type) and issubclass(hint, pathlib.PurePath):
        return hint(_expect(value, isinstance(value, str | pathlib.PurePath)))
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _fit_enum(value, hint)
    return _expect(value, not isinstance(hint, type) or isinstance(value, hint))


def _fit_float(value: Any) -> float:
    """A float from a number or from text that is one: YAML 1.1 reads 1e-5, without a dot, as text."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            raise _MisfitError from None
    return float(_expect(value, isinstance(value, int | float) and not isinstance(value, bool)))


def _fit_enum(value: Any, hint: type[enum.Enum]) -> enum.Enum:
    """A member, from itself, its name or its value."""
    if isinstance(value, hint):
        return value
    if isinstance(value, str) and value in hint.__members__:
        return hint[value]
    for member in hint:
        if member.value == value and type(member.value) is type(value):
            return member
    raise _MisfitError(_suggest(value, hint.__members__))


def dataclass_of(hint: Any) -> type | None:
    """The dataclass among the types that a hint takes, the first of several."""
    return next((one for one in members_of(hint) if isinstance(one, type) and dataclasses.is_dataclass(one)), None)


def members_of(hint: Any) -> tuple[Any, ...]:
    """The types that a union takes; a type that is no union, alone."""
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
