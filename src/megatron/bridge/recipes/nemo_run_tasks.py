# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What NeMo-Run starts: a script with its arguments, or a function; here or on Slurm."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.bridge.recipes.nemo_run_import import import_nemo_run

QUIET_TORCHRUN = {"LOGLEVEL": "WARNING"}
"""torchrun prints 40 lines about itself otherwise."""


@dataclass(frozen=True, kw_only=True)
class SlurmOptions:
    """What a Slurm job asks for. None leaves the directive out."""

    account: str
    """Account that is charged."""

    partition: str | None = None
    """Partition of the cluster."""

    time: str = "01:00:00"
    """Time limit, as Slurm writes it."""

    nodes: int = 1
    """Number of machines."""

    num_processes: int = 1
    """Ranks on each machine."""

    gpus_per_node: int | None = None
    """GPUs on each machine."""

    cpus_per_task: int | None = None
    """Cores for the one task on each machine, torchrun."""

    mem: str | None = None
    """Host memory of a machine; "0" is all of it."""

    qos: str | None = None
    """Quality of service."""

    exclusive: bool = False
    """Share the machines with no other job."""

    parameters: Mapping[str, str] = field(default_factory=dict)
    """More directives of sbatch: {"constraint": "a100"}."""

    container_image: str | None = None
    """Image for pyxis. None: the machines' own software."""

    container_mounts: Sequence[str] = ()
    """Mounts of the container, FROM:TO."""

    workdir: str | None = None
    """Folder that the job runs in. None: this one; the packaged repository with the packager "git"."""

    packager: str = "none"
    """How code gets there: "none" (a shared file system, or in the image) or "git" (an archive of HEAD)."""

    ssh: str | None = None
    """USER@HOST of the login node. None: this machine is one."""

    ssh_identity: str | None = None
    """File with the private key. None: as ssh finds it."""

    remote_directory: str | None = None
    """Folder on the cluster for experiments, with `ssh`."""


def script_task(path: str, arguments: Sequence[str], *, executor: Any) -> Any:
    """A `run.Script` that hands a Python script its arguments as they are, whatever characters are in them.

    Args:
        path: The script.
        arguments: Its arguments.
        executor: Where it will run; see `keep_arguments`.
    """
    task = import_nemo_run().Script(path=path, entrypoint="python", args=list(arguments))
    keep_arguments(task, executor)
    return task


def keep_arguments(task: Any, executor: Any) -> None:
    """See to it that a script gets `[0,1]`, not `'[0,1]'`, and is found, under a LocalExecutor with torchrun.

    NeMo-Run 0.11 quotes the script's path and its arguments for a shell, and starts torchrun without one. Here a line
    of shell takes the quotes off again. Elsewhere, and where nothing needs quotes, the task stays as it is.

    Args:
        task: A `run.Script` that runs a Python script; it may be changed.
        executor: Where it will run.

    Raises:
        ValueError: NeMo-Run's folder, where that line is written, needs quotes itself.
    """
    run = import_nemo_run()
    is_here = isinstance(executor, run.LocalExecutor) and executor.launcher is not None
    if not is_here or task.inline or all(text == shlex.quote(text) for text in (task.path, *task.args)):
        return
    check_is_unquoted("--home (NEMORUN_HOME)", nemo_run_home())
    interpreter = sys.executable if task.entrypoint == "python" else task.entrypoint
    module = " -m" if task.m else ""
    task.inline = f'{_UNQUOTE}exec {shlex.quote(interpreter)}{module} {shlex.quote(task.path)} "$@"\n'
    task.path, task.m, task.entrypoint = "", False, "bash"


_UNQUOTE = 'eval "set -- $*"\n'


def check_is_unquoted(option: str, path: str) -> None:
    """Refuse a folder whose name a shell would take apart, where NeMo-Run doesn't quote it, or quotes it twice.

    Raises:
        ValueError: Naming the option.
    """
    if path != shlex.quote(path):
        raise ValueError(
            f"{option} {path}: NeMo-Run can't start a job in a folder whose name has a space, a quote or a $; "
            "name another"
        )


def takes_arguments(task: Any) -> bool:
    """Whether a `run.Script` hands its `args` on: an inline script of the user's own doesn't."""
    return not task.inline or task.inline.startswith(_UNQUOTE)


def local_executor(num_processes: int, *, env: Mapping[str, str]) -> Any:
    """A torchrun on this machine.

    Args:
        num_processes: Number of ranks.
        env: Environment variables, besides those of this process.

    Raises:
        FileNotFoundError: There is no torchrun.
    """
    beside = os.path.dirname(sys.executable)
    path = os.pathsep.join([beside, env.get("PATH", os.environ.get("PATH", ""))])
    if shutil.which("torchrun", path=path) is None:
        raise FileNotFoundError(f"torchrun is neither in {beside} nor on PATH: install torch in this environment")
    variables = {**QUIET_TORCHRUN, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), **env, "PATH": path}
    return import_nemo_run().LocalExecutor(ntasks_per_node=num_processes, launcher="torchrun", env_vars=variables)


def slurm_executor(options: SlurmOptions, *, env: Mapping[str, str]) -> Any:
    """A torchrun on each machine of a Slurm job.

    Args:
        options: What the job asks for.
        env: Environment variables of the job.

    Raises:
        ValueError: Options that don't go together.
    """
    run = import_nemo_run()
    check_slurm_options(options)
    workdir = options.workdir or (os.getcwd() if options.packager == "none" else None)
    mounts = list(options.container_mounts)
    if options.container_image and options.workdir is None and workdir is not None:
        mounts.append(f"{workdir}:{workdir}")
    directory_option = "--container-workdir" if options.container_image else "--chdir"
    return run.SlurmExecutor(
        account=options.account,
        partition=options.partition,
        time=options.time,
        nodes=options.nodes,
        ntasks_per_node=options.num_processes,
        gpus_per_node=options.gpus_per_node,
        cpus_per_task=options.cpus_per_task,
        mem=options.mem,
        qos=options.qos,
        exclusive=True if options.exclusive else None,  # False would be written as --exclusive=False
        additional_parameters=dict(options.parameters) or None,
        # NeMo-Run writes what follows without quotes.
        container_image=shlex.quote(options.container_image) if options.container_image else None,
        container_mounts=[shlex.quote(mount) for mount in mounts],
        # NeMo-Run starts jobs in its own folder for code; of a repeated option, srun takes the last.
        srun_args=[f"{directory_option}={shlex.quote(workdir)}"] if workdir else None,
        tunnel=_tunnel(options),
        packager=run.GitArchivePackager(check_uncommitted_changes=True)
        if options.packager == "git"
        else run.Packager(),
        launcher="torchrun",
        env_vars=_exported(options, env),
    )


def check_slurm_options(options: SlurmOptions) -> None:
    """What would fail only after the job was submitted.

    Raises:
        ValueError: Naming the option.
    """
    if options.ssh:
        option, folder = "--remote-dir", options.remote_directory or ""
    else:
        option, folder = "--home (NEMORUN_HOME)", nemo_run_home()
    if options.ssh and not folder.startswith("/"):
        raise ValueError(
            f"--remote-dir is {options.remote_directory}: with --ssh it names the absolute folder on the cluster "
            "for experiments; set it"
        )
    if options.ssh and "@" not in options.ssh:
        raise ValueError(f"--ssh {options.ssh}: expected USER@HOST")
    check_is_unquoted(option, folder)
    if options.packager == "git":
        top = subprocess.run(["git", "rev-parse", "--show-toplevel"], capture_output=True, text=True)
        if top.returncode:
            raise ValueError(f"--packager git: {os.getcwd()} is in no git repository; use --packager none")
    for mount in options.container_mounts:
        if mount.count(":") not in (1, 2):
            raise ValueError(f"--container-mount {mount}: expected FROM:TO")
    if options.container_image is None:
        check_paths(folder, options.workdir or os.getcwd())
    if options.container_mounts and not options.container_image:
        raise ValueError("--container-mount without --container-image: there is no container to mount into")


def nemo_run_home() -> str:
    """NeMo-Run's folder."""
    import_nemo_run()
    from nemo_run.config import get_nemorun_home

    return get_nemorun_home()


def check_paths(*paths: str) -> None:
    """Without a container, NeMo-Run 0.11 takes every "/nemo_run" for the one in the container.

    Raises:
        ValueError: A path has it.
    """
    for path in paths:
        if "/nemo_run" in path:
            raise ValueError(
                f"{path}: NeMo-Run replaces /nemo_run in every path of the batch script; rename the folder, or set "
                "--home (NEMORUN_HOME) and --workdir to others"
            )


def script_path_for(options: SlurmOptions, script: str) -> str:
    """The script's path as the job sees it: inside the repository when that is packaged, else absolute.

    Raises:
        ValueError: The script isn't in the repository that is packaged.
    """
    path = Path(script).resolve()
    if options.packager != "git":
        if options.container_image is None:
            check_paths(str(path))
        return str(path)
    top = subprocess.run(["git", "rev-parse", "--show-toplevel"], capture_output=True, text=True, check=True)
    repository = Path(top.stdout.strip()).resolve()
    if not path.is_relative_to(repository):
        raise ValueError(f"--packager git: {path} is not in {repository}, which is what is packaged")
    return str(path.relative_to(repository))


def _tunnel(options: SlurmOptions) -> Any:
    """The way to the cluster."""
    run = import_nemo_run()
    if options.ssh is None:
        return run.LocalTunnel(job_dir="")  # empty is NEMORUN_HOME/experiments, the only one that works
    user, _, host = options.ssh.rpartition("@")
    return run.SSHTunnel(host=host, user=user, job_dir=options.remote_directory, identity=options.ssh_identity)


def _exported(options: SlurmOptions, env: Mapping[str, str]) -> dict[str, str]:
    """Environment variables as the sbatch script exports them: NeMo-Run writes values without quotes."""
    variables = {**QUIET_TORCHRUN, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), **env}
    exported = {name: shlex.quote(value) for name, value in variables.items()}
    if options.container_image is None and options.ssh is None and "PATH" not in env:
        exported["PATH"] = f'{shlex.quote(os.path.dirname(sys.executable))}:"$PATH"'
    if options.packager == "git" and "PYTHONPATH" not in env:
        exported["PYTHONPATH"] = '/nemo_run/code/src:"${PYTHONPATH:-}"'
    return exported
