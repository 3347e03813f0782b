# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What docs/launching.md shows: its commands and its Python, as dry runs."""

import importlib.util
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("nemo_run") is None:
    pytest.skip("nemo_run is not installed: pip install 'megatron-bridge[recipes]'", allow_module_level=True)

from megatron.bridge.recipes.nemo_run_jobs import dry_run
from megatron.bridge.recipes.run_plugins import PreemptionPlugin

pytestmark = pytest.mark.any_core

ROOT = Path(__file__).resolve().parents[3]
LAUNCHER = ROOT / "scripts" / "training" / "launch_with_nemo_run.py"
TEXT = (ROOT / "docs" / "launching.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)
COMMANDS = re.findall(
    r"^python (scripts/training/launch_with_nemo_run\.py .*)$", TEXT.replace("\\\n", " "), re.MULTILINE
)


def test_there_is_something_to_check():
    assert len(COMMANDS) == 2 and len(BLOCKS) == 2


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("task", ["script", "partial"])
def test_each_command_makes_a_job(command, task, monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(sys, "argv", [*shlex.split(command), "--task", task, "--dry-run"])
    main = runpy.run_path(str(LAUNCHER))["main"]
    assert main() == 0, capfd.readouterr().err
    output = capfd.readouterr().out
    path = Path(output.rpartition("see ")[2].strip())
    assert path.exists() and "each machine would run: torchrun " in output
    if "slurm" in command:
        text = path.read_text()
        assert "#SBATCH --signal=TERM@300\n" in text and "--nproc-per-node 8" in text
        assert ("run_recipe.py --recipe llama31_8b --mode sft" in text) == (task == "script")


def test_the_experiment_in_python_makes_a_batch_script(tmp_path):
    (tmp_path / "experiment.py").write_text(BLOCKS[0])
    environment = {**os.environ, "NEMORUN_HOME": str(tmp_path), "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "200"}
    command = [sys.executable, "-W", "ignore", "experiment.py"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    for line in ("#SBATCH --signal=TERM@300", "export PET_MAX_RESTARTS=3", "export TORCHX_MAX_RETRIES=1"):
        assert line in result.stdout


KUBECONFIG = """
apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "http://127.0.0.1:1"}}]
contexts: [{name: c, context: {cluster: c, user: u}}]
current-context: c
users: [{name: u, user: {}}]
"""


@pytest.mark.parametrize(("name", "package"), [("lepton", "leptonai"), ("kubernetes", "kubernetes")])
def test_other_clusters_take_the_same_task(name, package, monkeypatch, tmp_path):
    """SkyPilot's executor can't be made without its package."""
    pytest.importorskip(package, reason=f"{package} is not installed")
    import nemo_run as run

    (tmp_path / "config").write_text(KUBECONFIG)
    if name == "kubernetes":
        place = "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION"
        monkeypatch.setattr(place, str(tmp_path / "config"))
    (source,) = re.findall(rf"^{name} = .*?^\)", BLOCKS[1], flags=re.DOTALL | re.MULTILINE)
    executor = eval(source.partition(" = ")[2], {"run": run})
    task = run.Script(path="/code/train.py", entrypoint="python", args=["a=[0, 1]"])
    directory, command = dry_run(task, executor, title=name, plugins=[PreemptionPlugin()])
    assert directory.is_dir()
    assert re.search(r"--nnodes 2 --nproc-per-node 8 .*train.py 'a=\[0, 1\]' train.exit_signal_handler=true$", command)
