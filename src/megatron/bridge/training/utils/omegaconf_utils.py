# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Public import path of what applies a YAML file and command-line overrides to a configuration.

`process_config_with_overrides` does all of it. Scripts that do it step by step make an OmegaConf of the configuration,
change that, and bring the changes back:

    conf, excluded = create_omegaconf_dict_config(cfg)
    conf = OmegaConf.merge(conf, OmegaConf.load("mine.yaml"))
    conf = parse_hydra_overrides(conf, ["train.train_iters=50"])
    apply_overrides(cfg, OmegaConf.to_container(conf, resolve=True), excluded)
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

from omegaconf import DictConfig, OmegaConf

from megatron.bridge.utils import overrides as typed
from megatron.bridge.utils.overrides import apply_mapping, nearest, plain_value, split_override
from megatron.bridge.utils.yaml_io import ConfigFileError, load_yaml, to_yaml_dict

__all__ = [
    "OverridesError",
    "apply_overrides",
    "create_omegaconf_dict_config",
    "parse_hydra_overrides",
    "process_config_with_overrides",
]

ConfigT = TypeVar("ConfigT")


def process_config_with_overrides(
    config: ConfigT, config_filepath: str | Path | None = None, cli_overrides: Sequence[str] | None = None
) -> ConfigT:
    """Set options from a YAML file, then from the command line, which wins.

    Args:
        config: A configuration, such as a recipe returns; changed in place.
        config_filepath: YAML with the sections and options to set; it need not be complete. None: no file.
        cli_overrides: Overrides such as `train.train_iters=50`. None: no overrides.

    Returns:
        The same configuration.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: An unknown option or a value of the wrong type. Names the option, and the file if there is one.
    """
    if config_filepath is not None:
        values = load_yaml(config_filepath)
        if not isinstance(values, Mapping):
            raise ConfigFileError(f"{config_filepath} holds {type(values).__name__}: expected options by section")
        try:
            apply_mapping(config, values)
        except ValueError as error:
            raise ConfigFileError(f"{config_filepath}: {error}") from error
    return typed.apply_overrides(config, cli_overrides or ())


class OverridesError(ValueError):
    """An override of a command line that can't be read or names no option."""


def create_omegaconf_dict_config(config_obj: Any) -> tuple[DictConfig, dict[str, Any]]:
    """A configuration as OmegaConf, in the form of `run_config.yaml`.

    Args:
        config_obj: A dataclass with sections; it isn't changed.

    Returns:
        The options, and those left out of them as they have no form in YAML (lambdas, live objects), by path.
    """
    plain, excluded = to_yaml_dict(config_obj), {}
    for path in list(_paths_without_a_form(plain)):
        *sections, last = path
        section, owner = plain, config_obj
        for name in sections:
            section = section[name]
            owner = owner[name] if isinstance(owner, Mapping) else getattr(owner, name)
        excluded[".".join(path)] = owner[last] if isinstance(owner, Mapping) else getattr(owner, last)
        del section[last]
    return OmegaConf.create(plain), excluded


def _paths_without_a_form(value: Any, path: tuple[str, ...] = ()) -> Iterable[tuple[str, ...]]:
    for key, item in value.items():
        if _is_section(item):
            yield from _paths_without_a_form(item, (*path, key))
        elif _lacks_a_form(item):
            yield (*path, key)


def _is_section(value: Any) -> TypeGuard[Mapping[str, Any]]:
    """Whether a value stands for a dataclass, not for a function, a dtype or a member of an enum."""
    return isinstance(value, Mapping) and "_target_" in value and "_args_" not in value and "_call_" not in value


def _lacks_a_form(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "_not_saved_" in value or any(map(_lacks_a_form, value.values()))
    return isinstance(value, list) and any(map(_lacks_a_form, value))


def parse_hydra_overrides(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Set options of an OmegaConf from texts as on Hydra's command lines.

    `key=value` sets what is there, `+key=value` and `++key=value` what may not be, `~key` removes. Types are checked by
    `apply_overrides`.

    Args:
        cfg: From `create_omegaconf_dict_config`; it isn't changed.
        overrides: The texts, applied in order.

    Raises:
        OverridesError: An override that can't be read or names nothing that is there.
    """
    cfg = copy.deepcopy(cfg)
    for override in overrides:
        try:
            action, key, text = split_override(override)
        except ValueError as error:
            raise OverridesError(str(error)) from None
        _check_key(cfg, action, key, override)
        if text is None:
            parent, _, last = key.rpartition(".")
            del (OmegaConf.select(cfg, parent) if parent else cfg)[last]
        else:
            OmegaConf.update(cfg, key, plain_value(text), force_add=True)
    return cfg


def _check_key(cfg: DictConfig, action: str, key: str, override: str) -> None:
    """Refuse a key that isn't there, unless it is one to add; a section that is None has all keys."""
    section: Any = cfg
    for name in key.split("."):
        if section is None and action != "~":
            return
        known = list(section) if isinstance(section, DictConfig) else []
        if name not in known:
            if action in ("+", "++") and isinstance(section, DictConfig):
                return
            hint = nearest(name, [str(one) for one in known if not str(one).startswith("_")])
            raise OverridesError(f"override {override!r}: there is no {key}; {hint}write +{key}=… to add one")
        section = section[name]


def apply_overrides(
    config_obj: Any, overrides_dict: Mapping[str, Any], excluded_fields: Mapping[str, Any] | None = None
) -> None:
    """Set those options of a configuration that a mapping has otherwise; the others aren't touched.

    Args:
        config_obj: A dataclass with sections; it is changed.
        overrides_dict: Options by section, all of them or some, in the form of `run_config.yaml`.
        excluded_fields: From `create_omegaconf_dict_config`: they keep their values, unless the mapping has them.

    Raises:
        ValueError: An unknown option or a value of the wrong type.
    """
    apply_mapping(config_obj, _differing(to_yaml_dict(config_obj), overrides_dict))


def _differing(current: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of `wanted` that `current` has otherwise: in a section one by one, of a dictionary all."""
    changed: dict[str, Any] = {}
    for key, value in wanted.items():
        now = current.get(key)
        if key in current and now == value and isinstance(now, bool) == isinstance(value, bool):
            continue
        if (
            _is_section(now)
            and isinstance(value, Mapping)
            and value.get("_target_", now["_target_"]) == now["_target_"]
        ):
            if differing := _differing(now, value):
                changed[key] = differing
        else:
            changed[key] = value
    return changed
