# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A Slurm of one machine: `sbatch`, `srun`, `scontrol`, `sacct`, `squeue` and `scancel` as small programs on PATH.

A job is the batch script run here. Like Slurm's, it gets the signal that `--signal` asks for (here: when the file
SIGNAL_WHEN appears), and starts again when `scontrol requeue` asks for that.
"""

import os
import sys
from pathlib import Path

HEAD = f"""#!{sys.executable}
import json, os, re, signal, subprocess, sys, time
from pathlib import Path

state = Path(os.environ["SLURM_STUB"])
with open(state / "calls.jsonl", "a") as file:
    file.write(json.dumps([Path(sys.argv[0]).name, *sys.argv[1:]]) + "\\n")
"""

SBATCH = """
*options, script = sys.argv[1:]
flags = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", Path(script).read_text(), flags=re.MULTILINE))
job = {
    "SLURM_JOB_ID": "4242",
    "SLURM_JOB_NODELIST": "node-1",
    "SLURM_NNODES": flags["nodes"],
    "SLURM_NODEID": "0",
    "SLURM_NTASKS_PER_NODE": flags["ntasks-per-node"],
    "SLURM_JOB_END_TIME": str(int(time.time()) + int(os.environ.get("SECONDS_LEFT", 3600))),
}
print("4242", flush=True)
(state / "state").write_text("RUNNING")
if os.fork():
    os._exit(0)
os.setsid()
(state / "pid").write_text(str(os.getpid()))
output = open(flags["output"].strip("'").replace("%j", "4242"), "a")
os.dup2(output.fileno(), 1)  # who called waits for the end of what sbatch prints
os.dup2(output.fileno(), 2)
for restart in range(5):
    job["SLURM_RESTART_COUNT"] = str(restart)
    (state / "requeue").unlink(missing_ok=True)
    process = subprocess.Popen(["bash", script], env=os.environ | job)
    when = os.environ.get("SIGNAL_WHEN")
    while process.poll() is None:
        if when and restart == 0 and "signal" in flags and Path(when).exists():
            name = flags["signal"].strip("'").partition("@")[0]
            os.kill(int((state / "step").read_text()), getattr(signal, "SIG" + name))
            when = None
        time.sleep(0.05)
    if not (state / "requeue").exists():
        break
(state / "state").write_text("FAILED" if process.returncode else "COMPLETED")
"""

SRUN = """
options, command = {}, sys.argv[1:]
with_value = ("-w", "--output", "--error", "--container-image", "--container-mounts", "--container-workdir", "--chdir")
while command[0].startswith("-"):
    name, equals, value = command.pop(0).partition("=")
    options[name] = value if equals else command.pop(0) if name in with_value else ""
if "--output" in options:
    os.chdir(options["--chdir"])
    (state / "step").write_text(str(os.getpid()))
    output = os.open(options["--output"].replace("%j", "4242"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
os.execvp(command[0], command)
"""

SCONTROL = """
if sys.argv[1] == "requeue":
    (state / "requeue").touch()
else:
    print("node-1")
"""

SACCT = """
print("JobID|JobName|State\\n4242|account-account.training|" + (state / "state").read_text())
"""

SCANCEL = """
(state / "state").write_text("CANCELLED by 0")
os.killpg(int((state / "pid").read_text()), signal.SIGTERM)
"""


def slurm_on_path(directory: Path) -> dict[str, str]:
    """Write the programs into a folder.

    Returns:
        The environment in which they are found; they keep their notes in `directory`, `calls.jsonl` among them.
    """
    programs = {"sbatch": SBATCH, "srun": SRUN, "scontrol": SCONTROL, "sacct": SACCT, "squeue": "", "scancel": SCANCEL}
    folder = directory / "bin"
    folder.mkdir(parents=True)
    for name, text in programs.items():
        (folder / name).write_text(HEAD + text)
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "SLURM_STUB": str(directory)}
