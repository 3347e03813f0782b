# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Plugins: what they make of tasks, executors and the batch script, and what they refuse."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("nemo_run") is None:
    pytest.skip("nemo_run is not installed: pip install 'megatron-bridge[recipes]'", allow_module_level=True)

import nemo_run as run

from megatron.bridge.recipes import run_plugins
from megatron.bridge.recipes.nemo_run_jobs import dry_run
from megatron.bridge.recipes.nemo_run_tasks import SlurmOptions, local_executor, script_task, slurm_executor
from megatron.bridge.recipes.run_plugins import (
    FaultTolerancePlugin,
    MLFlowPlugin,
    NsysPlugin,
    PreemptionPlugin,
    PyTorchProfilerPlugin,
    WandbPlugin,
)
from megatron.bridge.training.config import unsupported

pytestmark = pytest.mark.any_core

ROOT = Path(__file__).resolve().parents[3]


def train(recipe: str, overrides: list[str] = ()) -> None:
    """Stands for the function that workers call."""


def without_overrides(recipe: str) -> None:
    """Has nowhere to put them."""


def as_flags(arguments) -> list[str]:
    """A script's own spelling."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in vars(arguments).items()]


@pytest.fixture
def all_built(monkeypatch):
    """As if every option were built."""
    monkeypatch.setattr(unsupported, "UNSUPPORTED", ())


def slurm(**options):
    return slurm_executor(SlurmOptions(account="account", num_processes=8, **options), env={})


def script():
    return run.Script(path="train.py", entrypoint="python", args=["--recipe", "a"])


PLUGINS = [
    (PreemptionPlugin(), ["train.exit_signal_handler=true"]),
    (
        PreemptionPlugin(enable_exit_handler_for_data_loader=True),
        ["train.exit_signal_handler=true", "train.exit_signal_handler_for_dataloader=true"],
    ),
    (FaultTolerancePlugin(), []),
    (
        NsysPlugin(profile_step_start=3, profile_step_end=5, profile_ranks=[0, 1]),
        ["profiling.use_nsys_profiler=true", "profiling.profile_step_start=3", "profiling.profile_step_end=5"]
        + ["profiling.profile_ranks=[0,1]"],
    ),
    (
        PyTorchProfilerPlugin(profile_step_start=3, profile_step_end=5, record_shapes=True),
        ["profiling.use_pytorch_profiler=true", "profiling.profile_step_start=3", "profiling.profile_step_end=5"]
        + ["profiling.memory_snapshot_path=snapshot.pickle", "profiling.record_shapes=true"],
    ),
    (WandbPlugin(project="p", name="n"), ["logger.wandb_project=p", "logger.wandb_exp_name=n"]),
    (
        MLFlowPlugin(experiment="e", tracking_uri="file:///runs"),
        ["logger.mlflow_experiment=e", "logger.mlflow_tracking_uri=file:///runs"],
    ),
]


@pytest.mark.parametrize(("plugin", "overrides"), PLUGINS, ids=lambda value: type(value).__name__)
class TestEachPlugin:
    def test_a_script_gets_overrides_after_its_own_arguments(self, all_built, plugin, overrides):
        task = script()
        plugin.setup(task, slurm())
        assert task.args == ["--recipe", "a", *overrides]

    def test_a_partial_gets_them_in_its_parameter(self, all_built, plugin, overrides):
        task = run.Partial(train, recipe="a", overrides=["b=1"])
        plugin.setup(task, slurm())
        assert task.overrides == ["b=1", *overrides]

    def test_a_partial_without_that_parameter_is_refused(self, all_built, plugin, overrides):
        if overrides:
            with pytest.raises(ValueError, match="without_overrides has no parameter `overrides` to put "):
                plugin.setup(run.Partial(without_overrides, recipe="a"), slurm())

    def test_an_inline_script_is_refused(self, all_built, plugin, overrides):
        with pytest.raises(ValueError, match="an inline script takes no arguments"):
            plugin.setup(run.Script(inline="torchrun train.py"), slurm())

    def test_it_survives_being_stored(self, all_built, plugin, overrides, tmp_path):
        directory, _ = dry_run(script(), local_executor(1, env={}), title="stored", plugins=[plugin])
        assert (directory / "_TASKS").stat().st_size


def test_the_options_that_plugins_set_exist(all_built):
    from megatron.bridge.utils.overrides import apply_overrides
    from tests.rigs.tiny import tiny_config

    for _, overrides in PLUGINS:
        apply_overrides(tiny_config("unused"), overrides)


def test_a_converter_speaks_the_scripts_own_language(all_built):
    task = script()
    PreemptionPlugin(script_args_converter_fn=as_flags).setup(task, slurm())
    assert task.args[2:] == ["--enable-exit-handler=True", "--enable-exit-handler-for-data-loader=False"]


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        (NsysPlugin(profile_step_start=1, profile_step_end=2), "NsysPlugin: profiling.use_nsys_profiler=true is not "),
        (WandbPlugin(project="p"), "WandbPlugin: logger.wandb_project=p is not built yet: "),
        (FaultTolerancePlugin(enable_ft_package=True), "FaultTolerancePlugin: enable_ft_package=True is not built yet"),
        (FaultTolerancePlugin(rank_heartbeat_timeout=9), "FaultTolerancePlugin: rank_heartbeat_timeout=9 is not built"),
        (PreemptionPlugin(preempt_time=0), "PreemptionPlugin: preempt_time=0: expected at least 1 second"),
    ],
)
def test_what_is_not_built_is_refused_before_launch(monkeypatch, plugin, message):
    rows = tuple(map(unsupported.Unsupported, ("profiling.use_nsys_profiler", "logger.wandb_project")))
    monkeypatch.setattr(unsupported, "UNSUPPORTED", rows)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as error:
        dry_run(script(), slurm(), title="refused", plugins=[plugin])
    assert "\n" not in str(error.value)


def test_the_batch_script_says_what_was_asked_for(all_built, tmp_path):
    executor = slurm(
        nodes=2,
        partition="long",
        time="04:00:00",
        gpus_per_node=8,
        exclusive=True,
        mem="0",
        parameters={"reservation": "ours"},
        container_image="/images/a b.sqsh",
        container_mounts=["/data:/data"],
    )
    executor.env_vars["TEXT"] = "'two words'"
    plugins = [PreemptionPlugin(preempt_time=120), FaultTolerancePlugin(num_in_job_restarts=4)]
    plugins += [WandbPlugin(project="p"), NsysPlugin(profile_step_start=3, profile_step_end=5)]
    task = script_task("/code/train.py", ["a=[0, 1]"], executor=executor)
    directory, _ = dry_run(task, executor, title="text", plugins=plugins)
    path = directory / "training_sbatch.sh"
    text = path.read_text()
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    flags = set(re.findall(r"^#SBATCH --(.*)$", text, flags=re.MULTILINE))
    assert flags >= {
        "account=account",
        "partition=long",
        "time=04:00:00",
        "nodes=2",
        "ntasks-per-node=1",
        "gpus-per-node=8",
        "exclusive",
        "mem=0",
        "reservation=ours",
        "signal=TERM@120",
        "open-mode=append",
    }
    exports = dict(re.findall(r"^export (\w+)=(.*)$", text, flags=re.MULTILINE))
    assert (
        exports.items()
        >= {
            "TEXT": "'two words'",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            "PET_MAX_RESTARTS": "4",
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "120",
            "TORCHX_MAX_RETRIES": "2",
        }.items()
        and "PATH" not in exports
    )
    (command,) = re.findall(r"^srun --output .*$", text, flags=re.MULTILINE)
    here = os.getcwd()
    for part in (
        "--container-image '/images/a b.sqsh' ",
        f"--container-mounts /data:/data,{here}:{here},{directory}/training:/nemo_run ",
        f"--container-workdir={here} ",
        "--nnodes 2 --nproc-per-node 8 --node-rank $SLURM_NODEID ",
        "nsys profile ",
        "/code/train.py 'a=[0, 1]' train.exit_signal_handler=true logger.wandb_project=p ",
    ):
        assert part in command
    assert "trap requeue_at_the_limit EXIT" in text and "WANDB_API_KEY" not in text


def test_a_package_of_the_repository_goes_along(tmp_path, monkeypatch):
    """Of the committed files; the job starts in the package and imports from it."""
    repository = tmp_path / "repository"
    (repository / "scripts").mkdir(parents=True)
    (repository / "scripts" / "train.py").write_text("pass\n")
    monkeypatch.chdir(repository)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "a"]):
        subprocess.run([*git, *command], check=True)
    executor = slurm(packager="git")
    task = script_task("scripts/train.py", [], executor=executor)
    directory, _ = dry_run(task, executor, title="package")
    text = (directory / "training_sbatch.sh").read_text()
    assert (directory / "training" / "code" / "scripts" / "train.py").is_file()
    assert f'export PYTHONPATH={directory}/training/code/src:"${{PYTHONPATH:-}}"\n' in text
    assert f"--chdir {directory}/training/code " in text and "--chdir=" not in text


def test_over_ssh_the_paths_are_the_clusters():
    """Nothing is connected to for it."""
    executor = slurm(ssh="me@login.nowhere", remote_directory="/remote/experiments", workdir="/remote/code")
    directory, _ = dry_run(script(), executor, title="ssh")
    text = (directory / "training_sbatch.sh").read_text()
    place = f"/remote/experiments/ssh/{directory.name}/training"
    assert f"#SBATCH --output={place}/sbatch_" in text and f"srun --output {place}/log-" in text
    assert "--chdir=/remote/code " in text and "export PATH=" not in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ssh": "me@there"}, "--remote-dir is None: with --ssh it names the absolute folder"),
        ({"ssh": "there", "remote_directory": "/a"}, "--ssh there: expected USER@HOST"),
        ({"container_mounts": ["/data"], "container_image": "i"}, "--container-mount /data: expected FROM:TO"),
        ({"container_mounts": ["/a:/b"]}, "--container-mount without --container-image"),
        (
            {"workdir": "/home/me/nemo_run"},
            "/home/me/nemo_run: NeMo-Run replaces /nemo_run in every path of the batch ",
        ),
    ],
)
def test_slurm_options_that_do_not_go_together(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        slurm(**options)


def test_importing_it_without_nemo_run_is_one_line_that_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "nemo_run", None)
    with pytest.raises(ImportError, match=r"^nemo_run is not installed: pip install 'megatron-bridge\[recipes\]'$"):
        run_plugins.import_nemo_run()


def test_a_leptonai_that_is_too_new_is_named(monkeypatch, tmp_path):
    (tmp_path / "nemo_run.py").write_text("import leptonai.api.v9\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "nemo_run")
    with pytest.raises(ImportError, match=r"^nemo_run can't be imported: leptonai [\d.]+ has no .*'leptonai<0.47'$"):
        run_plugins.import_nemo_run()
