# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Replacements for the classes and functions that a pickle names: objects without behaviour, and enumerations.

Interpreters pickle a member of an enumeration in three ways: `Class(value)`; `getattr(Class, "NAME")` (CPython 3.11.0
to 3.11.3, which Debian 12 has); and `module.NAME` for enumerations made from a module's constants (until 3.11.3). All
three are read as the same member by any interpreter.
"""

import enum
from typing import Any


class ForeignNameError(ValueError):
    """A pickle names something that is not plain data. Not an `UnpicklingError`, which torch would replace."""


class InertValue:
    """Replaces an object whose class is known only by name. Keeps its arguments and state, and has no behaviour."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __repr__(self) -> str:
        return f"{type(self).__name__}{getattr(self, 'arguments', ())}"


class InertMember(InertValue):
    """Base of the replacements of enumeration members. The argument is the value, or the name if that was stored."""


def inert(full_name: str, base: type[InertValue] = InertValue) -> type[InertValue]:
    """Make a class that replaces the one of this name."""
    module, _, name = full_name.rpartition(".")
    return type(name, (base,), {"__module__": module})


class Enumeration:
    """Replaces an enumeration of this process, and gives access to its members only.

    A pickle may try to set attributes. That fails here, unlike for a function or a class.
    """

    __slots__ = ("_members", "_values")

    def __init__(self, members: type[enum.Enum]) -> None:
        self._members = members.__members__
        self._values = {member.value: member for member in members}

    def __call__(self, value: Any) -> enum.Enum:
        """The member with this value."""
        if value not in self._values:
            raise ValueError(f"{value!r} in it is no member of an enumeration")
        return self._values[value]

    def __setstate__(self, state: Any) -> None:
        raise ForeignNameError("an enumeration's state")

    def named(self, name: str) -> enum.Enum | None:
        """The member or alias with this name; None if there is none."""
        return self._members.get(name)


class MemberLookup:
    """Replaces `builtins.getattr`: returns members of listed enumerations, and no other attribute."""

    __slots__ = ()

    def __call__(self, owner: Any, name: Any) -> Any:
        """The owner's member of this name.

        Raises:
            ForeignNameError: There is none, or the owner isn't an enumeration on the list.
        """
        found: enum.Enum | InertMember | None = None
        if type(name) is str:
            if type(owner) is Enumeration:
                found = owner.named(name)
            elif isinstance(owner, type) and issubclass(owner, InertMember) and _can_be_a_members_name(name):
                found = owner(name)
        if found is None:
            raise ForeignNameError("builtins.getattr")
        return found

    def __setstate__(self, state: Any) -> None:
        raise ForeignNameError("builtins.getattr")


def _can_be_a_members_name(name: str) -> bool:
    """Whether an unknown enumeration may have a member with this name: not if all classes have such an attribute."""
    taken = name in vars(enum.Enum) or hasattr(type, name)
    return name.isidentifier() and not name.startswith("_") and not taken
