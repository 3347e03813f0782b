# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Dataclasses whose fields have second names, because scripts and libraries spell one thing in several ways."""

from typing import Any


class TakesAliases(type):
    """Metaclass of a dataclass with `_aliases`: second name -> field. Both can be given, read and set."""

    _aliases: dict[str, str] = {}

    def __init__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> None:
        """Make a property of each second name."""
        super().__init__(name, bases, namespace)
        for alias, field in cls._aliases.items():
            setattr(cls, alias, _property(field))

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make an instance.

        Raises:
            TypeError: A field is given by two of its names.
        """
        given: dict[str, Any] = {}
        for key, value in kwargs.items():
            name = cls._aliases.get(key, key)
            if name in given:
                raise TypeError(f"{cls.__name__} got {name} twice, once as {key}: leave one of them out")
            given[name] = value
        return super().__call__(*args, **given)


def _property(field: str) -> property:
    def get(self: Any) -> Any:
        return getattr(self, field)

    def put(self: Any, value: Any) -> None:
        setattr(self, field, value)

    return property(get, put, doc=f"`{field}` by another name.")
