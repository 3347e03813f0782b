# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
import json
import threading

import pytest

from megatron.bridge.utils import hf_hub
from megatron.bridge.utils.hf_hub import find_hf_directory, is_hub_name
from tests.rigs.hub import COMMIT, put_into_cache, running_hub, use_hub

NAME = "some-org/Tiny-1B"
WEIGHTS = "model.safetensors"


@pytest.fixture
def model(tmp_path):
    """A directory with files of a model's names."""
    directory = tmp_path / "source"
    directory.mkdir()
    (directory / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (directory / "tokenizer.json").write_text("{}")
    (directory / WEIGHTS).write_bytes(b"weights" * 100)
    (directory / "pytorch_model.bin").write_bytes(b"pickled")
    (directory / "modeling_evil.py").write_text("1 / 0")
    return directory


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache in which everything is looked for, offline; the working directory is empty too."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    use_hub(monkeypatch, tmp_path / "hub")
    return tmp_path / "hub"


@pytest.fixture
def hub(cache, model, monkeypatch):
    """A hub that has the model, and is asked."""
    with running_hub() as hub:
        hub.put(NAME, model)
        use_hub(monkeypatch, cache, hub.url)
        yield hub


def refusal(*args, error=FileNotFoundError, **options):
    with pytest.raises(error) as raised:
        find_hf_directory(*args, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("Qwen/Qwen3-0.6B", True),
        ("gpt2", True),
        ("/models/Qwen3", False),
        ("./Qwen3", False),
        ("~/Qwen3", False),
        ("a/b/c", False),
        ("../x", False),
        ("org/", False),
        ("a b", False),
        ("", False),
    ],
)
def test_names_and_paths(name, is_one, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_name(name) is is_one


def test_a_cached_model_is_found_offline(cache, model):
    snapshot = put_into_cache(cache, NAME, model)
    assert find_hf_directory(NAME) == find_hf_directory(NAME, revision=COMMIT) == snapshot


def test_a_directory_of_that_name_goes_first(cache, model, tmp_path):
    put_into_cache(cache, NAME, model)
    (tmp_path / "here" / NAME).mkdir(parents=True)
    assert str(find_hf_directory(NAME)) == NAME


def test_beside_other_directories_it_is_a_path_unless_it_is_cached(cache, hub, model, tmp_path):
    (tmp_path / "here" / "some-org").mkdir()
    assert "the directory 'some-org' here makes it a path" in refusal(NAME)
    assert not hub.requests
    assert put_into_cache(cache, NAME, model) == find_hf_directory(NAME)


def test_what_is_not_cached_says_where_it_was_looked_for_and_what_to_do(cache, model):
    put_into_cache(cache, NAME, model)
    said = refusal("some-org/Tiny-1b")
    assert f"'some-org/Tiny-1b' is no directory, and the hub's cache in {cache} doesn't have it" in said
    assert (
        "HF_HUB_OFFLINE" in said
        and "`hf download some-org/Tiny-1b`" in said
        and "did you mean 'some-org/Tiny-1B'" in said
    )
    assert "at revision 'v2' (HF_HUB_OFFLINE" in refusal(NAME, revision="v2")
    assert "local_files_only forbids" in refusal("else/where", local_files_only=True)


def test_an_incomplete_copy_names_what_it_lacks(cache, model):
    (model / WEIGHTS).unlink()
    shards = {f"layer.{number}": f"model-0000{number}-of-00002.safetensors" for number in (1, 2)}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (model / shards["layer.1"]).write_bytes(b"weights")
    snapshot = put_into_cache(cache, NAME, model)
    said = refusal(NAME)
    assert f"lacks {shards['layer.2']} (HF_HUB_OFFLINE" in said and f"`hf download {NAME}`" in said
    assert find_hf_directory(NAME, with_weights=False) == snapshot
    (snapshot / "config.json").resolve().unlink()
    assert "lacks config.json" in refusal(NAME)


def test_a_model_is_fetched_once_with_what_is_needed(cache, hub, model):
    (model / "consolidated.safetensors").write_bytes(b"the weights again")
    hub.put(NAME, model)
    directory = find_hf_directory(NAME, with_weights=False)
    assert directory == cache / "models--some-org--Tiny-1B" / "snapshots" / COMMIT
    assert sorted(hub.fetched()) == ["config.json", "tokenizer.json"]
    hub.requests.clear()
    assert find_hf_directory(NAME) == find_hf_directory(NAME, with_weights=False) == directory
    assert hub.fetched() == [WEIGHTS] and (directory / WEIGHTS).read_bytes() == b"weights" * 100
    num_requests = len(hub.requests)
    find_hf_directory(NAME)
    assert len(hub.requests) == num_requests


def test_of_several_that_ask_at_once_one_fetches(cache, hub, monkeypatch):
    def find():
        monkeypatch.setattr(hf_hub, "_found", {})  # as in processes of their own
        found.append(find_hf_directory(NAME))

    found: list = []
    threads = [threading.Thread(target=find) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == 4 and len(set(found)) == 1
    assert sorted(hub.fetched()) == ["config.json", WEIGHTS, "tokenizer.json"]


def test_a_file_that_was_damaged_on_its_way_is_removed(cache, hub):
    hub.damaged.add(WEIGHTS)
    assert f"a file of '{NAME}' was damaged on its way (SHA-256" in refusal(NAME, error=ValueError)
    hub.damaged.clear()
    assert (find_hf_directory(NAME) / WEIGHTS).read_bytes() == b"weights" * 100


def test_what_the_hub_refuses_is_one_line(cache, hub, model):
    said = refusal("some-org/no-such")
    assert f"{hub.url}/some-org/no-such isn't there, or is private: correct the name" in said and "HF_TOKEN" in said
    assert "has no revision 'v9'" in refusal(NAME, revision="v9")
    assert "fetching it from the hub failed (" in refusal("some-org/ends-with.git")  # which no name may
    hub.put("some-org/gated", model)
    hub.gated.add("some-org/gated")
    said = refusal("some-org/gated")
    assert f"accept them at {hub.url}/some-org/gated, then set HF_TOKEN or run `hf auth login`" in said


def test_a_hub_that_is_not_reached(cache, model, monkeypatch):
    use_hub(monkeypatch, cache, "http://127.0.0.1:9")
    said = refusal(NAME)
    assert "fetching it from the hub failed" in said and str(cache) in said and f"`hf download {NAME}`" in said
    assert put_into_cache(cache, NAME, model) == find_hf_directory(NAME)
