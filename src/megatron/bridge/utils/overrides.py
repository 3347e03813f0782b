# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Overrides as on Hydra's command lines: `train.train_iters=50 optimizer.lr=1e-5 checkpoint.save=null`.

Each is checked against the dataclass's own types: an unknown option or a value of the wrong type is an error that names
the nearest option.
"""

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import yaml

from megatron.bridge.utils.field_types import dataclass_of, field_hints, fit, members_of, nearest
from megatron.bridge.utils.other_cores import option_of_another_core
from megatron.bridge.utils.section import option_of
from megatron.bridge.utils.yaml_io import from_yaml_dict, parse_yaml

__all__ = ["apply_mapping", "apply_overrides", "nearest", "plain_value", "split_override"]

_OVERRIDE = re.compile(r"^(?P<action>\+\+|\+|~)?(?P<key>[A-Za-z_][\w.-]*)(?:=(?P<value>.*))?$", re.DOTALL)
_MISSING = object()
_QUOTES_AND_BRACKETS = ("'", '"', "[", "{")
_NULLS = ("null", "Null", "NULL", "None")
"""`None` is Python's spelling; nobody means a directory of that name."""


def apply_overrides(config: Any, overrides: Iterable[str]) -> Any:
    """Set options of a configuration from `key=value` texts.

    A key is a path of field names. A value is YAML: numbers, true and false, null, [lists], {a: mappings}, text. A
    section that is None (profiling) is made when one of its options is set. `+key=value` adds to a dictionary (and is
    the same as `key=value` elsewhere); `~key` removes from one.

    Args:
        config: A dataclass with sections; it is changed.
        overrides: The texts, applied in order.

    Returns:
        The same configuration.

    Raises:
        ValueError: An override that can't be read, names no option, or has the wrong type.
    """
    for override in overrides:
        _, key, text = split_override(override)
        _apply(config, key, text)
    return config


def split_override(override: str) -> tuple[str, str, str | None]:
    """One `key=value`, `+key=value` or `~key` as (`""`, `"+"`, `"++"` or `"~"`; key; value, None after `~`).

    Raises:
        ValueError: It can't be read.
    """
    match = _OVERRIDE.match(override)
    if match is None or (match["value"] is None) != (match["action"] == "~"):
        raise ValueError(f"override {override!r} can't be read: expected key=value, e.g. train.train_iters=50")
    return match["action"] or "", match["key"], match["value"]


def apply_mapping(config: Any, values: Mapping[str, Any], *, where: str = "") -> Any:
    """Set options of a configuration from nested mappings, as a YAML file holds them.

    A mapping with `_target_` replaces a whole section; one without sets its options one by one. A key may be a path of
    names, as on a command line: `optimizer.lr`.

    Raises:
        ValueError: An unknown option, a value of the wrong type, or two values for one option.
    """
    if not where:
        _check_said_once(values)
    for key, value in sorted(values.items(), key=lambda item: "." in str(item[0])):  # a section, then parts of it
        if key == "_target_":
            continue
        path = f"{where}.{key}" if where else str(key)
        if "." in str(key):
            target, item_hint = _owner_of(config, key)
            parent, _, last = path.rpartition(".")
            if isinstance(target, dict):
                target[last] = from_yaml_dict(value, expected=item_hint, where=path)
            else:
                _hint(target, last, path, root=config)
                apply_mapping(target, {last: value}, where=parent)
            continue
        hint = _hint(config, str(key), path, root=config)
        current = getattr(config, key, None)
        if isinstance(value, Mapping) and "_target_" not in value:
            current = _section(config, key, current, hint)
            if dataclasses.is_dataclass(current):
                apply_mapping(current, value, where=path)
                continue
        _set(config, str(key), from_yaml_dict(value, expected=hint, where=path), path)
    return config


def _check_said_once(values: Mapping[str, Any]) -> None:
    """Refuse an option with two values: one in its section and one at its path, or of its section as a whole."""
    given: set[str] = set()
    for path in _paths_of(values):
        if path in given:
            raise ValueError(f"{path} comes twice, in its section and as a path of names: leave one of them out")
        given.add(path)
    for path in given:
        parts = path.split(".")
        sections = (".".join(parts[:count]) for count in range(1, len(parts)))
        section = next((section for section in sections if section in given), None)
        if section is not None:
            raise ValueError(f"{section} has a value of its own beside {path}: leave one of them out")


def _paths_of(values: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """The path of each value, in the order of the file."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _paths_of(value, f"{above}{key}.")
        else:
            yield f"{above}{key}"


def _apply(config: Any, key: str, text: str | None) -> None:
    """Walk to the option and set it. None: remove it."""
    last = key.rpartition(".")[2]
    target, item_hint = _owner_of(config, key)
    if isinstance(target, dict):
        _set_item(target, last, text, item_hint, key)
        return
    hint = _hint(target, last, key, root=config)
    if text is None:
        raise ValueError(f"~{key}: {key} is an option, not an entry of a dictionary; write {key}=null")
    _set(target, last, _value(text, hint, key, current=getattr(target, last, None)), key)


def _set(target: Any, name: str, value: Any, key: str) -> None:
    """Set an option; one that only another Core has is dropped or refused by its section."""
    try:
        setattr(target, name, value)
    except AttributeError as error:
        raise ValueError(f"{key}: {error}") from None


def _owner_of(config: Any, key: str) -> tuple[Any, Any]:
    """What holds the option at a path's end, a section or a dictionary; and the type of a dictionary's values."""
    *sections, last = key.split(".")
    target, item_hint, path = config, Any, ""
    for index, name in enumerate(sections):
        path = f"{path}.{name}" if path else name
        if isinstance(target, dict):
            target = target.setdefault(name, {})
            continue
        hint = _hint(target, name, key, root=config)
        target, item_hint = _section(target, name, getattr(target, name), hint), _value_hint(hint)
        if not (dataclasses.is_dataclass(target) or isinstance(target, dict)):
            rest = ".".join([*sections[index + 1 :], last])
            what = "null" if target is None else f"a {type(target).__name__}"
            raise ValueError(f"{key}: {path} is {what} and has no option {rest}; set {path} itself first")
    return target, item_hint


def _set_item(target: dict, name: str, text: str | None, hint: Any, key: str) -> None:
    """Set or (None) remove one entry of a dictionary."""
    if text is not None:
        target[name] = _value(text, hint, key, current=None)
    elif target.pop(name, _MISSING) is _MISSING:
        raise ValueError(f"~{key}: there is no such entry; {nearest(name, target)}the entries are {sorted(target)}")


def _value_hint(hint: Any) -> Any:
    """The type of a dictionary's values, if the hint says one."""
    found = [typing.get_args(member) for member in members_of(hint) if typing.get_origin(member) is dict]
    return found[0][1] if found else Any


def _section(owner: Any, name: str, current: Any, hint: Any) -> Any:
    """A section, made first when it is None and its class has a default for each field, or when it is a name."""
    makes = dataclass_of(hint)
    from_name = getattr(makes, "from_name", None)
    if isinstance(current, str) and from_name is not None:
        setattr(owner, name, from_name(current))
    if current is not None:
        return getattr(owner, name)
    if makes is None and any((typing.get_origin(member) or member) is dict for member in members_of(hint)):
        makes = dict
    if makes is not None:
        setattr(owner, name, makes())
    return getattr(owner, name)


def _hint(target: Any, name: str, key: str, *, root: Any) -> Any:
    """The type of an option, or the error that there is none."""
    hints = field_hints(type(target))
    if name in hints:
        return hints[name]
    unbuilt = option_of(type(target), name)
    if unbuilt is not None:
        return unbuilt.hint
    if option_of_another_core(type(target), name) is not None:
        return Any
    attribute = getattr(type(target), name, None)
    if isinstance(attribute, property) and attribute.fset is not None:
        return attribute.fget.__annotations__.get("return", Any)
    raise ValueError(
        f"unknown option {key}: {_suggestion(name, key, hints, root)}{type(target).__name__} has no field {name}"
    )


def _suggestion(name: str, key: str, hints: Iterable[str], root: Any) -> str:
    """'did you mean X? ' for an option that isn't there: a corrected name, else the same name in another section."""
    paths, leaf = list(_paths(root)), key.rpartition(".")[2]
    close = difflib.get_close_matches(name, list(hints), n=1)
    corrected = [".".join(close[0] if part == name else part for part in key.split("."))] if close else []
    elsewhere = [path for path in paths if path.rpartition(".")[2] == leaf]
    is_dotted = "." in key
    for candidate in [*(path for path in corrected if path in paths and is_dotted), *elsewhere, *corrected]:
        return f"did you mean {candidate}? "
    return nearest(key, [path for path in paths if ("." in path) == is_dotted])


def _paths(config: Any, prefix: str = "", depth: int = 2) -> Iterable[str]:
    """The options of a configuration and its sections."""
    for name in field_hints(type(config)):
        yield prefix + name
        value = getattr(config, name, None)
        if depth > 1 and dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from _paths(value, f"{prefix}{name}.", depth - 1)


def _value(text: str, hint: Any, key: str, *, current: Any) -> Any:
    """The value that a text stands for, in the option's type."""
    plain = plain_value(text)
    takes_text = any(member is str for member in members_of(hint))
    if takes_text and isinstance(plain, str | None) and not text.startswith(_QUOTES_AND_BRACKETS):
        # Literally: YAML would take `~` and `#1` for nothing, and cut `my run #1` off.
        plain = text.strip()
    if plain in _NULLS and not text.startswith(_QUOTES_AND_BRACKETS) and type(None) in members_of(hint):
        plain = None
    if isinstance(plain, Mapping) and dataclasses.is_dataclass(current) and "_target_" not in plain:
        return apply_mapping(current, plain, where=key)
    try:
        if isinstance(plain, Mapping | list):
            return from_yaml_dict(plain, expected=hint, where=key)
        return fit(plain, hint, where=key)
    except ValueError:
        if takes_text and not text.startswith(_QUOTES_AND_BRACKETS[2:]):
            return text
        raise


def plain_value(text: str) -> Any:
    """A text as YAML; what isn't YAML is text."""
    if text == "":
        return ""
    if text.startswith("{"):
        text = re.sub(r"([{,]\s*[\w.]+):(?=\S)", r"\1: ", text)  # Hydra's {a:1}
    try:
        return parse_yaml(text)
    except yaml.YAMLError:
        return text
