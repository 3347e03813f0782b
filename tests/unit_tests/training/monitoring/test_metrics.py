# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Where figures go: the file that is always written, and the services that are extras."""

import errno
import json
import logging
import os
import sys
import threading
from types import ModuleType, SimpleNamespace

import pytest

from megatron.bridge.training.callbacks import CallbackContext
from megatron.bridge.training.config.rules.monitoring import check_trackers_are_installed
from megatron.bridge.training.monitoring.metrics import (
    RUNS_OWN,
    RUNS_OWN_PREFIXES,
    MetricsFile,
    metrics_file_of,
    open_loggers,
    read_metrics,
    step_losses,
    step_values,
)
from megatron.bridge.training.monitoring.metrics_queue import Patience
from megatron.bridge.training.monitoring.trackers import build_loggers, curve_names
from megatron.bridge.training.state import GlobalState, TrainState
from tests.rigs.config_examples import make_config


def _state(*overrides, step=0):
    return GlobalState(make_config(*overrides), train_state=TrainState(step=step))


def _write(loggers, state, steps, **values):
    with open_loggers(loggers, state):
        for step in steps:
            state.train_state.step = step
            for logger in loggers:
                logger.write(state, "train", {"lm loss": 2.0 / step, "grad_norm": None, **values})


def test_a_resumed_file_has_the_last_line_of_each_step_and_no_torn_one(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    _write([MetricsFile(path)], _state(), [1, 2, 3], start=1)
    with path.open("a") as file:
        file.write('{"step": 4, "spl')  # killed while it wrote
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    _write([MetricsFile(path)], _state(), [3, 4], start=2)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["start"]) for line in lines] == [(1, 1), (2, 1), (3, 1), (3, 2), (4, 2)]
    assert [(line["step"], line["start"]) for line in read_metrics(path)] == [(1, 1), (2, 1), (3, 2), (4, 2)]


def test_a_number_that_is_not_finite_is_null(tmp_path):
    _write([MetricsFile(tmp_path / "metrics.jsonl")], _state(), [1], infinite=float("inf"), nothing=float("nan"))
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["infinite"] is None


def test_a_line_in_the_middle_that_is_no_json_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "split": "train"}\nnonsense\n{"step": 2, "split": "train"}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: .*expected a JSON object on each line"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_a_disk_that_fills_up_costs_no_line_once_there_is_room(tmp_path, caplog):
    metrics, state = MetricsFile(tmp_path / "metrics.jsonl", option="checkpoint.save"), _state()
    metrics.patience = Patience(first_pause_seconds=0.0)

    class Full:
        """Takes half a line, then nothing."""

        def __init__(self, file):
            self.file, self.taken = file, []

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            if self.taken:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.taken.append(self.file.write(data[: len(data) // 2]))
            return self.taken[0]

    with open_loggers([metrics], state):
        for step in range(1, 8):
            if step in (3, 6):
                metrics._file = Full(metrics._file) if step == 3 else metrics._file.file
            state.train_state.step = step
            metrics.deliver(state, "train", {"lm loss": 2.0})
    assert [json.loads(line)["step"] for line in metrics.path.read_text().splitlines()] == [1, 2, 3, 4, 5, 6, 7]
    [warning] = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "metrics.jsonl (checkpoint.save) can't be written (No space left on device)" in warning
    assert "the metrics of step 3" in warning


@pytest.mark.parametrize(
    ("overrides", "path"),
    [
        ([], None),
        (["checkpoint.save=a"], "a/metrics.jsonl"),
        (["checkpoint.save=a", "logger.tensorboard_dir=b"], "b/metrics.jsonl"),
        (["checkpoint.save=a", "logger.tensorboard_dir=b", "logger.metrics_file=c/d"], "c/d"),
    ],
)
def test_where_the_file_lies(overrides, path):
    file = metrics_file_of(make_config(*overrides))
    assert (None if file is None else str(file.path)) == path


def test_a_file_that_cannot_be_written_names_the_option(tmp_path):
    (tmp_path / "file").touch()
    state = _state(f"checkpoint.save={tmp_path}/file/below")
    with (
        pytest.raises(ValueError, match=r"checkpoint.save='.*file/below' can't be written"),
        open_loggers(build_loggers(state.cfg), state),
    ):
        pass


@pytest.mark.parametrize(
    ("option", "package", "extra"), [("wandb_project", "wandb", "wandb"), ("mlflow_experiment", "mlflow", "mlflow")]
)
def test_a_service_whose_package_is_missing_is_refused_with_the_command(tmp_path, monkeypatch, option, package, extra):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, package, raising=False)
    for _ in range(2):
        with pytest.raises(ValueError, match="is not installed") as error:
            check_trackers_are_installed(make_config(f"logger.{option}=mine"), 1)
        expected = f"logger.{option}='mine' needs the package {package}, which is not installed: pip install "
        assert str(error.value).startswith(f'{expected}"megatron-bridge[{extra}]"') and "\n" not in str(error.value)
        (tmp_path / package).mkdir(exist_ok=True)  # what an offline run leaves behind is no package
    check_trackers_are_installed(make_config(), 1)


def test_weights_and_biases_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    state = _state("logger.wandb_project=mine", "logger.wandb_exp_name=tiny", f"logger.wandb_save_dir={tmp_path}")
    [logger] = build_loggers(state.cfg)
    with open_loggers([logger], state):
        state.train_state.step = 1
        logger.write(state, "train", {"lm loss": 2.125, "grad_norm": None})
        logger.write(state, "validation", {"lm loss": 3.375})
        run = state.wandb_logger
        assert run.name == "tiny" and run.config["optimizer"]["lr"] == 1e-4
    [file] = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    content = file.read_bytes()
    assert all(part in content for part in (b"lm loss validation", b"2.125", b"3.375")), (
        "what was logged is in the file"
    )


def test_mlflow_in_a_file(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "")  # put back what the run sets
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE")
    uri = (tmp_path / "runs").as_uri()
    options = ["logger.mlflow_experiment=mine", f"logger.mlflow_tracking_uri={uri}", "logger.mlflow_tags={team: a}"]
    state = _state(*options, "logger.mlflow_run_name=tiny")
    _write(build_loggers(state.cfg), state, [1, 2], grad_norm=float("inf"))
    [run] = mlflow.search_runs(experiment_names=["mine"], output_format="list")
    assert run.data.metrics["lm loss"] == 1.0 and run.info.status == "FINISHED"
    assert (run.data.tags["team"], run.info.run_name) == ("a", "tiny")


def test_mlflow_gets_what_another_thread_hands_over(tmp_path, monkeypatch):
    calls, stand_in = [], ModuleType("mlflow")
    stand_in.exceptions = SimpleNamespace(MlflowException=type("MlflowException", (Exception,), {}))
    stand_in.set_experiment = stand_in.log_text = lambda *arguments: None
    stand_in.start_run = lambda **options: SimpleNamespace(info=SimpleNamespace(run_id="r"))
    stand_in.log_metrics = lambda values, **options: calls.append((threading.current_thread().name, values, options))
    stand_in.end_run = lambda status: calls.append((threading.current_thread().name, status))
    monkeypatch.setitem(sys.modules, "mlflow", stand_in)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    state = _state("logger.mlflow_experiment=mine", step=4)
    [logger] = build_loggers(state.cfg)
    with open_loggers([logger], state):
        logger.deliver(state, "train", {"lm loss": 2.0, "grad_norm": float("nan"), "größe@1, %": 1})
    assert calls == [
        ("metrics for MLflow", {"lm loss": 2.0, "größe_1_ _": 1.0}, {"step": 4, "run_id": "r"}),
        (threading.current_thread().name, "FINISHED"),
    ]


def test_curves_have_megatrons_names():
    values = {"lm loss": 2, "grad_norm": None, "learning_rate": 1, "z_loss": 3, "moe/load_balancing_loss_layer_0": 1}
    assert list(curve_names("train", values)) == [
        "lm loss",
        "learning-rate",
        "z_loss",
        "moe/load_balancing_loss_layer_0",
    ]
    figures = ["timers/save-checkpoint", "l2_norm/grad/output_layer.weight", "memory/a_b", "num_zeros"]
    assert list(curve_names("train", dict.fromkeys([*figures, "power_watts_per_device"], 1))) == [
        "save-checkpoint-time",
        "l2_norm/grad/output_layer.weight",
        "memory/a_b",
        "num-zeros",
        "power/gpu",
    ]
    assert curve_names("validation", {"lm loss": 2, "my_loss": 1}) == {"lm loss validation": 2, "my-loss validation": 1}


def test_a_loss_functions_figures_keep_away_from_the_runs_own_names():
    of_steps = "step_seconds learning_rate grad_norm num_tokens tokens_per_second peak_memory_bytes skipped loss_scale"
    prefixed = [f"{prefix}mine" for prefix in RUNS_OWN_PREFIXES]
    context = CallbackContext(
        None,
        [],
        loss_dict={name: 7.0 for name in (*RUNS_OWN, *prefixed)},
        learning_rate=1e-3,
        skipped_iter=False,
        step_seconds=1.0,
        tokens_per_second=1.0,
        fp16_loss_scale=2.0,
        figures=dict.fromkeys(RUNS_OWN - {"step", "split", "elapsed_seconds", *of_steps.split()}, 1.0),
    )
    values = step_values(context)
    own = set(values) - {f"reported {name}" for name in (*RUNS_OWN, *prefixed)}
    assert own == RUNS_OWN - {"step", "split", "elapsed_seconds"} and values["learning_rate"] == 1e-3
    assert values["reported step"] == values["reported learning_rate"] == 7.0


def test_of_one_name_the_loss_functions_figure_is_shown():
    context = CallbackContext(None, [], loss_dict={"lm loss": 2.0, "z_loss": 1.0})
    context.router_losses = {"z_loss": 5.0, "load_balancing_loss": 1.5}
    assert list(step_losses(context).items()) == [("lm loss", 2.0), ("z_loss", 1.0), ("load_balancing_loss", 1.5)]


def test_a_run_that_fails_is_told_so(tmp_path):
    told = []
    logger = MetricsFile(tmp_path / "metrics.jsonl")
    logger.close = lambda *, failed: told.append(failed)
    with pytest.raises(RuntimeError), open_loggers([logger], None):
        raise RuntimeError
    with open_loggers([logger], None):
        pass
    assert told == [True, False] and os.environ.get("RANK", "0") == "0"


def test_a_picture_of_the_losses(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib, of the extra demo, is not installed")
    from megatron.bridge.plot import curves, draw

    path = tmp_path / "metrics.jsonl"
    state, file = _state(), MetricsFile(path)
    _write([file], state, [1, 2])
    with open_loggers([file], state):
        file.write(state, "validation", {"lm loss": 1.5, "num_tokens": 3})
        file.write(state, "test", {"loss_scale": 2.0**32, "z_loss": 60.0, "skipped": True})
    assert curves(path) == {("lm loss", "train"): [(1, 2.0), (2, 1.0)], ("lm loss", "validation"): [(2, 1.5)]}
    assert draw([path], tmp_path / "loss.png") == 2 and (tmp_path / "loss.png").stat().st_size > 1000
    with pytest.raises(ValueError, match=r"no numbers named \['grad_norm'\]: nothing to draw"):
        draw([path], tmp_path / "none.png", wanted=["grad_norm"])


def test_a_metrics_file_that_is_not_there_is_named(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib, of the extra demo, is not installed")
    from megatron.bridge.plot import main

    monkeypatch.setattr(sys, "argv", ["plot", f"{tmp_path}/none.jsonl"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert f"plot: error: {tmp_path}/none.jsonl: no such file; name the metrics.jsonl" in capsys.readouterr().err
