# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Objects to YAML and back: every kind of value, and nothing that isn't on the list."""

import dataclasses
import enum
import functools
import pathlib
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Optional, Union

import numpy as np
import pytest
import torch
from megatron.core.activations import squared_relu
from megatron.core.transformer.enums import AttnBackend
from megatron.core.utils import init_method_normal

from megatron.bridge.training.config import RNGConfig, TrainingConfig
from megatron.bridge.utils.targets import class_named, dtype_named, function_named, name_of
from megatron.bridge.utils.yaml_io import (
    ConfigFileError,
    dump_yaml,
    from_yaml_dict,
    load_yaml,
    parse_yaml,
    to_yaml_dict,
)


class Colour(enum.Enum):
    RED = "red"
    GREEN = "green"


@dataclass
class Inner:
    size: int = 1
    name: str | None = None


@dataclass
class Outer:
    inner: Inner = field(default_factory=Inner)
    maybe: Inner | None = None
    many: list[Inner] = field(default_factory=list)
    dtype: torch.dtype = torch.float32
    maybe_dtype: Optional[torch.dtype] = None  # noqa: UP045  as Core writes it
    activation: Callable[[torch.Tensor], torch.Tensor] = torch.nn.functional.gelu
    init: Optional[Callable] = None  # noqa: UP045
    backend: AttnBackend = AttnBackend.auto
    exit_signal: signal.Signals = signal.SIGTERM
    path: pathlib.Path | None = None
    text_or_path: str | pathlib.Path = ""
    pair: tuple[int, int] | None = None
    anything: Any = None
    table: dict[str, float] = field(default_factory=dict)
    choice: Literal["a", "b", 1] = "a"
    mixed: Union[int, list[int]] = 1  # noqa: UP007
    blend: tuple[list[str], list[float] | None] | None = None
    rate: float = 0.0
    derived: int = field(init=False, default=0)
    _private: int = 3


def round_trip(value: Any, **options: Any) -> Any:
    return from_yaml_dict(parse_yaml(dump_yaml(value)), expected=Outer, allow=[Outer, Inner], **options)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"inner": Inner(size=3, name="x"), "maybe": Inner(), "many": [Inner(2), Inner(3)]},
        {"dtype": torch.bfloat16, "maybe_dtype": torch.float8_e4m3fn},
        {"activation": torch.nn.functional.silu},
        {"activation": squared_relu},
        {"backend": AttnBackend.unfused, "exit_signal": signal.SIGUSR1},
        {"path": pathlib.Path("a/b"), "text_or_path": pathlib.Path("c")},
        {"text_or_path": "c", "pair": (1, 2), "blend": (["x", "y"], [0.5, 0.5])},
        {"anything": {"a": [1, None, {"b": torch.float16}], "c": Inner(4)}},
        {"table": {"a": 1e-5, "b": float("inf")}, "choice": 1, "mixed": [1, 2], "rate": 1e-300},
        {"inner": Inner(name="yes"), "anything": ["on", "1e-5", "null", "2026-01-01", "line\nbreak", "ü"]},
    ],
)
def test_round_trip(changes):
    before = Outer(**changes)
    after = round_trip(before)
    assert after == before
    assert [type(getattr(after, f.name)) for f in dataclasses.fields(after)] == [
        type(getattr(before, f.name)) for f in dataclasses.fields(before)
    ]


def test_a_bound_initialiser_round_trips():
    after = round_trip(Outer(init=init_method_normal(0.02)))
    assert isinstance(after.init, functools.partial)
    assert after.init.func is torch.nn.init.normal_
    assert after.init.keywords == {"mean": 0.0, "std": 0.02}


def test_the_forms_of_special_values():
    assert to_yaml_dict(torch.bfloat16) == {"_target_": "torch.bfloat16", "_call_": False}
    assert to_yaml_dict(torch.nn.functional.gelu) == {"_target_": "torch.nn.functional.gelu", "_call_": False}
    assert to_yaml_dict(AttnBackend.flash) == {
        "_target_": "megatron.core.transformer.enums.AttnBackend",
        "_args_": [AttnBackend.flash.value],
        "_name_": "flash",
    }
    assert to_yaml_dict(pathlib.Path("a")) == {"_target_": "pathlib.Path", "_args_": ["a"]}
    assert to_yaml_dict((np.float64(0.5), np.int64(2).item())) == [0.5, 2]
    saved = to_yaml_dict(Outer())
    assert "derived" not in saved and "_private" not in saved


def test_the_forms_that_megatron_bridge_writes_are_read():
    written = {
        "_target_": "megatron.core.transformer.enums.AttnBackend",
        "_call_": True,
        "_args_": [AttnBackend.fused.value],
    }
    assert from_yaml_dict(written) is AttnBackend.fused
    partial = {"_target_": "torch.nn.init.normal_", "_partial_": True, "_args_": [], "mean": 0.0, "std": 0.1}
    assert from_yaml_dict(partial).keywords == {"mean": 0.0, "std": 0.1}
    assert from_yaml_dict({"_target_": "megatron.bridge.training.config.RNGConfig", "seed": 5}) == RNGConfig(seed=5)


def test_a_class_of_another_version_is_read_as_the_expected_one_only_on_request(caplog):
    saved = {"_target_": "megatron.bridge.training.llama.OtherRNGConfig", "seed": 5, "other": 1}
    with pytest.raises(ConfigFileError, match="OtherRNGConfig"):
        from_yaml_dict(saved, expected=RNGConfig)
    with pytest.raises(ConfigFileError, match="OtherRNGConfig"):
        from_yaml_dict(saved, strict=False)  # nothing is expected
    assert from_yaml_dict(saved, expected=RNGConfig, strict=False) == RNGConfig(seed=5)
    assert "read as a RNGConfig" in caplog.text and "config.other is unknown" in caplog.text
    with pytest.raises(ConfigFileError, match="os.system"):  # functions have no stand-in
        from_yaml_dict({"activation": {"_target_": "os.system", "_call_": False}}, expected=Outer, strict=False)


def test_layer_specs_may_be_named_where_megatron_bridge_has_them():
    written = {"_target_": "megatron.bridge.models.gpt_provider.default_layer_spec", "_call_": False}
    assert callable(from_yaml_dict(written))


def test_a_mapping_becomes_the_dataclass_that_is_expected():
    read = from_yaml_dict({"inner": {"size": 4}, "many": [{"size": 5}], "dtype": "bf16"}, expected=Outer)
    assert read == Outer(inner=Inner(4), many=[Inner(5)], dtype=torch.bfloat16)


EVIL = [
    "os.system",
    "builtins.eval",
    "builtins.exec",
    "subprocess.Popen",
    "subprocess.run",
    "torch.load",
    "torch.hub.load",
    "torch.nn.Linear",
    "torch.nn.functional.torch.hub.load",
    "torch.nn.functional.importlib.import_module",
    "megatron.core.utils.importlib.import_module",
    "megatron.core.transformer.spec_utils.import_module",
    "megatron.core.transformer.spec_utils.build_module",
    "megatron.bridge.utils.files.os.system",
    "megatron.bridge.utils.yaml_io.load_yaml",
    "megatron.bridge.training.config.os",
    "megatron.bridge.training.pretrain.pretrain",
    "megatron.bridge.models.layer_specs.logging.disable",
    "megatron.bridge.convert.main",
    "this.antigravity",
    "pickle.loads",
    "RNGConfig",
    "",
    "..",
]


@pytest.mark.parametrize("form", [{}, {"_call_": False}, {"_call_": True}, {"_partial_": True}, {"_args_": ["echo"]}])
@pytest.mark.parametrize("name", EVIL)
def test_an_unlisted_name_is_neither_imported_nor_called(name, form):
    modules = set(sys.modules)
    with pytest.raises(ConfigFileError) as error:
        from_yaml_dict({"outer": {"inner": [{"_target_": name, **form}]}}, where="file.yaml")
    assert str(error.value).startswith(f"file.yaml.outer.inner[0]._target_ is {name}: expected")
    assert "\n" not in str(error.value)
    assert not {added for added in set(sys.modules) - modules if not added.startswith("megatron.bridge.")}


def test_a_module_is_not_imported_because_a_file_names_it(tmp_path, monkeypatch):
    (tmp_path / "innocent_looking.py").write_text(
        "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\nclass Config: pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for form in ({}, {"_call_": False}, {"_partial_": True}):
        with pytest.raises(ConfigFileError, match="innocent_looking.Config"):
            from_yaml_dict({"_target_": "innocent_looking.Config", **form})
    assert not (tmp_path / "ran").exists()
    assert "innocent_looking" not in sys.modules


def test_a_target_that_is_no_name_is_refused():
    for target in (3, ["os", "system"], {"a": 1}):
        with pytest.raises(ConfigFileError, match="_target_ is .*expected the name of a class"):
            from_yaml_dict({"_target_": target})


@dataclass
class ScriptTrainingConfig(TrainingConfig):
    extra: int = 1


def test_a_scripts_own_class_may_be_named_if_it_extends_ours_and_is_there_already():
    before = ScriptTrainingConfig(micro_batch_size=1, extra=5)
    saved = to_yaml_dict(before)
    assert saved["_target_"] == f"{__name__}.ScriptTrainingConfig"
    assert from_yaml_dict(saved) == before
    with pytest.raises(ConfigFileError, match="Inner"):  # a dataclass, but nobody's configuration
        from_yaml_dict(to_yaml_dict(Inner()))
    assert from_yaml_dict(to_yaml_dict(Inner(7)), allow=[Inner]) == Inner(7)


def test_what_has_no_name_is_not_saved_and_reading_says_so(caplog):
    class Local:
        pass

    for value in (lambda x: x, Local(), [].append, torch.zeros(2)):
        saved = to_yaml_dict(Outer(anything=value))
        assert list(saved["anything"]) == ["_not_saved_"]
        with pytest.raises(ConfigFileError, match="config.anything was .*set it in Python"):
            from_yaml_dict(saved, allow=[Outer, Inner])
        assert from_yaml_dict(saved, allow=[Outer, Inner], strict=False) == Outer()
    assert "config.anything was" in caplog.text and "left at its default" in caplog.text


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"inner": {"sise": 3}}, r"config.inner.sise is unknown: did you mean size\? Inner has no such field"),
        ({"inner": {"size": "three"}}, r"config.inner.size is three \(str\): expected int"),
        ({"inner": 3}, r"config.inner is 3 \(int\): expected Inner"),
        ({"many": [{"size": 1}, {"size": 1.5}]}, r"config.many\[1\].size is 1.5 \(float\): expected int"),
        ({"dtype": "bfloat61"}, "config.dtype is bfloat61 .*expected a dtype such as bfloat16"),
        ({"choice": "c"}, "config.choice is c .*expected one of a, b, 1"),
        ({"choice": True}, "config.choice is True"),
        ({"pair": [1, 2, 3]}, "config.pair is .*expected tuple of int, int or null"),
        (
            {"backend": {"_target_": "megatron.core.transformer.enums.AttnBackend", "_args_": [99]}},
            "config.backend is 99",
        ),
        ({"table": {"a": "b"}}, "config.table is .*expected dict of text, float"),
    ],
)
def test_a_value_that_does_not_fit_says_where(value, message):
    with pytest.raises(ConfigFileError, match=message) as error:
        from_yaml_dict(value, expected=Outer)
    assert "\n" not in str(error.value)


def test_numbers_and_booleans_are_those_of_yaml_1_2():
    parsed = parse_yaml("[1e-5, 1.0e-5, -2E+3, 3, 0.5, .inf, true, False, yes, off, null, ~, 1_000]")
    assert parsed == [1e-5, 1e-5, -2000.0, 3, 0.5, float("inf"), True, False, "yes", "off", None, None, 1000]
    assert parse_yaml("[010, 1:30, 0x10, -7, +7, 0]") == ["010", "1:30", 16, -7, 7, 0]


def test_a_key_that_comes_twice_is_refused_and_a_merge_is_no_second_one(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("train:\n  train_iters: 3\n  train_iters: 4\n")
    with pytest.raises(
        ConfigFileError, match=r"twice.yaml isn't .*: train_iters comes twice, on lines 2 and 3; correct"
    ):
        load_yaml(path)
    merged = parse_yaml("a: &a {x: 1, y: 1}\nb: {<<: *a, x: 2}")
    assert merged == {"a": {"x": 1, "y": 1}, "b": {"x": 2, "y": 1}}


def test_yaml_tags_that_make_objects_are_refused(tmp_path):
    path = tmp_path / "evil.yaml"
    path.write_text("a: !!python/object/apply:os.system ['touch ran']\n")
    with pytest.raises(ConfigFileError, match=r"evil.yaml isn't readable YAML.*line 1"):
        load_yaml(path)


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.yaml: no such file"):
        load_yaml(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1, 2\nb: 3\n")
    with pytest.raises(ConfigFileError, match=r"broken.yaml isn't readable YAML: .*line 2") as error:
        load_yaml(tmp_path / "broken.yaml")
    assert "\n" not in str(error.value)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigFileError, match="binary.yaml isn't readable YAML"):
        load_yaml(tmp_path / "binary.yaml")


def test_names():
    assert name_of(TrainingConfig) == "megatron.bridge.training.config.TrainingConfig"
    assert name_of(torch.nn.functional.silu) == "torch.nn.functional.silu"
    assert name_of(lambda: 0) is None
    assert (dtype_named("bf16"), dtype_named("torch.float32"), dtype_named("nn"), dtype_named("load")) == (
        torch.bfloat16,
        torch.float32,
        None,
        None,
    )
    assert function_named("torch.nn.functional.silu") is torch.nn.functional.silu
    assert function_named("torch.nn.functional.linear") is None
    assert class_named("megatron.bridge.training.config.TrainingConfig") is TrainingConfig
    assert class_named("megatron.bridge.training.no_such_module.X") is None
    assert class_named("megatron.core.optimizer.OptimizerConfig") is not None
