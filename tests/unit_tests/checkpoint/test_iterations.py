# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Names, the tracker, which directory a path means, what is complete, what may go."""

import errno
import json
import os
import shutil

import pytest

from megatron.bridge.checkpoint import iterations
from megatron.bridge.checkpoint.iterations import Tracker


def write_iteration(root, iteration, *, release=False, without=()):
    """A directory that looks complete to `layout`, which reads no tensor."""
    directory = iterations.checkpoint_name(root, iteration, release=release)
    directory.mkdir(parents=True)
    content = {"metadata.json": json.dumps({"sharded_backend": "torch_dist"}), ".metadata": "", "__0_0.distcp": ""}
    for name, text in content.items():
        if name not in without:
            (directory / name).write_text(text)
    return directory


def iterations_left(root):
    return [iteration for iteration, _ in iterations.iterations(root)]


@pytest.mark.parametrize(
    ("iteration", "release", "name"),
    [(0, False, "iter_0000000"), (12, False, "iter_0000012"), (12345678, False, "iter_12345678"), (0, True, "release")],
)
def test_checkpoint_name(tmp_path, iteration, release, name):
    directory = iterations.checkpoint_name(tmp_path, iteration, release=release)
    assert directory == tmp_path / name
    assert iterations.iteration_of(directory) == (None if release else iteration)
    assert not iterations.is_iteration_directory(directory)
    directory.mkdir()
    assert iterations.is_iteration_directory(directory)


@pytest.mark.parametrize("name", ["iter_12", "iter_0000012x", "old_iter_0000012", ".iter_0000012.partial", "run"])
def test_other_names_are_no_iterations(tmp_path, name):
    assert iterations.iteration_of(tmp_path / name) is None


def test_a_run_that_is_called_release_is_a_root(tmp_path):
    root = tmp_path / "release"
    directory = write_iteration(root, 3)
    iterations.write_tracker(root, 3)
    assert iterations.resolve_checkpoint(root) == directory


@pytest.mark.parametrize(("iteration", "release", "text"), [(6, False, "6"), (0, True, "release")])
def test_tracker_round_trip(tmp_path, iteration, release, text):
    iterations.write_tracker(tmp_path, iteration, release=release)
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == text
    assert iterations.read_tracker(tmp_path) == Tracker(iteration, release)


def test_there_may_be_no_tracker(tmp_path):
    assert iterations.read_tracker(tmp_path) is None
    assert iterations.read_tracker(tmp_path / "nowhere") is None


@pytest.mark.parametrize("text", ["", "-3", "iter_3", "3.5"])
def test_a_damaged_tracker_is_refused(tmp_path, text):
    (tmp_path / iterations.TRACKER_FILE).write_text(text)
    with pytest.raises(ValueError, match=r"latest_\w+.txt holds .*: expected an iteration number.*; no complete"):
        iterations.read_tracker(tmp_path)
    write_iteration(tmp_path, 2)
    with pytest.raises(ValueError, match="expected an iteration number .*; write the newest complete one into it: 2"):
        iterations.read_tracker(tmp_path)


def test_resolve_the_trackers_iteration_or_the_one_asked_for(tmp_path):
    second, fourth = write_iteration(tmp_path, 2), write_iteration(tmp_path, 4)
    iterations.write_tracker(tmp_path, 2)
    assert iterations.resolve_checkpoint(tmp_path) == second, "the tracker's, not the newest"
    assert iterations.resolve_checkpoint(tmp_path, 4) == fourth
    assert iterations.resolve_checkpoint(str(fourth)) == fourth
    release = write_iteration(tmp_path, 0, release=True)
    iterations.write_tracker(tmp_path, 0, release=True)
    assert iterations.resolve_checkpoint(tmp_path) == release
    assert iterations.resolve_checkpoint(release) == release


def test_resolve_says_what_is_there_instead(tmp_path):
    write_iteration(tmp_path, 2)
    with pytest.raises(FileNotFoundError, match=r"checkpoint.load='.*' holds no checkpoint: .*txt is missing; name a"):
        iterations.resolve_checkpoint(tmp_path, option="checkpoint.load")
    iterations.write_tracker(tmp_path, 2)
    with pytest.raises(FileNotFoundError, match=r"has no iteration 3 \(checkpoint.ckpt_step\); there: 2; name one"):
        iterations.resolve_checkpoint(tmp_path, 3)
    iterations.write_tracker(tmp_path, 5)
    named = r"iter_0000005 .*: there is no such directory, though latest.*txt names it; complete iterations there: 2"
    with pytest.raises(ValueError, match=named):
        iterations.resolve_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("metadata.json", "metadata.json is missing: the save that wrote it did not finish"),
        (".metadata", "\\.metadata is missing"),
        ("__0_0.distcp", "it has no __\\*.distcp file"),
    ],
)
def test_a_half_written_iteration_is_refused(tmp_path, broken, message):
    directory = write_iteration(tmp_path, 2, without=[broken])
    iterations.write_tracker(tmp_path, 2)
    assert not iterations.is_complete(directory)
    with pytest.raises(ValueError, match=f"iter_0000002 .* is not a complete checkpoint: {message}"):
        iterations.resolve_checkpoint(tmp_path)
    assert iterations.checkpoint_exists(tmp_path) and iterations.checkpoint_exists(directory), "refused, not overlooked"


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"sharded_ba', "damaged"), ("[]", "damaged"), ('{"sharded_backend": "zarr"}', "its format is 'zarr'")],
)
def test_damaged_metadata_is_refused(tmp_path, text, message):
    directory = write_iteration(tmp_path, 2)
    assert iterations.is_complete(directory)
    (directory / "metadata.json").write_text(text)
    assert message in iterations.why_incomplete(directory)


def test_what_counts_as_a_checkpoint(tmp_path):
    assert not iterations.checkpoint_exists(None)
    assert not iterations.checkpoint_exists(tmp_path)
    directory = write_iteration(tmp_path, 2)
    assert not iterations.checkpoint_exists(tmp_path), "a save that was not committed"
    assert iterations.checkpoint_exists(directory)
    iterations.write_tracker(tmp_path, 2)
    assert iterations.checkpoint_exists(tmp_path)
    (tmp_path / "new" / "release").mkdir(parents=True)
    assert not iterations.checkpoint_exists(tmp_path / "new" / "release"), "an empty run that is called release"


def test_a_hugging_face_directory_has_a_config_and_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert not iterations.is_hf_directory(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert iterations.is_hf_directory(tmp_path)


@pytest.mark.parametrize(
    ("keep", "tracker", "left"),
    [(2, 8, [6, 8]), (1, 8, [8]), (1, 4, [4, 8]), (9, 8, [2, 4, 6, 8]), (0, 8, [2, 4, 6, 8]), (-1, 8, [2, 4, 6, 8])],
)
def test_prune_keeps_the_newest_and_the_trackers(tmp_path, keep, tracker, left):
    for iteration in (2, 4, 6, 8):
        write_iteration(tmp_path, iteration)
    iterations.write_tracker(tmp_path, tracker)
    removed = iterations.prune(tmp_path, keep)
    assert iterations_left(tmp_path) == left
    assert [iterations.iteration_of(path) for path in removed] == [step for step in (2, 4, 6, 8) if step not in left]


def test_prune_keeps_what_the_interval_divides(tmp_path):
    for iteration in (2, 4, 6, 8, 10):
        write_iteration(tmp_path, iteration)
    iterations.write_tracker(tmp_path, 10)
    iterations.prune(tmp_path, 1, retain_interval=4)
    assert iterations_left(tmp_path) == [4, 8, 10]


@pytest.mark.parametrize("keep", [1, 2])
def test_prune_never_removes_the_last_good_one(tmp_path, keep):
    """Whatever stands beside it: broken newer ones, an abandoned course's, a tracker that was never moved on."""
    write_iteration(tmp_path, 2)
    for iteration in (4, 6):
        write_iteration(tmp_path, iteration, without=["__0_0.distcp"])
    iterations.prune(tmp_path, keep)
    assert iterations.is_complete(iterations.checkpoint_name(tmp_path, 2)), "no tracker"
    iterations.write_tracker(tmp_path, 2)
    for iteration in (8, 10, 12):
        write_iteration(tmp_path, iteration)
    iterations.prune(tmp_path, keep)
    assert iterations.resolve_checkpoint(tmp_path) == iterations.checkpoint_name(tmp_path, 2), "the tracker's is older"
    iterations.write_tracker(tmp_path, 6)
    iterations.prune(tmp_path, keep)
    assert iterations.is_complete(iterations.checkpoint_name(tmp_path, 12)), "the tracker's is broken"


def test_of_an_iteration_that_is_a_link_the_link_is_pruned(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    moved = write_iteration(elsewhere, 2)
    for iteration in (4, 6):
        write_iteration(root, iteration)
    iterations.checkpoint_name(root, 2).symlink_to(moved)
    iterations.checkpoint_name(root, 3).symlink_to(tmp_path / "nowhere")
    iterations.checkpoint_name(root, 9).symlink_to(tmp_path / "nowhere")
    iterations.write_tracker(root, 6)
    assert [path.name for path in iterations.prune(root, 2)] == ["iter_0000002", "iter_0000003"]
    assert iterations_left(root) == [4, 6] and iterations.is_complete(moved), "what it pointed to stays"
    assert iterations.checkpoint_name(root, 9).is_symlink(), "newer than what is kept"


def test_what_an_earlier_version_left_of_a_link_is_cleared(tmp_path):
    root, moved = tmp_path / "root", write_iteration(tmp_path / "elsewhere", 2)
    write_iteration(root, 4)
    (root / ".iter_0000002.removed").symlink_to(moved)
    (root / ".iter_0000001.removed").symlink_to(tmp_path / "nowhere")
    (root / ".iter_0000003.saving").write_text("a file")
    iterations.clear_leftovers(root)
    assert iterations.leftovers(root) == [] and iterations.is_complete(moved)


def test_what_cannot_be_removed_is_a_warning_and_tried_again(tmp_path, monkeypatch, caplog):
    def busy(path):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    for iteration in (2, 4):
        write_iteration(tmp_path, iteration)
    iterations.write_tracker(tmp_path, 4)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        iterations.prune(tmp_path, 1)
        iterations.clear_leftovers(tmp_path)
        assert iterations_left(tmp_path) == [4]
        write_iteration(tmp_path, 2)
        assert iterations.prune(tmp_path, 1) == [] and iterations_left(tmp_path) == [2, 4]
    rest = tmp_path / ".iter_0000002.removed"
    said = f"{rest} is not needed any more and could not be removed ({os.strerror(errno.EBUSY)}): remove it by hand"
    assert len(caplog.messages) == 3 and all(message.startswith(said) for message in caplog.messages)
    iterations.clear_leftovers(tmp_path)
    assert not rest.exists() and len(caplog.messages) == 3


@pytest.mark.parametrize(
    ("step", "left", "tracker"), [(9, [2, 4, 6], 4), (6, [2, 4], 4), (4, [2], None), (3, [2], None)]
)
def test_forget_from_removes_a_step_and_later_ones(tmp_path, step, left, tracker):
    for iteration in (2, 4, 6):
        write_iteration(tmp_path, iteration)
    iterations.write_tracker(tmp_path, 4)
    iterations.remove_from_step(tmp_path, step)
    assert iterations_left(tmp_path) == left
    assert iterations.read_tracker(tmp_path) == (tracker and iterations.Tracker(tracker))


def test_forget_from_has_nothing_to_do_where_nothing_is(tmp_path):
    iterations.remove_from_step(tmp_path / "nowhere", 1)


def test_prune_touches_only_complete_iterations(tmp_path):
    write_iteration(tmp_path, 2)
    write_iteration(tmp_path, 4)
    write_iteration(tmp_path, 6, without=["metadata.json"])
    write_iteration(tmp_path, 0, release=True)
    copy = tmp_path / "copy_of_iter_0000002"
    write_iteration(tmp_path / "elsewhere", 2).rename(copy)
    iterations.write_tracker(tmp_path, 4)
    iterations.prune(tmp_path, 1)
    assert iterations_left(tmp_path) == [4, 6], "a broken save does not count as one to keep"
    assert copy.is_dir() and (tmp_path / "release").is_dir()


def test_a_tracker_that_names_an_earlier_iteration_than_the_newest(tmp_path):
    assert iterations.newer_than_tracker(tmp_path) == []
    directories = [write_iteration(tmp_path, iteration) for iteration in (2, 4, 6)]
    write_iteration(tmp_path, 8, without=[".metadata"])
    for named, later in ((8, []), (6, []), (2, directories[1:])):
        iterations.write_tracker(tmp_path, named)
        assert iterations.newer_than_tracker(tmp_path) == later
    iterations.write_tracker(tmp_path, 0, release=True)
    assert iterations.newer_than_tracker(tmp_path) == []
