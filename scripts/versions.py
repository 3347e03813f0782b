# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Print what a test run uses: versions, where Megatron-Core and this package come from, and the device.

Arguments are names of further modules that must be there: `python scripts/versions.py pytest omegaconf`. If something
is missing, it ends with status 1 and one line.
"""

import importlib.metadata
import importlib.util
import platform
import runpy
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "megatron" / "bridge"


def folder_of(module: str) -> Path | None:
    """Where a package would be imported from; it is not imported, which for Megatron-Core takes seconds."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def version_of(distribution: str) -> str:
    """An installed distribution's version, or `none`."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def problem(modules: list[str]) -> str | None:
    """Why the tests can't run, in one line, or None."""
    missing = [name for name in ["torch", "megatron.core", *modules] if folder_of(name) is None]
    if missing:
        return f"{', '.join(missing)}: not importable by {sys.executable}: install it there or choose another PYTHON"
    if folder_of("megatron.bridge") != PACKAGE:
        return f"megatron.bridge would come from {folder_of('megatron.bridge')}, not from {PACKAGE}: set PYTHONPATH=src"
    return None


def main() -> None:
    """Print, or end with what is missing."""
    found = problem(sys.argv[1:])
    if found is not None:
        sys.exit(f"error: {found}")
    import torch

    core = folder_of("megatron.core")
    core_version = runpy.run_path(str(core / "package_info.py"))["__version__"]
    print(f"python {platform.python_version()} ({sys.executable})")
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}")
    print(f"megatron-core {core_version} ({core})")
    print(f"transformer-engine {version_of('transformer-engine')}, apex {version_of('apex')}")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    print(f"devices: {', '.join(names) or 'no CUDA device: the simulated accelerator'}", flush=True)


if __name__ == "__main__":
    main()
