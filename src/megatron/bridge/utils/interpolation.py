# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Expand `~`, `${oc.env:NAME}` and `${section.option}` in the strings of a configuration.

A shell doesn't expand `checkpoint.save=~/run`, and YAML never does. Unexpanded, a directory of that name would be
created.
"""

import argparse
import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

_REFERENCE = re.compile(r"\$\{([^${}]*)\}")
_MOST_REFERENCES = 100
"""Most references to replace in one string; more mean that they refer to each other in a circle."""

_TEMPLATES = ("dataset_kwargs", "chat_template")
"""Options that may hold Jinja text, which has such marks of its own."""


class NoHomeError(argparse.ArgumentTypeError, ValueError):
    """There is no such user. On a command line argparse shows the message."""


def expand_home(text: str, *, where: str = "path") -> str:
    """Replace `~` or `~user` at the start of a path by the home directory. Elsewhere `~` is an ordinary character.

    Raises:
        ValueError: There is no such user.
    """
    if not text.startswith("~"):
        return text
    expanded = os.path.expanduser(text)
    if expanded.startswith("~") and "/" in expanded:
        user = text.partition("/")[0][1:]
        raise NoHomeError(
            f"{where}={text!r}: there is no user {user!r} whose home it could be: write ./{text} for a name"
        )
    return expanded


def resolve_interpolations(config: Any) -> None:
    """Expand all strings of a configuration in place. Idempotent.

    Args:
        config: A dataclass of sections.

    Raises:
        ValueError: A `${...}` refers to nothing, or there is no such user. Names the option.
    """

    def look_up(option: str) -> Any:
        value = config
        for name in option.split("."):
            value = value.get(name) if isinstance(value, dict) else getattr(value, name, None)
        return value

    for name in _fields_of(config):
        setattr(config, name, _resolved(getattr(config, name), name, look_up))


def _resolved(value: Any, where: str, look_up: Callable[[str], Any]) -> Any:
    """The value with its strings expanded; sections are changed in place."""
    if type(value) is str:
        is_template = where.rpartition(".")[2] in _TEMPLATES and re.search(r"\n|\{[{%#]", value)
        return value if is_template else expand_home(_without_references(value, where, look_up), where=where)
    if isinstance(value, PurePath):
        return type(value)(_resolved(str(value), where, look_up))
    if type(value) in (list, tuple):
        return type(value)(_resolved(item, f"{where}[{index}]", look_up) for index, item in enumerate(value))
    if type(value) is dict and where.rpartition(".")[2] not in _TEMPLATES:
        return {key: _resolved(item, f"{where}.{key}", look_up) for key, item in value.items()}
    for name in _fields_of(value):
        before = getattr(value, name)
        after = _resolved(before, f"{where}.{name}", look_up)
        if after is not before and after != before:
            setattr(value, name, after)
    return value


def _fields_of(value: Any) -> list[str]:
    """The fields of one of our configuration classes or of a subclass in a script; no fields for anything else."""
    cls: Any = type(value)
    is_ours = any(base.__module__.startswith("megatron.bridge.") for base in cls.__mro__)
    if not (is_ours and dataclasses.is_dataclass(value)) or cls.__dataclass_params__.frozen:
        return []
    names = [field.name for field in dataclasses.fields(value) if field.init and not field.name.startswith("_")]
    return [name for name in names if hasattr(value, name)]


def _without_references(text: str, where: str, look_up: Callable[[str], Any]) -> str:
    """The string with each `${...}` replaced by what it refers to, innermost first."""
    resolved = text
    for _ in range(_MOST_REFERENCES):
        found = _REFERENCE.search(resolved)
        if found is None:
            break
        value = _named(found[1], look_up)
        if value is None:
            raise ValueError(
                f"{where}={text!r}: {found[0]} names nothing: expected ${{oc.env:NAME}} with a variable that is set, "
                "${oc.env:NAME,default}, or an option that is set, such as ${checkpoint.save}"
            )
        resolved = resolved[: found.start()] + value + resolved[found.end() :]
    if "${" in resolved:
        raise ValueError(f"{where}={text!r}: its ${{...}} have no end: correct it")
    return resolved


def _named(name: str, look_up: Callable[[str], Any]) -> str | None:
    """The value of `${name}`; None if it refers to nothing."""
    kind, _, rest = name.partition(":")
    if kind.strip() == "oc.env":
        variable, comma, default = rest.partition(",")
        return os.environ.get(variable.strip(), default.strip() if comma else None)
    value = look_up(name.strip()) if re.fullmatch(r"\s*[\w.]+\s*", name) else None
    return str(value) if isinstance(value, str | int | float | PurePath) else None
