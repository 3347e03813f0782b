# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Strangers' checkpoints run nothing, lead nowhere and don't become huge; a damaged file is named, or has no effect.

Each goes through `load_checkpoint` and `inspect`. `test_hostile_input.py` shows that the payloads are live.
"""

import dataclasses
import pickle
import shutil

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from tests.rigs.damages import MODES, STEP, Rig, try_damages
from tests.rigs.hostile import DOUBLED, YAML_BOMBS, Payload, repacked, torch_saved
from tests.rigs.ranks import run_on_ranks

ITERATION = f"iter_{STEP:07d}"
MOST_BYTES = 512 << 20
"""By how much refusing a checkpoint may raise the memory of its process."""
DAMAGES = 15


def _replaces(name, make):
    return lambda directory, mark: (directory / name).write_bytes(make(mark))


def _adds_to(name):
    def spoil(directory, mark):
        path = directory / name
        torch.save({**torch.load(path, weights_only=False), "more": Payload(mark)}, path)

    return spoil


def _stored_as(make, choose):
    """Append a blob to a file and let the description say that it is what `choose` picks by its key."""

    def spoil(directory, mark):
        metadata = FileSystemReader(directory).read_metadata()
        found = [index for index in metadata.storage_data if choose(index.fqn)]
        assert found, list(metadata.storage_data)
        for index in found:
            part = metadata.storage_data[index]
            with open(directory / part.relative_path, "ab") as file:
                moved = dataclasses.replace(part, offset=file.tell(), length=len(make(mark)))
                file.write(make(mark))
            metadata.storage_data[index] = moved
        (directory / ".metadata").write_bytes(pickle.dumps(metadata))

    return spoil


def _describes(change):
    def spoil(directory, mark):
        metadata = FileSystemReader(directory).read_metadata()
        change(metadata, mark)
        (directory / ".metadata").write_bytes(pickle.dumps(metadata))

    return spoil


def _leads_to(place):
    def change(metadata, mark):
        for index, part in metadata.storage_data.items():
            metadata.storage_data[index] = dataclasses.replace(part, relative_path=place)

    return change


def _object(mark):
    return torch_saved([{"more": Payload(mark)}])


def _in_config(text):
    return lambda directory, mark: (directory / "run_config.yaml").write_text(text.format(mark=mark))


RUNS_NOTHING = "which is not plain data, and nothing of the file was executed"
CHECKPOINTS = {
    "pickle in train_state.pt": (_adds_to("train_state.pt"), f"names posix.mkdir, {RUNS_NOTHING}"),
    "pickle in the common state": (
        lambda directory, mark: (
            _adds_to("common.pt")
            if (directory / "common.pt").exists()
            else _stored_as(_object, lambda key: key.startswith("common_state"))
        )(directory, mark),
        f"names posix.mkdir, {RUNS_NOTHING}",
    ),
    "pickle in the random states": (
        _stored_as(_object, lambda key: key.startswith("rng_state")),
        f"names posix.mkdir, {RUNS_NOTHING}",
    ),
    "pickle in the optimizer": (
        _stored_as(_object, lambda key: key.startswith("optimizer.") and "/shard_" in key),
        f"names posix.mkdir, {RUNS_NOTHING}",
    ),
    "pickle in place of a weight": (
        _stored_as(lambda mark: torch_saved(Payload(mark)), lambda key: key.endswith("word_embeddings.weight")),
        ".distcp can't be read: ",
    ),
    "pickle in .metadata": (
        _describes(lambda metadata, mark: setattr(metadata, "planner_data", Payload(mark))),
        f"names posix.mkdir, {RUNS_NOTHING}",
    ),
    "a bare pickle as .metadata": (
        _replaces(".metadata", lambda mark: pickle.dumps(Payload(mark))),
        f"names posix.mkdir, {RUNS_NOTHING}",
    ),
    ".metadata leads up": (_describes(_leads_to("../../secret")), "it names '../../secret', which is no file beside"),
    ".metadata leads away": (_describes(_leads_to("/dev/zero")), "it names '/dev/zero', which is no file beside it"),
    "manifest.json leads up": (
        _replaces("manifest.json", lambda _: b'{"algorithm": "crc32", "files": {"../../secret": [1, "0"]}}'),
        "manifest.json names '../../secret': expected files below",
    ),
    "the tracker leads up": (
        _replaces("../latest_checkpointed_iteration.txt", lambda _: b"../../secret"),
        "holds '../../secret': expected an iteration number",
    ),
    "python in run_config.yaml": (
        _in_config("model: !!python/object/apply:os.mkdir ['{mark}']"),
        "run_config.yaml can't be read: expected plain YAML",
    ),
    "a _target_ in run_config.yaml": (
        _in_config("model: {{_target_: os.mkdir, path: '{mark}'}}\ncheckpoint: {{_target_: os.system}}"),
        None,  # read as data alone: no name in it counts
    ),
    "a bomb in train_state.pt that inflates": (
        _replaces("train_state.pt", lambda _: repacked(torch_saved({}), compression=8)),
        "'archive/data.pkl' in it is compressed, which torch and NumPy don't do",
    ),
    "a bomb in train_state.pt of lists": (
        _replaces("train_state.pt", lambda _: repacked(torch_saved({}), data=DOUBLED)),
        "bytes stand for 2.31e+18 values: its parts are named again and again",
    ),
    **{
        f"a bomb in run_config.yaml of {name}": (
            lambda directory, _, text=text: (directory / "run_config.yaml").write_text(text),
            "run_config.yaml can't be read: expected plain YAML",
        )
        for name, text in YAML_BOMBS.items()
    },
}


def load_hostile_checkpoints(directory):
    """(error or "", bytes that it raised the peak by) of each, and of looking into it; on one rank."""
    from megatron.bridge.checkpoint.__main__ import main as inspect_checkpoint
    from megatron.bridge.utils.device import peak_memory_bytes

    rig = Rig(directory)
    (rig.root / ITERATION / "manifest.json").unlink()  # a stranger would write a right one
    shutil.copytree(rig.root, directory / "whole")
    answers = {}
    for name, (spoil, _) in CHECKPOINTS.items():
        shutil.rmtree(rig.root)
        shutil.copytree(directory / "whole", rig.root)
        spoil(rig.root / ITERATION, directory / "it ran")
        before, error = peak_memory_bytes(), ""
        try:
            rig.load()
        except (ValueError, FileNotFoundError) as refusal:
            error = str(refusal)
        inspect_checkpoint(["inspect", str(rig.root)])
        answers[name] = error, peak_memory_bytes() - before, (directory / "it ran").exists()
    return answers


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    return run_on_ranks(load_hostile_checkpoints, 1, tmp_path_factory.mktemp("hostile"))[0]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint(answers, name):
    error, grown_bytes, ran = answers[name]
    expected = CHECKPOINTS[name][1]
    assert not ran
    assert (expected or "") in error and "\n" not in error and bool(error) == bool(expected)
    assert grown_bytes < MOST_BYTES


def damage_a_checkpoint(directory, seed):
    rig = Rig(directory)
    return {mode: try_damages(rig, damages=DAMAGES, seed=seed, mode=mode) for mode in MODES}


def test_a_damaged_file_is_named_or_without_effect(tmp_path):
    (tallies,) = run_on_ranks(damage_a_checkpoint, 1, tmp_path, 11)
    assert all(tally.loads == DAMAGES for tally in tallies.values())
    assert tallies["as it is"].refused > DAMAGES / 2 and not tallies["as it is"].unnoticed
