# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Runs that start in some way, and what they have in hand before the first step and after the last.

A run's facts are digests of exact bits, so "restored" is equality with the run that saved, and "fresh" is difference.
"""

import contextlib
import hashlib

import torch

from megatron.bridge.utils.replaced import replaced
from tests.rigs.on_ranks import Recorder
from tests.rigs.tiny import tiny_config

OFFLOAD = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 1.0}
STILL = {"lr": 0.0, "min_lr": 0.0, "weight_decay": 0.0}
SAVED_SEED, RESUMED_SEED = 4321, 1234
STATE = {"weights", "masters", "moments", "adam_steps", "rng", "learning_rate", "schedule", "step", "consumed"}
"""The parts of a run's facts."""


class Witness(Recorder):
    """What a run has in hand before its first step and after its last, as digests."""

    def __init__(self):
        super().__init__()
        self.start, self.end, self.steps = {}, {}, []

    def on_train_start(self, context):
        super().on_train_start(context)
        self.start = facts_of(context)

    def on_train_step_end(self, context):
        super().on_train_step_end(context)
        self.steps.append(context.state.train_state.step)

    def on_train_end(self, context):
        super().on_train_end(context)
        self.end = facts_of(context)


def facts_of(context):
    from megatron.bridge.training.monitoring.progress import learning_rate
    from megatron.bridge.training.run_state.rng import current_states

    train_state = context.state.train_state
    return {
        "weights": {
            f"{index}.{name}": digest(param)
            for index, chunk in enumerate(context.model)
            for name, param in chunk.named_parameters()
        },
        "masters": [digest(master) for master, _ in _masters(context.optimizer)],
        "moments": [digest(state.get("exp_avg")) for _, state in _masters(context.optimizer)],
        "adam_steps": sorted({float(state.get("step", 0)) for _, state in _masters(context.optimizer)}),
        "rng": digest(current_states()["torch_rng_state"]),
        "learning_rate": learning_rate(context),
        "schedule": context.scheduler.num_steps,
        "step": train_state.step,
        "consumed": train_state.consumed_train_samples,
    }


def _masters(optimizer):
    """Each FP32 copy that is stepped on, with its Adam state, in order."""
    from megatron.bridge.training.cpu_offload.param_copies import find_hybrid_optimizers

    found = []
    for distributed_optimizer in find_hybrid_optimizers(optimizer):
        for sub_optimizer in distributed_optimizer.optimizer.sub_optimizers:
            for group in sub_optimizer.param_groups:
                found += [(param, sub_optimizer.state.get(param, {})) for param in group["params"]]
    assert found, "nothing is offloaded: this test looks at the offloaded optimizer"
    return found


def digest(tensor):
    if tensor is None or not bool(torch.count_nonzero(tensor)):
        return "zeros"  # Adam's state before its first step: absent or zero
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(data).hexdigest()[:16]


def start_config(directory, *, train_iters, seed=RESUMED_SEED, optimizer=None, checkpoint=None, **sections):
    checkpoint = {
        name: f"{directory}/{value}" if name in ("save", "load", "pretrained_checkpoint") and value else value
        for name, value in {"save": None, **(checkpoint or {})}.items()
    }
    optimizer = {**OFFLOAD, **(optimizer or {})}
    return tiny_config(
        directory,
        train_iters=train_iters,
        optimizer=optimizer,
        checkpoint=checkpoint,
        rng={"seed": seed},
        **sections,
    )


def run_case(directory, *, by="finetune", **options):
    return run_config(start_config(directory, **options), by=by)


def run_config(cfg, *, by="finetune"):
    """Run and return the facts, as plain data."""
    from megatron.bridge.training.finetune import finetune
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain

    witness = Witness()
    with planned_directories() as planned:
        {"finetune": finetune, "pretrain": pretrain}[by](cfg, forward_step, callbacks=[witness])
    return {
        "planned": planned,
        "start": witness.start,
        "end": witness.end,
        "losses": witness.losses,
        "learning_rates": witness.learning_rates,
        "steps": witness.steps,
    }


@contextlib.contextmanager
def planned_directories():
    """Inside, the names of the checkpoints that loads are planned from are noted, each time that one is."""
    from megatron.bridge.training.run_state import load_plan

    names, read = [], load_plan.read_run_config
    with replaced(load_plan, read_run_config=lambda path: names.append(path.parent.name) or read(path)):
        yield names


def run_cases(directory, options_by_name):
    return {name: run_case(directory, **options) for name, options in options_by_name.items()}


def refusal(run, directory, **options):
    """The error of a run that must end with one."""
    try:
        facts = run(directory, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return f"no error: it took the steps {facts['steps']}"


def refusals(directory, options_by_name):
    return {name: refusal(run_case, directory, **options) for name, options in options_by_name.items()}


def parts_equal(first, second):
    """Which parts of two sets of facts are equal, bit-exact."""
    return {name for name in first if first[name] == second[name]}
