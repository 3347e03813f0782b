# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""NeMo-Run plugins: preemption, restarts, profiles, trackers. A plugin sets up the job and the run's options together.

    experiment.add(task, executor=executor, plugins=[PreemptionPlugin(preempt_time=120)])

They take a `run.Script`, whose arguments they extend with `key=value` overrides, or with what a
`script_args_converter_fn` makes of a `*ScriptArgs`; and a `run.Partial` of a function with a parameter `overrides`. An
option that isn't built is refused when the plugin is added, before anything is launched.
"""

import inspect
import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron.bridge.recipes.nemo_run_import import import_nemo_run
from megatron.bridge.recipes.nemo_run_tasks import keep_arguments, takes_arguments
from megatron.bridge.training.config.unsupported import check_overrides_are_built

run = import_nemo_run()
Plugin: Any = run.Plugin

Converter = Callable[[Any], list[str]]
"""Makes a script's own arguments of a `*ScriptArgs`; a function of a module, as NeMo-Run stores its name."""


@dataclass(kw_only=True)
class PreemptionPluginScriptArgs:
    """What a script is told."""

    enable_exit_handler: bool
    enable_exit_handler_for_data_loader: bool


@dataclass(kw_only=True)
class PreemptionPlugin(Plugin):
    """Save and stop before a Slurm job's time is over, and put the job in the queue again.

    The run gets SIGTERM `preempt_time` seconds before the limit (`--signal`), saves at the next step boundary and ends.
    The job requeues itself when it ended in that time, not when it failed before. On another executor it only makes
    the run save when it is told to end.
    """

    preempt_time: int = 60
    """Seconds that a step and a save may take together."""

    enable_exit_handler: bool = True
    """Save when the signal comes (train.exit_signal_handler)."""

    enable_exit_handler_for_data_loader: bool = False
    """Send it to data loader workers too (train.exit_signal_handler_for_dataloader)."""

    num_requeues: int = 100
    """How often the job may put itself in the queue again. 0: never."""

    script_args_converter_fn: Converter | None = None
    """None: key=value overrides."""

    def setup(self, task: Any, executor: Any) -> None:
        """Extend the task and the executor; NeMo-Run calls it."""
        if self.preempt_time < 1:
            raise ValueError(f"PreemptionPlugin: preempt_time={self.preempt_time}: expected at least 1 second")
        values = {"train.exit_signal_handler": self.enable_exit_handler}
        if self.enable_exit_handler_for_data_loader:
            values["train.exit_signal_handler_for_dataloader"] = True
        arguments = PreemptionPluginScriptArgs(
            enable_exit_handler=self.enable_exit_handler,
            enable_exit_handler_for_data_loader=self.enable_exit_handler_for_data_loader,
        )
        _extend(task, executor, self, values, arguments)
        # torchrun kills its workers 30 seconds after it passed a signal on; newer versions can be told otherwise.
        executor.env_vars = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(self.preempt_time), **executor.env_vars}
        if isinstance(executor, run.SlurmExecutor):
            executor.signal = f"TERM@{self.preempt_time}"
            requeue = _REQUEUE_AT_THE_LIMIT.format(times=self.num_requeues, seconds=self.preempt_time + 30)
            executor.setup_lines = "\n".join(filter(None, [executor.setup_lines, requeue]))


_REQUEUE_AT_THE_LIMIT = """
requeue_at_the_limit() {{
    local status=$? left=$(( ${{SLURM_JOB_END_TIME:-0}} - $(date +%s) ))
    if [ "$status" -ne 0 ] && [ "$left" -le {seconds} ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {times} ]; then
        echo "ended with $status, $left seconds before the time limit: requeued"
        scontrol requeue "$SLURM_JOB_ID"
    fi
}}
trap requeue_at_the_limit EXIT
"""
"""For the batch script. Where Slurm doesn't say when the job ends (before 22.05), any failure requeues."""


@dataclass(kw_only=True)
class FaultTolerancePluginScriptArgs:
    """What a script is told."""

    enable_ft_package: bool
    calc_ft_timeouts: bool


@dataclass(kw_only=True)
class FaultTolerancePlugin(Plugin):
    """Start a failed run again: torchrun its workers, then Slurm the job. Each resumes from the newest checkpoint.

    The heartbeats of nvidia-resiliency-ext aren't built: a hang ends through `dist.distributed_timeout_minutes`.
    """

    num_in_job_restarts: int = 3
    """How often torchrun starts all workers again (its --max-restarts)."""

    num_job_retries_on_failure: int = 2
    """How often a failed Slurm job is put in the queue again."""

    enable_ft_package: bool = False
    """Not built."""

    calc_ft_timeouts: bool = False
    """Not built."""

    initial_rank_heartbeat_timeout: int | None = None
    """Seconds. Not built."""

    rank_heartbeat_timeout: int | None = None
    """Seconds. Not built."""

    script_args_converter_fn: Converter | None = None
    """None: nothing is added to the script's arguments."""

    def setup(self, task: Any, executor: Any) -> None:
        """Extend the executor; NeMo-Run calls it."""
        for name in (
            "enable_ft_package",
            "calc_ft_timeouts",
            "initial_rank_heartbeat_timeout",
            "rank_heartbeat_timeout",
        ):
            if getattr(self, name):
                raise ValueError(
                    f"FaultTolerancePlugin: {name}={getattr(self, name)} is not built yet: leave it out; a hang ends "
                    "through dist.distributed_timeout_minutes"
                )
        if executor.launcher is None:
            raise ValueError(
                'FaultTolerancePlugin: the executor has no launcher that restarts: set launcher="torchrun"'
            )
        arguments = FaultTolerancePluginScriptArgs(enable_ft_package=False, calc_ft_timeouts=False)
        _extend(task, executor, self, {}, arguments)
        executor.env_vars = {**executor.env_vars, "PET_MAX_RESTARTS": str(self.num_in_job_restarts)}
        executor.retries = self.num_job_retries_on_failure


@dataclass(kw_only=True)
class NsysPluginScriptArgs:
    """What a script is told."""

    profile_step_start: int
    profile_step_end: int
    profile_ranks: list[int] | None
    record_shapes: bool


@dataclass(kw_only=True)
class NsysPlugin(Plugin):
    """Start the run under Nsight Systems."""

    profile_step_start: int
    """First step that is profiled."""

    profile_step_end: int
    """Step before which the profile ends."""

    profile_ranks: list[int] | None = None
    """Ranks that are profiled. None: rank 0."""

    nsys_trace: list[str] | None = None
    """What nsys traces. None: NeMo-Run's choice."""

    nsys_extra_args: list[str] | None = None
    """More options of nsys. None: NeMo-Run's choice."""

    record_shapes: bool = False
    """Record tensor shapes in the markers."""

    nsys_gpu_metrics: bool = False
    """Sample the device's counters."""

    script_args_converter_fn: Converter | None = None
    """None: key=value overrides."""

    def setup(self, task: Any, executor: Any) -> None:
        """Extend the task and the launcher; NeMo-Run calls it."""
        steps = {"profile_step_start": self.profile_step_start, "profile_step_end": self.profile_step_end}
        values = {"use_nsys_profiler": True, **steps, "record_shapes": self.record_shapes}
        arguments = NsysPluginScriptArgs(**steps, profile_ranks=self.profile_ranks, record_shapes=self.record_shapes)
        _extend(task, executor, self, _profiling(values, self.profile_ranks), arguments)
        launcher = executor.get_launcher()
        launcher.nsys_profile, launcher.nsys_gpu_metrics = True, self.nsys_gpu_metrics
        launcher.nsys_trace = self.nsys_trace or launcher.nsys_trace
        launcher.nsys_extra_args = self.nsys_extra_args or launcher.nsys_extra_args


@dataclass(kw_only=True)
class PyTorchProfilerPluginScriptArgs:
    """What a script is told."""

    profile_step_start: int
    profile_step_end: int
    profile_ranks: list[int] | None
    record_memory_history: bool
    memory_snapshot_path: str
    record_shapes: bool


@dataclass(kw_only=True)
class PyTorchProfilerPlugin(Plugin):
    """Record some steps with torch's profiler."""

    profile_step_start: int
    """First step that is profiled."""

    profile_step_end: int
    """Step before which the profile ends."""

    profile_ranks: list[int] | None = None
    """Ranks that are profiled. None: rank 0."""

    record_memory_history: bool = False
    """Record each allocation on the device."""

    memory_snapshot_path: str = "snapshot.pickle"
    """File for that record."""

    record_shapes: bool = False
    """Record tensor shapes."""

    script_args_converter_fn: Converter | None = None
    """None: key=value overrides."""

    def setup(self, task: Any, executor: Any) -> None:
        """Extend the task; NeMo-Run calls it."""
        fields: dict[str, Any] = {
            "profile_step_start": self.profile_step_start,
            "profile_step_end": self.profile_step_end,
            "record_memory_history": self.record_memory_history,
            "memory_snapshot_path": self.memory_snapshot_path,
            "record_shapes": self.record_shapes,
        }
        values = {"use_pytorch_profiler": True, **fields}
        arguments = PyTorchProfilerPluginScriptArgs(**fields, profile_ranks=self.profile_ranks)
        _extend(task, executor, self, _profiling(values, self.profile_ranks), arguments)


@dataclass(kw_only=True)
class WandbPluginScriptArgs:
    """What a script is told."""

    project: str
    entity: str | None
    name: str | None
    save_dir: str | None


@dataclass(kw_only=True)
class WandbPlugin(Plugin):
    """Log to Weights & Biases.

    The key isn't written anywhere: a job here, and one that sbatch starts from here, inherits WANDB_API_KEY; elsewhere
    `wandb login` has stored it, or WANDB_MODE=offline needs none.
    """

    project: str
    """Project there."""

    name: str | None = None
    """Name of the run. None: the service makes one."""

    entity: str | None = None
    """User or team. None: the account's own."""

    save_dir: str | None = None
    """Folder for its local files. None: its own default."""

    script_args_converter_fn: Converter | None = None
    """None: key=value overrides."""

    def setup(self, task: Any, executor: Any) -> None:
        """Extend the task; NeMo-Run calls it."""
        fields: dict[str, Any] = {
            "project": self.project,
            "entity": self.entity,
            "name": self.name,
            "save_dir": self.save_dir,
        }
        options = {"project": "wandb_project", "entity": "wandb_entity", "name": "wandb_exp_name"}
        options["save_dir"] = "wandb_save_dir"
        values = {f"logger.{options[name]}": value for name, value in fields.items() if value is not None}
        _extend(task, executor, self, values, WandbPluginScriptArgs(**fields))


@dataclass(kw_only=True)
class MLFlowPluginScriptArgs:
    """What a script is told."""

    experiment: str
    run_name: str | None
    tracking_uri: str | None


@dataclass(kw_only=True)
class MLFlowPlugin(Plugin):
    """Log to MLflow."""

    experiment: str
    """Experiment there."""

    run_name: str | None = None
    """Name of the run. None: MLflow makes one."""

    tracking_uri: str | None = None
    """Server or folder. None: MLFLOW_TRACKING_URI, else MLflow's default."""

    script_args_converter_fn: Converter | None = None
    """None: key=value overrides."""

    def setup(self, task: Any, executor: Any) -> None:
        """Extend the task; NeMo-Run calls it."""
        fields: dict[str, Any] = {"experiment": self.experiment, "run_name": self.run_name}
        fields["tracking_uri"] = self.tracking_uri
        values = {f"logger.mlflow_{name}": value for name, value in fields.items() if value is not None}
        _extend(task, executor, self, values, MLFlowPluginScriptArgs(**fields))


def _profiling(values: Mapping[str, Any], ranks: list[int] | None) -> dict[str, Any]:
    """Options of the section `profiling`, those that are on."""
    asked = {**values, "profile_ranks": ranks}
    return {f"profiling.{name}": value for name, value in asked.items() if value not in (None, False)}


def _extend(task: Any, executor: Any, plugin: Any, values: Mapping[str, Any], arguments: Any) -> None:
    """Put options into a task.

    Args:
        task: A `run.Script` or `run.Partial`; it is changed.
        executor: Where it runs.
        plugin: The plugin, for its converter and its name.
        values: Options of the configuration.
        arguments: The same for a converter.

    Raises:
        ValueError: An option that isn't built, or a task that takes none.
    """
    name = type(plugin).__name__
    try:
        check_overrides_are_built(values)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    overrides = [f"{option}={_as_text(value)}" for option, value in values.items()]
    if isinstance(task, run.Script):
        if not takes_arguments(task):
            raise ValueError(f"{name}: an inline script takes no arguments: put it into a file, run.Script(path=...)")
        converter = plugin.script_args_converter_fn
        task.args = [*task.args, *(converter(arguments) if converter else overrides)]
        keep_arguments(task, executor)
        return
    if overrides:
        function = task.__fn_or_cls__
        if "overrides" not in inspect.signature(function).parameters:
            raise ValueError(
                f"{name}: {function.__qualname__} has no parameter `overrides` to put {shlex.join(overrides)} into: "
                "use megatron.bridge.recipes.launch.run_recipe, or give it one"
            )
        task.overrides = [*task.overrides, *overrides]


def _as_text(value: Any) -> str:
    """A value as an override says it."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
