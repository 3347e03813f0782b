# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What is put in a name's place as a pickle is read: records without behaviour, and enumerations that only look up.

Interpreters write a member of an enumeration in three ways: `Class(value)`; `getattr(Class, "NAME")` (CPython 3.11.0 to
3.11.3, Debian 12's among them); and, of enumerations made from a module's constants, `module.NAME` (until 3.11.3). All
mean the same member, whichever interpreter reads.
"""

import enum
from typing import Any


class ForeignNameError(ValueError):
    """A pickle names something that is not plain data. No `UnpicklingError`, which torch would replace."""


class InertValue:
    """Stands for an object whose class is known by name only: its arguments and state, and no behaviour."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __repr__(self) -> str:
        return f"{type(self).__name__}{getattr(self, 'arguments', ())}"


class InertMember(InertValue):
    """Base of what stands for an enumeration's members: the argument is the value, or the name if that was stored."""


def inert(full_name: str, base: type[InertValue] = InertValue) -> type[InertValue]:
    """A class that stands for the one of this name."""
    module, _, name = full_name.rpartition(".")
    return type(name, (base,), {"__module__": module})


class Enumeration:
    """Stands for an enumeration of this process: gives its members and nothing else of it.

    Unlike a function or a class it can't be given attributes, which a pickle may try.
    """

    __slots__ = ("_members", "_values")

    def __init__(self, members: type[enum.Enum]) -> None:
        self._members = members.__members__
        self._values = {member.value: member for member in members}

    def __call__(self, value: Any) -> enum.Enum:
        """The member of this value."""
        if value not in self._values:
            raise ValueError(f"{value!r} in it is no member of an enumeration")
        return self._values[value]

    def __setstate__(self, state: Any) -> None:
        raise ForeignNameError("an enumeration's state")

    def named(self, name: str) -> enum.Enum | None:
        """The member of this name, an alias too; None where there is none."""
        return self._members.get(name)


class MemberLookup:
    """Stands for `builtins.getattr`: gives a member of an enumeration that is on the list, and no other attribute."""

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
    """Whether an enumeration that isn't here may have such a member; `mro` and what each has besides are none."""
    taken = name in vars(enum.Enum) or hasattr(type, name)
    return name.isidentifier() and not name.startswith("_") and not taken
