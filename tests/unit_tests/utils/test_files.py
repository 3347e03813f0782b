# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A file or directory is there in full or not at all, whatever happens while it is written."""

import os
import stat

import pytest

from megatron.bridge.utils.files import atomic_write, check_writable_directory, replaced_directory, use_umask


def names_in(directory):
    return sorted(entry.name for entry in directory.iterdir())


@pytest.mark.parametrize(("mode", "content"), [("w", "zwölf\n"), ("wb", b"\x00\xff")])
def test_atomic_write_replaces_the_file(tmp_path, mode, content):
    path = tmp_path / "deep" / "file"
    for written in (content * 3, content):
        with atomic_write(path, mode) as file:
            file.write(written)
    assert path.read_bytes() == (content if mode == "wb" else content.encode("utf-8"))
    assert names_in(path.parent) == ["file"]


def test_atomic_write_shows_the_old_file_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with atomic_write(path) as file:
        file.write("new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(error), atomic_write(path) as file:
        file.write("half")
        raise error()
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["file"]


def test_replaced_directory_takes_the_old_ones_place(tmp_path):
    path = tmp_path / "directory"
    path.mkdir()
    (path / "stale").touch()
    with replaced_directory(path) as beside:
        (beside / "fresh").touch()
        assert names_in(path) == ["stale"]
    assert names_in(path) == ["fresh"]
    assert names_in(tmp_path) == ["directory"]


def test_a_failed_replacement_leaves_the_old_directory(tmp_path):
    path = tmp_path / "directory"
    path.mkdir()
    (path / "kept").touch()
    with pytest.raises(RuntimeError, match="disk full"), replaced_directory(path) as beside:
        (beside / "half").touch()
        raise RuntimeError("disk full")
    assert names_in(path) == ["kept"]
    assert names_in(tmp_path) == ["directory"]


@pytest.mark.parametrize("kind", ["link", "dangling link", "file"])
def test_a_directory_takes_the_place_of_anything(tmp_path, kind):
    path, elsewhere = tmp_path / "here" / "directory", tmp_path / "elsewhere"
    path.parent.mkdir()
    if kind == "file":
        path.touch()
    else:
        path.symlink_to(elsewhere)
    if kind == "link":
        elsewhere.mkdir()
    with replaced_directory(path) as beside:
        (beside / "fresh").touch()
    assert not path.is_symlink() and names_in(path) == ["fresh"] and names_in(path.parent) == ["directory"]
    assert elsewhere.exists() == (kind == "link")


def test_check_writable_directory_makes_it_and_leaves_it_empty(tmp_path):
    check_writable_directory(tmp_path / "a" / "b", "checkpoint.save")
    assert names_in(tmp_path / "a" / "b") == []


@pytest.mark.parametrize("below", ["file", "file/deeper"])
def test_a_directory_that_cannot_be_is_refused_by_its_option(tmp_path, below):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="checkpoint.save='.*file.*' can't be written .*: name a directory"):
        check_writable_directory(tmp_path / below, "checkpoint.save")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="Permission denied"):
        check_writable_directory(tmp_path, "checkpoint.save")


@pytest.fixture(params=[0o077, 0o022, 0o002])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_permissions_are_what_the_umask_gives(tmp_path, umask):
    with atomic_write(tmp_path / "deep" / "file") as file:
        file.write("new")
    with replaced_directory(tmp_path / "directory") as beside:
        (beside / "private").touch(mode=0o600)
        use_umask(beside / "private")
    assert mode_of(tmp_path / "deep" / "file") == mode_of(tmp_path / "directory" / "private") == 0o666 & ~umask
    assert mode_of(tmp_path / "deep") == mode_of(tmp_path / "directory") == 0o777 & ~umask
    assert names_in(tmp_path / "directory") == ["private"] and names_in(tmp_path / "deep") == ["file"]


def test_a_directory_that_was_there_keeps_its_permissions(tmp_path):
    path = tmp_path / "directory"
    path.mkdir()
    path.chmod(0o750)
    for content in ("first", "second"):
        with replaced_directory(path) as beside:
            (beside / content).touch()
    assert mode_of(path) == 0o750 and names_in(path) == ["second"]
