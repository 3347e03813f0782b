# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Configuration objects <-> plain dictionaries <-> YAML files.

An object becomes `{"_target_": "module.Class", field: value, ...}`, as in Megatron Bridge's run_config.yaml; a function
or a dtype `{"_target_": name, "_call_": False}`; an enum `{"_target_": name, "_args_": [value], "_name_": name}`; a
function with some arguments bound `{"_target_": name, "_partial_": True, ...}`. Reading knows these forms and the names
that `targets.py` takes: nothing else is imported or called.
"""

import collections.abc
import dataclasses
import enum
import functools
import logging
import pathlib
import re
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron.bridge.utils.expansion_limits import check_expansion
from megatron.bridge.utils.field_types import dataclass_of, field_hints, fit, members_of, nearest
from megatron.bridge.utils.other_cores import option_of_another_core
from megatron.bridge.utils.section import option_of, unbuilt_values
from megatron.bridge.utils.targets import class_named, dtype_named, function_named, name_of

logger = logging.getLogger(__name__)

_NOT_SAVED = "_not_saved_"
"""Key of a value that has no form in YAML; it holds the value's text, for people."""

RUNTIME_FIELDS = frozenset(
    "timers finalize_model_grads_func grad_scale_func no_sync_func grad_sync_func param_sync_func moe_grad_scale_func "
    "mtp_grad_scale_func experimental_attention_variant_loss_scale_func dataset_dict".split()
)
"""Fields that hold what only a running job has, such as its own functions in Core's configurations: written as null."""


class ConfigFileError(ValueError):
    """A configuration file that can't be read: names the place in the file, what it holds and what is expected."""


def to_yaml_dict(value: Any) -> Any:
    """A configuration object as plain dictionaries, lists, numbers and text.

    Fields whose name starts with an underscore, fields that can't be set, and the functions that a running job hangs
    into Megatron-Core's configurations are left out or null. A value without a form in YAML (a lambda, a live object)
    becomes `{"_not_saved_": its text}`, which reading refuses or, on request, leaves at the field's default.
    """
    if isinstance(value, enum.Enum):
        return {"_target_": name_of(type(value)), "_args_": [value.value], "_name_": value.name}
    if value is None or isinstance(value, bool):
        return value
    for plain in (int, float, str):  # also what extends them, NumPy's float64 for one
        if isinstance(value, plain):
            return plain(value)
    if isinstance(value, pathlib.PurePath):
        return {"_target_": "pathlib.Path", "_args_": [str(value)]}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _dataclass_to_dict(value)
    if isinstance(value, Mapping):
        return {key: to_yaml_dict(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_yaml_dict(item) for item in value]
    if isinstance(value, functools.partial):
        return _partial_to_dict(value)
    name = name_of(value) if isinstance(value, torch.dtype | type) or callable(value) else None
    return {_NOT_SAVED: _one_line(value)} if name is None else {"_target_": name, "_call_": False}


def _dataclass_to_dict(config: Any) -> dict[str, Any]:
    """One dataclass: its public name and the fields that a caller may set."""
    name = name_of(type(config))
    saved: dict[str, Any] = {"_target_": name} if name else {_NOT_SAVED: _one_line(type(config))}
    for field in field_hints(type(config)):
        saved[field] = None if field in RUNTIME_FIELDS else to_yaml_dict(getattr(config, field))
    return saved | {name: to_yaml_dict(value) for name, value in unbuilt_values(config).items()}


def _partial_to_dict(bound: functools.partial) -> dict[str, Any]:
    """A function with some arguments bound."""
    name = name_of(bound.func)
    if name is None:
        return {_NOT_SAVED: _one_line(bound)}
    return {
        "_target_": name,
        "_partial_": True,
        "_args_": to_yaml_dict(bound.args),
        **{key: to_yaml_dict(item) for key, item in bound.keywords.items()},
    }


def _one_line(value: Any) -> str:
    """A value's text on one line, without the address in memory."""
    return re.sub(r" at 0x[0-9a-f]+", "", " ".join(str(value).split()))[:200]


def from_yaml_dict(
    value: Any,
    *,
    expected: Any = Any,
    allow: Iterable[type] = (),
    strict: bool = True,
    where: str = "config",
) -> Any:
    """The object that `to_yaml_dict` described.

    Args:
        value: What the file says.
        expected: The type that is wanted; a mapping without `_target_` becomes this dataclass.
        allow: Classes that may be named beside those of Megatron Bridge and Megatron-Core.
        strict: Refuse fields that the class lacks and values that weren't saved. False, for files written by another
            version: leave them out, read an unknown class as the expected dataclass, and say so in the log.
        where: Name of the value, for errors.

    Raises:
        ConfigFileError: An unknown name or field, or a value of the wrong type; it says where in the file.
    """
    allowed = {name: cls for cls in allow for name in (name_of(cls), f"{cls.__module__}.{cls.__qualname__}")}
    return _Reader(allowed, strict=strict).read(value, expected, where)


class _Reader:
    """Reads one file's dictionaries."""

    def __init__(self, allowed: dict[str | None, type], *, strict: bool):
        self.allowed = allowed
        self.strict = strict

    def read(self, value: Any, expected: Any, where: str) -> Any:
        """The value as an object of the expected type."""
        members = members_of(expected)
        if isinstance(value, Mapping):
            if _NOT_SAVED in value:
                raise _NotSavedError(f"{where} was {value[_NOT_SAVED]}, which a file can't hold: set it in Python")
            if "_target_" in value:
                return self._read_target(value, expected, where)
            dataclass_type = dataclass_of(expected)
            if dataclass_type is not None:
                return self._read_dataclass(dataclass_type, value, where)
            value = {key: self.read(item, Any, f"{where}.{key}") for key, item in value.items()}
        elif isinstance(value, list | tuple):
            item_hint = _item_hint(members)
            value = [self.read(item, item_hint, f"{where}[{index}]") for index, item in enumerate(value)]
        return self._fit(value, expected, where)

    def _read_target(self, value: Mapping[str, Any], expected: Any, where: str) -> Any:
        """What a mapping with `_target_` stands for."""
        name, args = value["_target_"], value.get("_args_") or []
        arguments = {key: item for key, item in value.items() if key not in _FORM_KEYS}
        if not isinstance(name, str):
            raise ConfigFileError(f"{where}._target_ is {name!r}: expected the name of a class; correct the file")
        if not isinstance(args, list):
            raise ConfigFileError(f"{where}._args_ is {_one_line(args)}: expected a list; correct the file")
        if value.get("_partial_"):
            bound_args = [self.read(item, Any, f"{where}._args_") for item in args]
            bound = {key: self.read(item, Any, f"{where}.{key}") for key, item in arguments.items()}
            return functools.partial(self._function(name, where), *bound_args, **bound)
        if name.startswith("torch.") and dtype_named(name) is not None:
            return self._fit(dtype_named(name), expected, where)
        if value.get("_call_") is False:
            return self._fit(self._function(name, where), expected, where)
        if name in ("pathlib.Path", "pathlib.PosixPath", "pathlib.PurePosixPath"):
            return self._fit(Path(*[str(part) for part in args]), expected, where)
        cls = self.allowed.get(name) or class_named(name) or self._stand_in(name, expected, where)
        if issubclass(cls, enum.Enum):
            return self._fit(args[0] if args else value.get("_name_"), cls, where)
        return self._fit(self._read_dataclass(cls, arguments, where), expected, where)

    def _stand_in(self, name: str, expected: Any, where: str) -> type:
        """The class that is expected, for one that another version named; only where the caller isn't strict."""
        stand_in = dataclass_of(expected)
        if self.strict or stand_in is None:
            raise ConfigFileError(_unknown(name, where))
        logger.warning("%s._target_ is %s, which is unknown: read as a %s", where, name, stand_in.__name__)
        return stand_in

    def _function(self, name: str, where: str) -> Any:
        """The function of that name."""
        found = function_named(name)
        if found is None:
            raise ConfigFileError(_unknown(name, where))
        return found

    def _read_dataclass(self, cls: type, arguments: Mapping[str, Any], where: str) -> Any:
        """One dataclass from its fields."""
        hints, read = field_hints(cls), {}
        for key, item in arguments.items():
            unbuilt = option_of(cls, str(key))
            if unbuilt is not None:
                hints[key] = unbuilt.hint
            elif self._is_dropped(cls, str(key), item, f"{where}.{key}"):
                continue
            if key not in hints:
                self._leave_out(f"{where}.{key} is unknown: {nearest(str(key), hints)}{cls.__name__} has no such field")
                continue
            try:
                read[key] = self.read(item, hints[key], f"{where}.{key}")
            except _NotSavedError as error:
                self._leave_out(str(error))
        try:
            return cls(**read)
        except (TypeError, ValueError, AssertionError) as error:
            raise ConfigFileError(f"{where} can't be a {cls.__name__}: {_one_line(error)}") from error

    def _is_dropped(self, cls: type, name: str, item: Any, where: str) -> bool:
        """Whether an option is another Core's, at the default that it has there."""
        option = option_of_another_core(cls, name)
        if option is None:
            return False
        if option.is_asked_for(self.read(item, Any, where)):
            self._leave_out(f"{where}={_one_line(item)}: {option.refusal(cls.__name__)}")
        return True

    def _leave_out(self, message: str) -> None:
        """Refuse what can't be read, or say that it is left at its default."""
        if self.strict:
            raise ConfigFileError(message)
        logger.warning("%s; left at its default", message)

    def _fit(self, value: Any, expected: Any, where: str) -> Any:
        """The value in the type that is expected."""
        try:
            return fit(value, expected, where=where)
        except ValueError as error:
            raise ConfigFileError(str(error)) from None


_FORM_KEYS = ("_target_", "_call_", "_partial_", "_args_", "_name_", "_convert_", "_recursive_")
"""Keys of the form itself; the others are arguments."""


class _NotSavedError(ConfigFileError):
    """A value that was left out when the file was written."""


def _item_hint(members: tuple) -> Any:
    """The type of each item of a sequence; Any where items differ, or more than one kind of sequence is taken."""
    hints = []
    for member in members:
        arguments = typing.get_args(member)
        if typing.get_origin(member) in (list, set, frozenset, collections.abc.Sequence) and arguments:
            hints.append(arguments[0])
        elif typing.get_origin(member) is tuple:
            hints.append(arguments[0] if arguments[-1] is ... else Any)
    return hints[0] if len(hints) == 1 else Any


def _unknown(name: str, where: str) -> str:
    """The error for a name that is not taken."""
    return (
        f"{where}._target_ is {name}: expected a configuration class of megatron.bridge or megatron.core, or a known "
        "activation or initialiser; nothing was imported or run. Remove it, or import your own class first"
    )


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers and booleans: 1e-5 is a number; yes, off, 010 and 1:30 are text. No key comes twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Refuse what PyYAML would take the last of."""
        lines: dict[tuple[str, str], int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            line = key.start_mark.line + 1
            if (key.tag, key.value) in lines:
                raise yaml.YAMLError(f"{key.value} comes twice, on lines {lines[key.tag, key.value]} and {line}")
            lines[key.tag, key.value] = line
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern) for tag, pattern in resolvers if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:int")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][\d_]*|0x[\da-fA-F]+)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF")


class _Dumper(yaml.SafeDumper):
    """Quotes text that either version of YAML would read as something else."""


for _yaml_class in (_Loader, _Dumper):
    _yaml_class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:\d[\d_]*(?:\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )


def parse_yaml(text: str, loader: type = _Loader) -> Any:
    """Plain values from YAML text; tags that would make objects are refused, and so are aliases that multiply.

    Args:
        text: The text.
        loader: Of PyYAML, one that makes plain values.

    Raises:
        yaml.YAMLError: The text isn't YAML, or stands for far more than it says.
    """
    parser = None
    try:
        parser = loader(text)
        node = parser.get_single_node()
        if node is None:
            return None
        check_expansion(node, len(text), _NODES)  # merges (<<) multiply as well, while values are made
        return parser.construct_document(node)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        # PyYAML's own, of `!!int x`, of a date that is none, of nesting
        raise yaml.YAMLError(f"{type(error).__name__}: {_one_line(error)}") from error
    finally:
        if parser is not None:
            parser.dispose()


_NODES = {
    yaml.ScalarNode: lambda node: (node.value,),
    yaml.SequenceNode: lambda node: node.value,
    yaml.MappingNode: lambda node: [part for pair in node.value for part in pair],
}
"""What YAML is made of before it is values, and what each holds."""


def load_yaml(path: str | Path) -> Any:
    """Plain values from a YAML file.

    Raises:
        FileNotFoundError: There is no such file.
        ConfigFileError: It isn't YAML; the error names file, line and column.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a YAML file with a configuration")
    try:
        return parse_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigFileError(f"{path} isn't readable YAML: {_one_line(error)}; correct the file") from error


def dump_yaml(value: Any, path: str | Path | None = None) -> str:
    """Write a configuration object, or plain values, as YAML.

    Args:
        value: The object; `to_yaml_dict` is applied to it.
        path: File to write. None: only return the text.

    Returns:
        The text.
    """
    text = yaml.dump(to_yaml_dict(value), Dumper=_Dumper, sort_keys=False, default_flow_style=False, width=120)
    if path is not None:
        from megatron.bridge.utils.files import atomic_write

        with atomic_write(path, "w") as file:
            file.write(text)
    return text
