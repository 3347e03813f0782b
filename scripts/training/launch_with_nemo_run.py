# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Start a recipe through NeMo-Run: on this machine, or on a Slurm cluster.

    launch_with_nemo_run.py --nproc-per-node 2 --recipe smollm2_135m_sft_config --mode sft train.train_iters=20
    launch_with_nemo_run.py --executor slurm --account ACCOUNT --nodes 2 --nproc-per-node 8 --dry-run --recipe ...

What is no option of this launcher is handed on to the script (scripts/training/run_recipe.py), as is all after `--`.
Exit code: 0 when the job succeeded (or was submitted, with --detach), 1 when it failed, 2 when it could not be started,
128 + the signal's number when the launcher was told to stop.
"""

import argparse
import inspect
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

DEFAULT_SCRIPT = Path(__file__).with_name("run_recipe.py")


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The launcher's options, and what is handed on to the script."""
    own, _, after = _split(argv)
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog=__doc__.split("\n\n", 1)[1],
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what runs")
    what.add_argument("--recipe", help="name of a recipe")
    what.add_argument("--mode", help="sft, peft or pretrain, as for run_recipe.py")
    what.add_argument("--script", type=os.path.expanduser, help="another script than scripts/training/run_recipe.py")
    what.add_argument(
        "--task", choices=("script", "partial"), default="script", help="partial: a function of the package, no script"
    )
    where = parser.add_argument_group("where")
    where.add_argument("--executor", choices=("local", "slurm"), default="local")
    where.add_argument("--nproc-per-node", type=int, default=1, help="ranks on each machine (1)")
    where.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="may be repeated")
    add_slurm_options(parser.add_argument_group("Slurm"))
    add_plugin_options(parser.add_argument_group("plugins (megatron.bridge.recipes.run_plugins)"))
    how = parser.add_argument_group("how")
    how.add_argument("--name", help="title of the experiment (the recipe's or the script's name)")
    how.add_argument(
        "--home", type=os.path.expanduser, help="folder for experiments and logs (NEMORUN_HOME, or ~/.nemo_run)"
    )
    how.add_argument("--dry-run", action="store_true", help="write everything, say where, start nothing")
    how.add_argument("--detach", action="store_true", help="return once a Slurm job is submitted")
    how.add_argument("--quiet", action="store_true", help="don't print the job's output as it comes")
    how.add_argument("--stop-seconds", type=float, default=60.0, help="from SIGTERM to SIGKILL, when told to stop (60)")
    arguments, rest = parser.parse_known_args(own)
    return arguments, [*rest, *after]


def add_slurm_options(slurm: Any) -> None:
    """The options that only Slurm has."""
    slurm.add_argument("--account", help="account that is charged; needed")
    slurm.add_argument("--partition")
    slurm.add_argument("--time", default="01:00:00", help="time limit (01:00:00)")
    slurm.add_argument("--nodes", type=int, default=1, help="number of machines (1)")
    slurm.add_argument("--gpus-per-node", type=int, help="default: as --nproc-per-node; 0 leaves the directive out")
    slurm.add_argument("--cpus-per-task", type=int)
    slurm.add_argument("--mem", help="host memory of a machine; 0 is all of it")
    slurm.add_argument("--qos")
    slurm.add_argument("--exclusive", action="store_true")
    slurm.add_argument("--sbatch", action="append", default=[], metavar="NAME=VALUE", help="one more directive")
    slurm.add_argument("--container-image", help="for pyxis; without it the machines' own software is used")
    slurm.add_argument("--container-mount", action="append", default=[], metavar="FROM:TO", help="may be repeated")
    slurm.add_argument(
        "--workdir",
        type=os.path.expanduser,
        help="folder that the job runs in (this one; with --packager git, the package)",
    )
    slurm.add_argument("--packager", choices=("none", "git"), default="none", help="git: take an archive of HEAD along")
    slurm.add_argument("--ssh", metavar="USER@HOST", help="a login node; without it sbatch runs here")
    slurm.add_argument("--ssh-identity", type=os.path.expanduser, help="file with the private key")
    slurm.add_argument("--remote-dir", help="folder on the cluster for experiments, with --ssh")


def add_plugin_options(plugins: Any) -> None:
    """One option or two for each plugin; without them it isn't used."""
    plugins.add_argument(
        "--preempt-seconds", type=int, metavar="N", help="save and requeue, N seconds before the time limit"
    )
    plugins.add_argument("--max-restarts", type=int, metavar="N", help="torchrun starts failed workers again, N times")
    plugins.add_argument("--job-retries", type=int, metavar="N", help="a failed Slurm job is requeued, N times")
    plugins.add_argument("--torch-profiler", metavar="START:END", help="record these steps with torch's profiler")
    plugins.add_argument("--nsys", metavar="START:END", help="record these steps with Nsight Systems")
    plugins.add_argument("--wandb-project", help="log to Weights & Biases")
    plugins.add_argument("--mlflow-experiment", help="log to MLflow")


def _split(argv: list[str]) -> tuple[list[str], list[str], list[str]]:
    """What stands before and after `--`."""
    at = argv.index("--") if "--" in argv else len(argv)
    return argv[:at], argv[at : at + 1], argv[at + 1 :]


def pairs(texts: list[str], option: str) -> dict[str, str]:
    """NAME=VALUE texts as a dictionary.

    Raises:
        ValueError: One without a name or an equals sign.
    """
    for text in texts:
        if not text.partition("=")[0] or "=" not in text:
            raise ValueError(f"{option} {text}: expected NAME=VALUE")
    return {name: value for name, _, value in (text.partition("=") for text in texts)}


def check_arguments(arguments: argparse.Namespace) -> None:
    """What can be known before NeMo-Run is imported.

    Raises:
        ValueError: Options that don't go together, an unknown recipe.
        FileNotFoundError: The script isn't there.
    """
    if arguments.executor == "local":
        given = [name for name in ("account", "partition", "container_image", "ssh") if getattr(arguments, name)]
        if given or arguments.nodes != 1:
            name = given[0].replace("_", "-") if given else "nodes"
            raise ValueError(f"--{name} is for Slurm: add --executor slurm")
        if arguments.detach:
            raise ValueError(
                "--detach: a job on this machine ends with its launcher; leave it out, or --executor slurm"
            )
    elif not arguments.account:
        raise ValueError("--account is missing: --executor slurm needs one")
    if arguments.nproc_per_node < 1 or arguments.nodes < 1:
        raise ValueError(f"--nproc-per-node {arguments.nproc_per_node}, --nodes {arguments.nodes}: at least 1 each")
    if arguments.script and not Path(arguments.script).is_file():
        raise FileNotFoundError(f"--script {arguments.script}: there is no such file")
    if arguments.script and arguments.task == "partial":
        raise ValueError("--script and --task partial: one of them says what runs; leave one out")
    if not arguments.script:
        check_recipe(arguments.recipe, arguments.mode)


def check_recipe(recipe: str | None, mode: str | None) -> None:
    """The recipe exists, and has such a mode.

    Raises:
        ValueError: It doesn't, or none is named.
    """
    from megatron.bridge.recipes.build import RecipeRequest

    if recipe is None:
        raise ValueError("--recipe is missing: name a recipe, or a --script of your own")
    RecipeRequest(recipe=recipe, mode=mode).resolve()


def build_executor(arguments: argparse.Namespace) -> Any:
    """The executor that the options describe."""
    from megatron.bridge.recipes.nemo_run_tasks import local_executor, slurm_executor

    env = pairs(arguments.env, "--env")
    if arguments.executor == "local":
        return local_executor(arguments.nproc_per_node, env=env)
    return slurm_executor(slurm_options(arguments), env=env)


def slurm_options(arguments: argparse.Namespace) -> Any:
    """The options for Slurm, by their names in the library."""
    from megatron.bridge.recipes.nemo_run_tasks import SlurmOptions

    gpus = arguments.nproc_per_node if arguments.gpus_per_node is None else arguments.gpus_per_node
    same = (
        "account partition time nodes cpus_per_task mem qos exclusive container_image workdir packager ssh ssh_identity"
    )
    return SlurmOptions(
        num_processes=arguments.nproc_per_node,
        gpus_per_node=gpus or None,
        parameters=pairs(arguments.sbatch, "--sbatch"),
        container_mounts=arguments.container_mount,
        remote_directory=arguments.remote_dir,
        **{name: getattr(arguments, name) for name in same.split()},
    )


def build_task(arguments: argparse.Namespace, rest: list[str], executor: Any) -> Any:
    """The script or the function, with its arguments."""
    from megatron.bridge.recipes.nemo_run_import import import_nemo_run
    from megatron.bridge.recipes.nemo_run_tasks import check_is_unquoted, nemo_run_home, script_path_for, script_task

    named = [("--recipe", arguments.recipe), ("--mode", arguments.mode)]
    options = [text for name, value in named if value for text in (name, value)]
    if arguments.task == "partial":
        check_is_unquoted("--home (NEMORUN_HOME)", nemo_run_home())
        return import_nemo_run().Partial(run_recipe_function(), **request_of([*options, *rest]))
    script = str(Path(arguments.script or DEFAULT_SCRIPT).resolve())
    if arguments.executor == "slurm":
        script = script_path_for(slurm_options(arguments), script)
    return script_task(script, [*options, *rest], executor=executor)


def run_recipe_function() -> Any:
    """The function that workers call; importing it doesn't import torch."""
    from megatron.bridge.recipes.launch import run_recipe

    return run_recipe


def request_of(options: list[str]) -> dict[str, Any]:
    """What run_recipe.py's options say, by the names of the function's parameters.

    Raises:
        ValueError: An option that only the script has.
    """
    parser = runpy.run_path(str(DEFAULT_SCRIPT))["build_parser"]()
    given = vars(parser.parse_intermixed_args(options))
    taken = inspect.signature(run_recipe_function()).parameters
    for name, value in given.items():
        if name not in taken and value != parser.get_default(name):
            raise ValueError(
                f"--{name.replace('_', '-')} is an option of run_recipe.py alone: leave --task partial out"
            )
    return {name: value for name, value in given.items() if name in taken}


def build_plugins(arguments: argparse.Namespace) -> list[Any]:
    """The plugins that the options ask for.

    Raises:
        ValueError: Steps that aren't START:END.
    """
    from megatron.bridge.recipes import run_plugins

    plugins = []
    if arguments.preempt_seconds is not None:
        plugins.append(run_plugins.PreemptionPlugin(preempt_time=arguments.preempt_seconds))
    if arguments.max_restarts is not None or arguments.job_retries is not None:
        plugins.append(
            run_plugins.FaultTolerancePlugin(
                num_in_job_restarts=arguments.max_restarts or 0, num_job_retries_on_failure=arguments.job_retries or 0
            )
        )
    for option, plugin in (
        ("torch_profiler", run_plugins.PyTorchProfilerPlugin),
        ("nsys", run_plugins.NsysPlugin),
    ):
        if steps := getattr(arguments, option):
            start, _, end = steps.partition(":")
            if not (start.isdigit() and end.isdigit()):
                raise ValueError(f"--{option.replace('_', '-')} {steps}: expected START:END, e.g. 10:12")
            plugins.append(plugin(profile_step_start=int(start), profile_step_end=int(end)))
    if arguments.wandb_project:
        plugins.append(run_plugins.WandbPlugin(project=arguments.wandb_project))
    if arguments.mlflow_experiment:
        plugins.append(run_plugins.MLFlowPlugin(experiment=arguments.mlflow_experiment))
    return plugins


def main() -> int:
    """Parse, check, start, wait."""
    arguments, rest = parse_arguments(sys.argv[1:])
    try:
        check_arguments(arguments)
        if arguments.home:
            os.environ["NEMORUN_HOME"] = str(Path(arguments.home).resolve())  # read when nemo_run is imported
        return launch(arguments, rest)
    except (ValueError, FileNotFoundError, ImportError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def launch(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Start the job and say how it ended; gives the exit code."""
    from megatron.bridge.recipes.nemo_run_jobs import dry_run, run_job

    executor = build_executor(arguments)
    task = build_task(arguments, rest, executor)
    plugins = build_plugins(arguments)
    title = arguments.name or arguments.recipe or Path(arguments.script).stem
    if arguments.dry_run:
        directory, command = dry_run(task, executor, title=title, plugins=plugins)
        scripts = sorted(directory.glob("*_sbatch.sh"))
        print(f"each machine would run: {command}")
        print(f"nothing was started; see {scripts[0] if scripts else directory}")
        return 0
    outcome = run_job(
        task,
        executor,
        title=title,
        plugins=plugins,
        detach=arguments.detach,
        tail_logs=not arguments.quiet,
        stop_seconds=arguments.stop_seconds,
    )
    how = outcome.state
    if outcome.signal_number is not None:
        how = f"STOPPED by {signal.Signals(outcome.signal_number).name}"
    print(f"{how}: {outcome.handle.rpartition('/')[2]}; logs and configuration in {outcome.directory}")
    if outcome.log:
        print(f"the end of {outcome.log}:", *(f"  {line}" for line in outcome.last_lines), sep="\n", file=sys.stderr)
    return outcome.exit_code


if __name__ == "__main__":
    sys.exit(main())
