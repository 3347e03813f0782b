# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Each way to start a run, on two ranks with the optimizer offloaded: what is restored, what is fresh, what is refused.

`tests/rigs/load.py` says what is compared.
"""

import shutil
from pathlib import Path

import pytest

from megatron.bridge.checkpoint import iterations
from megatron.bridge.training.checkpointing import (
    generate_state_dict,
    get_rng_state,
    load_checkpoint,
    save_checkpoint,
)
from megatron.bridge.training.finetune import finetune
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.utils.replaced import replaced
from tests.rigs.load import (
    SAVED_SEED,
    STATE,
    STILL,
    Witness,
    digest,
    facts_of,
    parts_equal,
    refusals,
    run_case,
    run_cases,
    run_config,
    start_config,
)
from tests.rigs.on_ranks import make_pretrained
from tests.rigs.ranks import run_on_ranks
from tests.unit_tests.models.tiny_llama import save_tiny_llama

PRETRAINED = {"pretrained_checkpoint": "pretrained"}
SAVING_RUNS = {
    "full": dict(train_iters=4, checkpoint={**PRETRAINED, "save": "full", "save_interval": 2}),
    "no_optim": dict(train_iters=2, checkpoint={**PRETRAINED, "save": "no_optim", "save_optim": False}),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("load_cases")
    run_on_ranks(make_pretrained, 2, path / "pretrained")
    shutil.copytree(path / "pretrained" / "iter_0000000", path / "released" / "release")
    iterations.write_tracker(path / "released", 0, release=True)
    (path / "empty").mkdir()
    return path


@pytest.fixture(scope="module")
def saved(directory):
    """The facts of the runs that wrote checkpoints, for each rank."""
    return run_on_ranks(
        run_cases, 2, directory, {name: {"seed": SAVED_SEED, **run} for name, run in SAVING_RUNS.items()}
    )


CASES = {
    "resume": dict(train_iters=6, checkpoint={"load": "full"}),
    "resume, pretrained named too": dict(train_iters=5, checkpoint={"load": "full", **PRETRAINED}),
    "resume again": dict(train_iters=6, checkpoint={"load": "full"}),
    "resume, saving no optimizer": dict(train_iters=5, checkpoint={"load": "full", "save_optim": False}),
    "resume without rng": dict(train_iters=5, checkpoint={"load": "full", "load_rng": False}),
    "load_optim=false": dict(train_iters=5, checkpoint={"load": "full", "load_optim": False}),
    "saved without optimizer": dict(train_iters=3, checkpoint={"load": "no_optim"}),
    "ckpt_step": dict(train_iters=3, checkpoint={"load": "full", "ckpt_step": 2}),
    "finetune=true": dict(train_iters=1, checkpoint={"load": "full", "finetune": True}),
    "pretrained root": dict(train_iters=1, checkpoint=PRETRAINED),
    "pretrained iteration": dict(train_iters=1, checkpoint={"pretrained_checkpoint": "full/iter_0000002"}),
    "pretrained, nothing to resume yet": dict(train_iters=1, checkpoint={"load": "empty", **PRETRAINED}),
    "release": dict(train_iters=1, checkpoint={"load": "released"}),
    "from scratch": dict(train_iters=1, by="pretrain", checkpoint={"load": "new", "save": "new"}),
}
NOTHING_LOADED_OR_A_REPEAT = ("from scratch", "resume again", "resume, pretrained named too")
STILL_CASES = {
    name: {**case, "optimizer": STILL, "scheduler": {"override_opt_param_scheduler": True}}
    for name, case in CASES.items()
    if name not in NOTHING_LOADED_OR_A_REPEAT
}


@pytest.fixture(scope="module")
def runs(directory, saved):
    """The facts of every case, for each rank."""
    return run_on_ranks(run_cases, 2, directory, CASES)


@pytest.fixture(params=[0, 1], ids=["rank 0", "rank 1"])
def rank(request):
    return request.param


def test_resume_restores_everything_and_goes_on(runs, saved, rank):
    before, resumed = saved[rank]["full"], runs[rank]["resume"]
    assert parts_equal(resumed["start"], before["end"]) == STATE
    assert resumed["start"]["step"] == 4 and resumed["start"]["consumed"] == 32
    assert resumed["start"]["adam_steps"] == [4.0] and resumed["start"]["schedule"] == 32
    assert resumed["steps"] == [5, 6]
    assert resumed["planned"] == ["full"]  # once, for setup and load alike
    decay = [1e-4 + (1e-3 - 1e-4) * (1 - step / 100) for step in range(1, 7)]
    assert before["learning_rates"] + resumed["learning_rates"] == pytest.approx(decay)
    assert max(resumed["losses"]) < before["losses"][0]
    assert parts_equal(runs[rank]["resume, pretrained named too"]["start"], before["end"]) == STATE, "load wins"


def test_a_second_resume_in_one_process_starts_at_the_same_step(runs, rank):
    first, second = runs[rank]["resume"], runs[rank]["resume again"]
    assert second["steps"] == [5, 6] and second == first


def test_a_run_that_saves_no_optimizer_resumes_with_the_checkpoints(runs, saved, rank):
    resumed = runs[rank]["resume, saving no optimizer"]
    assert parts_equal(resumed["start"], saved[rank]["full"]["end"]) == STATE
    assert resumed["steps"] == [5]


def test_load_rng_false_keeps_the_runs_own_random_numbers(runs, saved, rank):
    before, resumed = saved[rank]["full"], runs[rank]["resume without rng"]
    assert parts_equal(resumed["start"], before["end"]) == STATE - {"rng"}


def test_ckpt_step_resumes_from_that_step(runs, saved, rank):
    resumed = runs[rank]["ckpt_step"]
    assert resumed["start"]["step"] == 2 and resumed["start"]["consumed"] == 16
    assert resumed["start"]["adam_steps"] == [2.0]
    assert resumed["steps"] == [3]
    assert resumed["losses"] == saved[rank]["full"]["losses"][2:3], "the third step again, bit-exact"


@pytest.mark.parametrize("case", ["load_optim=false", "saved without optimizer"])
def test_weights_step_and_rng_without_optimizer(runs, saved, rank, case):
    run_that_saved = "full" if case == "load_optim=false" else "no_optim"
    before, resumed = saved[rank][run_that_saved], runs[rank][case]
    assert parts_equal(resumed["start"], before["end"]) == {"weights", "rng", "step", "consumed"}
    assert set(resumed["start"]["moments"]) == {"zeros"} and resumed["start"]["adam_steps"] == [0.0]
    assert resumed["start"]["schedule"] == 0 and resumed["start"]["learning_rate"] == 1e-3
    assert resumed["steps"] == [before["end"]["step"] + 1]


@pytest.mark.parametrize(
    ("case", "run_that_saved"),
    [
        ("finetune=true", "full"),
        ("pretrained root", None),
        ("pretrained iteration", None),
        ("pretrained, nothing to resume yet", None),
        ("release", None),
    ],
)
def test_weights_alone_start_a_new_run(runs, saved, rank, case, run_that_saved):
    started = runs[rank][case]
    expected = saved[rank][run_that_saved]["end"] if run_that_saved else saved[rank]["full"]["start"]
    same_weights = started["start"]["weights"] == expected["weights"]
    assert same_weights == (case != "pretrained iteration")
    assert started["start"]["rng"] != saved[rank]["full"]["end"]["rng"]
    assert set(started["start"]["moments"]) == {"zeros"}
    facts = {name: started["start"][name] for name in ("step", "consumed", "schedule", "learning_rate")}
    assert facts == {"step": 0, "consumed": 0, "schedule": 0, "learning_rate": 1e-3}
    assert started["steps"] == [1]


def test_pretrained_iteration_is_that_iteration(runs, rank):

    started, resumed = runs[rank]["pretrained iteration"]["start"], runs[rank]["ckpt_step"]["start"]
    assert parts_equal(started, resumed) == {"weights"}


def test_pretraining_starts_from_scratch_where_load_is_where_it_will_save(runs, saved, rank):
    started = runs[rank]["from scratch"]
    assert started["steps"] == [1]
    assert started["start"]["weights"] != saved[rank]["full"]["start"]["weights"]


def test_a_still_step_after_each_load_leaves_every_weight(directory, saved):
    for facts in run_on_ranks(run_cases, 2, directory, STILL_CASES):
        for case, run in facts.items():
            assert run["learning_rates"] == [0.0] * len(run["steps"]) and run["steps"], case
            assert run["end"]["weights"] == run["start"]["weights"], case


def _hf_runs(directory):
    """A Hugging Face directory as the start, moving and still: its tensors' names and shapes are another model's."""
    from megatron.bridge.models.conversion.auto_bridge import AutoBridge

    results = []
    for optimizer in ({}, STILL):
        cfg = start_config(directory, train_iters=1, optimizer=optimizer, checkpoint={"pretrained_checkpoint": "hf"})
        provider = AutoBridge.from_hf_pretrained(f"{directory}/hf").to_megatron_provider(load_weights=False)
        provider.seq_length, provider.calculate_per_token_loss = 16, True
        cfg.model, cfg.tokenizer.vocab_size = provider, provider.vocab_size
        results.append(run_config(cfg))
    return results, _embedding_in(f"{directory}/hf")


def _embedding_in(hf_directory):
    from safetensors.torch import load_file

    return digest(load_file(f"{hf_directory}/model.safetensors")["model.embed_tokens.weight"].bfloat16())


def test_a_hugging_face_directory_starts_a_new_run(directory):
    save_tiny_llama(directory / "hf", vocab_size=128)
    for (moving, still), embedding in run_on_ranks(_hf_runs, 2, directory):
        assert embedding in moving["start"]["weights"].values()
        assert moving["steps"] == still["steps"] == [1]
        assert moving["end"]["weights"] != moving["start"]["weights"]
        assert still["end"]["weights"] == still["start"]["weights"] == moving["start"]["weights"]


REFUSED = {
    "missing iteration": (
        dict(train_iters=5, checkpoint={"load": "full", "ckpt_step": 3}),
        ["FileNotFoundError", "has no iteration 3 (checkpoint.ckpt_step); there: 2, 4"],
    ),
    "finetune of nothing": (
        dict(train_iters=1),
        ["FileNotFoundError", "neither checkpoint.load nor checkpoint.pretrained_checkpoint is set"],
    ),
    "finetune, load missing": (
        dict(train_iters=1, checkpoint={"load": "empty_too", "save": "empty_too"}),
        ["FileNotFoundError", "empty_too' holds no checkpoint", "checkpoint.pretrained_checkpoint is not set"],
    ),
    "pretrained missing": (
        dict(train_iters=1, checkpoint={"pretrained_checkpoint": "nowhere"}),
        ["nowhere", "checkpoint.pretrained_checkpoint"],
    ),
    "pretrain, load missing": (
        dict(train_iters=1, by="pretrain", checkpoint={"load": "nowhere", "save": "elsewhere"}),
        ["FileNotFoundError", "nowhere' holds no checkpoint", "would start from random weights"],
    ),
    "exit_on_missing_checkpoint": (
        dict(
            train_iters=1,
            by="pretrain",
            checkpoint={"load": "empty_too", "save": "empty_too", "exit_on_missing_checkpoint": True},
        ),
        ["FileNotFoundError", "holds no checkpoint", "checkpoint.exit_on_missing_checkpoint=true"],
    ),
    "another schedule": (
        dict(train_iters=5, checkpoint={"load": "full"}, optimizer={"lr": 5e-4}),
        ["ValueError", "iter_0000004", "optimizer.lr 0.001 -> 0.0005", "scheduler.override_opt_param_scheduler=true"],
    ),
}


def test_each_wrong_start_is_refused_before_the_first_step(directory, saved):
    cases = {name: options for name, (options, _) in REFUSED.items()}
    for answers in run_on_ranks(refusals, 2, directory, cases):
        for case, error in answers.items():
            for text in REFUSED[case][1]:
                assert text in error, (case, error)
            assert "\n" not in error, case


SCHEDULES = {
    "this run's": dict(scheduler={"override_opt_param_scheduler": True}, optimizer={"lr": 5e-4, "min_lr": 0.0}),
    "the checkpoint's": dict(
        scheduler={"use_checkpoint_opt_param_scheduler": True}, optimizer={"lr": 5e-4, "min_lr": 0.0}
    ),
}


def test_a_resume_takes_the_schedule_that_it_is_told_to_take(directory, saved):
    cases = {name: dict(train_iters=6, checkpoint={"load": "full"}, **options) for name, options in SCHEDULES.items()}
    for facts in run_on_ranks(run_cases, 2, directory, cases):
        ours = [5e-4 * (1 - step / 100) for step in (4, 5, 6)]
        saved_ones = [1e-4 + 9e-4 * (1 - step / 100) for step in (4, 5, 6)]
        for case, expected in (("this run's", ours), ("the checkpoint's", saved_ones)):
            rates = [facts[case]["start"]["learning_rate"], *facts[case]["learning_rates"]]
            assert rates == pytest.approx(expected), case
            assert facts[case]["start"]["adam_steps"] == [4.0]


def _saved_twice_keeping_one(directory):
    run_case(
        directory, train_iters=2, checkpoint={"save": "kept", "save_interval": 1, "most_recent_k": 1, **PRETRAINED}
    )
    return _what_is_left(Path(directory, "kept"))


def _saved_below_a_newer_iteration(directory):
    """Step 3 is saved where an abandoned step 4 lies: the tracker names 3, and 3 must stay."""
    checkpoint = {"save": "forked", "load": "forked", "ckpt_step": 2, "most_recent_k": 1}
    run_case(directory, train_iters=3, checkpoint=checkpoint)
    return _what_is_left(Path(directory, "forked"))


def _what_is_left(root):
    return [iteration for iteration, _ in iterations.iterations(root)], iterations.read_tracker(root).iteration


def test_pruning_never_removes_the_trackers_iteration(directory, saved):
    assert run_on_ranks(_saved_twice_keeping_one, 2, directory) == [([2], 2)] * 2
    shutil.copytree(directory / "full", directory / "forked")
    assert run_on_ranks(_saved_below_a_newer_iteration, 2, directory) == [([3, 4], 3)] * 2


class ByHand(Witness):
    """Restores the step alone when its run starts, and saves what it built itself when the run ends."""

    def __init__(self, directory):
        super().__init__()
        self.directory = directory

    def on_train_start(self, context):
        super().on_train_start(context)
        state, before = context.state, context.state.train_state
        with replaced(state.cfg.checkpoint, load=f"{self.directory}/full", ckpt_step=2):
            found, _ = load_checkpoint(
                state, context.model, context.optimizer, context.scheduler, skip_load_to_model_and_opt=True
            )
            assert found == state.train_state.step == 2
            self.alone = parts_equal(facts_of(context), self.start)
        state.train_state = before

    def on_train_end(self, context):
        super().on_train_end(context)
        state, parts = context.state, (context.model, context.optimizer, context.scheduler)
        content = generate_state_dict(state.cfg.checkpoint, *parts, get_rng_state(False), state.train_state.step)
        with replaced(state.cfg.checkpoint, save=f"{self.directory}/built"):
            save_checkpoint(state, *parts, prebuilt_state_dict=content)


def _by_hand(directory):
    witness = ByHand(directory)
    finetune(start_config(directory, train_iters=5, checkpoint={"load": "full"}), forward_step, callbacks=[witness])
    resumed = run_case(directory, train_iters=6, checkpoint={"load": "built"})
    return witness.alone, parts_equal(witness.end, resumed["start"])


def test_a_script_restores_the_step_alone_and_saves_what_it_built(directory, saved):
    for alone, restored in run_on_ranks(_by_hand, 2, directory):
        assert alone == STATE - {"step", "consumed"}
        assert restored == STATE
