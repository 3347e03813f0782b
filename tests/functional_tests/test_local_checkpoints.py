# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Which local checkpoint a load takes, on two ranks, and which ones are passed over, refused or named as damaged."""

import logging
import shutil

import pytest
import torch

from megatron.bridge.checkpoint import iterations
from megatron.bridge.utils.replaced import replaced
from tests.rigs.load import refusal
from tests.rigs.non_persistent import config_of, files_of, needs_the_package, run_saving
from tests.rigs.on_ranks import make_pretrained
from tests.rigs.ranks import run_on_ranks


def _plans(directory, options_by_name):
    """(where each load would come from, its error, what is said) on this rank."""
    from megatron.bridge.training.checkpointing import init_checkpointing_context, plan_on_all_ranks
    from megatron.bridge.training.config.precedence import apply_mixed_precision

    answers = {}
    for name, options in options_by_name.items():
        heard = _Heard()
        logging.getLogger("megatron.bridge").addHandler(heard)
        try:
            cfg = config_of(directory, **options)
            apply_mixed_precision(cfg)
            plan = plan_on_all_ranks(cfg, init_checkpointing_context(cfg))
            answers[name] = str(plan.path.relative_to(directory)), None, heard.messages
        except Exception as error:
            answers[name] = None, f"{type(error).__name__}: {error}", heard.messages
        finally:
            logging.getLogger("megatron.bridge").removeHandler(heard)
    return answers


class _Heard(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


def _plan(directory, **options):
    """Each rank's answer for one load."""
    return [answers["it"] for answers in run_on_ranks(_plans, 2, directory, {"it": options})]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Local checkpoints of step 4 (in `local`) and 2 (in `older`), persistent ones of 2 to 4 (in `full`)."""
    directory = tmp_path_factory.mktemp("both")
    run_on_ranks(make_pretrained, 2, directory / "pretrained")
    run_on_ranks(run_saving, 2, directory, train_iters=2)
    (directory / "local").rename(directory / "older")
    run_on_ranks(run_saving, 2, directory)
    off = {"non_persistent_save_interval": None, "non_persistent_local_ckpt_dir": None}
    run_on_ranks(run_saving, 2, directory, kind=None, checkpoint={**off, "save": "full", "save_interval": 1})
    shutil.rmtree(directory / "full" / "iter_0000001")
    return directory


LOCAL = tuple(f"local/{file}" for file in files_of(4))
PLANS = {
    "local alone": ({}, LOCAL),
    "newer than the persistent one": ({"load": "two"}, LOCAL),
    "as new as the persistent one": ({"load": "full"}, LOCAL),
    "older than the persistent one": ({"load": "full", "non_persistent_local_ckpt_dir": "older"}, "full/iter_0000004"),
    "a persistent directory that is empty yet": ({"load": "new", "save": "new"}, LOCAL),
    "ckpt_step": ({"load": "full", "ckpt_step": 3}, "full/iter_0000003"),
    "one iteration's directory": ({"load": "full/iter_0000003"}, "full/iter_0000003"),
    "finetune=true": ({"load": "full", "finetune": True}, "full/iter_0000004"),
    "no local one yet": ({"load": "full", "non_persistent_local_ckpt_dir": "nothing"}, "full/iter_0000004"),
    "nothing at all yet": ({"non_persistent_local_ckpt_dir": "nothing"}, "pretrained/iter_0000000"),
}


@needs_the_package
def test_the_newest_of_local_and_persistent_wins(both):
    if not (both / "two").exists():
        shutil.copytree(both / "full", both / "two")
        iterations.write_tracker(both / "two", 2)
        for later in (3, 4):
            shutil.rmtree(both / "two" / f"iter_{later:07d}")
    cases = {name: {"checkpoint": checkpoint} for name, (checkpoint, _) in PLANS.items()}
    for rank, answers in enumerate(run_on_ranks(_plans, 2, both, cases)):
        for name, (_, expected) in PLANS.items():
            wanted = expected if isinstance(expected, str) else expected[rank]
            assert answers[name] == (wanted, None, []), name


@needs_the_package
def test_a_file_that_one_rank_lacks_is_passed_over_and_the_log_says_so(both):
    shutil.copytree(both / "local", both / "partial")
    (both / "partial" / files_of(4)[1]).unlink()
    partial = {"non_persistent_local_ckpt_dir": "partial"}
    for rank, answer in enumerate(_plan(both, checkpoint={**partial, "load": "full"})):
        said = [f"the local checkpoint of step 4 in {both}/partial is passed over: rank(s) 1 have no file of it"]
        assert answer == ("full/iter_0000004", None, said if rank == 0 else [])
    shutil.copytree(both / "older" / "1", both / "partial" / "1", dirs_exist_ok=True)
    shutil.copytree(both / "older" / "0", both / "partial" / "0", dirs_exist_ok=True)
    for rank, answer in enumerate(_plan(both, checkpoint=partial)):
        assert answer[:2] == (f"partial/{files_of(2)[rank]}", None), "the older one is whole"


@needs_the_package
@pytest.mark.parametrize("damage", ["cut off", "empty", "not ours", "dangerous"])
def test_a_damaged_file_is_named_on_all_ranks(both, damage):
    place = both / damage.replace(" ", "_")
    shutil.copytree(both / "local", place)
    path = place / files_of(4)[1]
    if damage == "dangerous":
        torch.save({"a": _Dangerous()}, path)
    elif damage == "not ours":
        torch.save({"a": torch.zeros(1)}, path)
    else:
        path.write_bytes(path.read_bytes()[: 0 if damage == "empty" else -100])
    for rank, (_, error, _) in enumerate(_plan(both, checkpoint={"non_persistent_local_ckpt_dir": place.name})):
        assert error.startswith("ValueError: " if rank == 1 else "RuntimeError: ")
        assert f"{path} can't be read as a local checkpoint: " in error and "; remove it, and the run resumes" in error
        assert "\n" not in error


class _Dangerous:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


@needs_the_package
def test_a_changed_byte_in_a_tensor_is_an_error_that_names_the_file(both):
    shutil.copytree(both / "local", both / "flipped")
    path = both / "flipped" / files_of(4)[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    checkpoint = {"non_persistent_local_ckpt_dir": "flipped"}
    for error in run_on_ranks(refusal, 2, run_saving, both, train_iters=5, checkpoint=checkpoint):
        assert f"{path} can't be read as a local checkpoint: " in error and "\n" not in error


@needs_the_package
def test_another_layout_is_refused(both):
    for rank, (_, error, _) in enumerate(_plan(both, model={"tensor_model_parallel_size": 2})):
        assert (
            f"{both}/{LOCAL[rank]}" in error and "was saved under model.tensor_model_parallel_size 1 -> 2, and" in error
        )
        assert "remove the directory's files to resume from the newest persistent checkpoint" in error


@needs_the_package
def test_another_model_is_refused_before_anything_is_exchanged(both):
    for error in run_on_ranks(refusal, 2, run_saving, both, train_iters=5, model={"ffn_hidden_size": 64}):
        assert "linear_fc1.weight as this run's rank " in error and "\n" not in error


def _step_alone(directory):
    from megatron.bridge.training.checkpointing import load_checkpoint
    from megatron.bridge.training.config.precedence import apply_mixed_precision
    from megatron.bridge.training.run_state import content
    from megatron.bridge.training.state import GlobalState

    state = GlobalState(config_of(directory))
    apply_mixed_precision(state.cfg)
    with replaced(content, update_num_microbatches=lambda **options: None):  # there is no run to count them
        step, _ = load_checkpoint(state, [], None, None, skip_load_to_model_and_opt=True)
    return step, state.train_state.step


@needs_the_package
def test_the_step_alone_can_be_restored(both):
    assert run_on_ranks(_step_alone, 2, both) == [(4, 4)] * 2


def _read_with_a_context_of_its_own(directory):
    from megatron.bridge.training.checkpointing import init_checkpointing_context, plan_on_all_ranks
    from megatron.bridge.training.config.precedence import apply_mixed_precision
    from megatron.bridge.training.run_state.local import read_local
    from megatron.bridge.utils.distributed import model_parallel_groups

    cfg = config_of(directory)
    apply_mixed_precision(cfg)
    plan = plan_on_all_ranks(cfg, init_checkpointing_context(cfg))
    with model_parallel_groups():
        return int(read_local(init_checkpointing_context(cfg), {}, path=plan.path)["train_state"]["step"])


@needs_the_package
def test_a_manager_that_wraps_the_default_one_reads_what_setup_planned(both):
    assert run_on_ranks(_read_with_a_context_of_its_own, 2, both) == [4, 4]
