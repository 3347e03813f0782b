# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Where the weights under adapters are, when the model that they were trained on has been moved."""

import pytest

from megatron.bridge.models.conversion.saved_adapters import SavedAdapters, check_base
from tests.rigs.hub import put_into_cache, use_hub


def write_model(directory):
    directory.mkdir()
    for name in ("config.json", "model.safetensors"):
        (directory / name).touch()
    return directory


@pytest.mark.parametrize("named", ["{model}", "model", "./model"])
def test_a_moved_model_is_found_where_it_is_said_to_be(tmp_path, named):
    moved, other = write_model(tmp_path / "moved"), write_model(tmp_path / "other")
    saved = SavedAdapters(tmp_path, None, named.format(model=tmp_path / "model"), str(tmp_path / "model"))
    assert check_base(saved, None, model=moved) == moved
    assert check_base(saved, other, model=moved) == other


def test_weights_may_be_a_hubs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    use_hub(monkeypatch, tmp_path / "hub")
    snapshot = put_into_cache(tmp_path / "hub", "some-org/Tiny-1B", write_model(tmp_path / "source"))
    saved = SavedAdapters(tmp_path, None, "some-org/Tiny-1B", "some-org/Tiny-1B")
    for base, model in ((None, None), (None, "some-org/Tiny-1B"), ("some-org/Tiny-1B", tmp_path / "source")):
        assert check_base(saved, base, model=model) == snapshot
    assert check_base(saved, None, model=tmp_path / "source") == tmp_path / "source"
    with pytest.raises(FileNotFoundError, match="'some-org/Other' is no directory, and the hub's cache"):
        check_base(saved, "some-org/Other", model=None)


def test_other_weights_than_the_models_are_not_replaced_by_it(tmp_path):
    """Adapters of a checkpoint that was finetuned itself don't fit the model that it came from."""
    moved = write_model(tmp_path / "moved")
    saved = SavedAdapters(tmp_path, None, str(tmp_path / "finetuned"), str(tmp_path / "model"))
    with pytest.raises(FileNotFoundError, match="finetuned, which hold neither a Megatron checkpoint nor"):
        check_base(saved, None, model=moved)
    write_model(tmp_path / "finetuned")
    assert check_base(saved, None, model=moved) == tmp_path / "finetuned"
