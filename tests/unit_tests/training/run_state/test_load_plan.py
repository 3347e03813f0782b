# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Every load case as a row: what is on disk and in the configuration, and what is restored or why it is refused."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint

from megatron.bridge.checkpoint import iterations
from megatron.bridge.checkpoint.sharded_state import read_common_state
from megatron.bridge.training.run_state.local import CORE_RELEASE
from tests.rigs.on_ranks import Recorder, make_pretrained, run_finetune
from tests.rigs.ranks import run_on_ranks
from tests.rigs.tiny import tiny_config
from tests.unit_tests.models.tiny_llama import save_tiny_llama
from tests.unit_tests.training.run_state.load_plan_cases import (
    FULL_2,
    LOCAL,
    LOCAL_PLANS,
    PLANS,
    REFUSALS,
    REFUSALS_OF_PRETRAIN,
)


def _make_checkpoints(directory):
    make_pretrained(f"{directory}/pretrained")
    pretrained = {"pretrained_checkpoint": f"{directory}/pretrained"}
    for name, fields in {
        "full": {"save_interval": 1},
        "no_optim": {"save_optim": False},
        "no_rng": {"save_rng": False},
        "any_layout": {"dist_ckpt_optim_fully_reshardable": True},
    }.items():
        checkpoint = {**pretrained, **fields, "save": f"{directory}/{name}"}
        run_finetune(tiny_config(directory, train_iters=2, checkpoint=checkpoint))


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    """Real checkpoints, each written once, and some that were broken afterwards."""
    directory = tmp_path_factory.mktemp("plans")
    run_on_ranks(_make_checkpoints, 1, directory)
    save_tiny_llama(directory / "hf")
    shutil.copytree(directory / "pretrained" / "iter_0000000", directory / "released" / "release")
    iterations.write_tracker(directory / "released", 0, release=True)
    for name, broken in (("half", "metadata.json"), ("no_config", "run_config.yaml"), ("damaged", "run_config.yaml")):
        shutil.copytree(directory / "full", directory / name)
        (directory / name / "iter_0000002" / broken).unlink()
        (directory / name / "iter_0000002" / "manifest.json").unlink()  # it would speak first
    (directory / "damaged" / "iter_0000002" / "run_config.yaml").write_text("model: [1,")
    (directory / "empty").mkdir()
    return directory


def plan_of(directory, options, *, load_required=True, local=None):
    """The plan of a finetune (or a pretraining) whose checkpoint options name directories of the fixture."""
    from megatron.bridge.training.config.precedence import apply_mixed_precision
    from megatron.bridge.training.run_state.load_plan import plan_load

    checkpoint = dict(options)
    model = checkpoint.pop("model", {})
    for option in ("load", "save", "pretrained_checkpoint", "non_persistent_global_ckpt_dir"):
        if checkpoint.get(option) is not None:
            checkpoint[option] = f"{directory}/{checkpoint[option]}"
    cfg = tiny_config(directory, checkpoint={"save": None, **checkpoint}, model=model)
    apply_mixed_precision(cfg)
    before = repr(cfg)
    try:
        return plan_load(cfg, local, load_required=load_required)
    finally:
        assert repr(cfg) == before, "a plan only reads the configuration"


@pytest.mark.parametrize("case", PLANS)
def test_plan(on_disk, case):
    options, path, restored, reasons = PLANS[case]
    plan = plan_of(on_disk, options)
    assert plan.path == on_disk / path
    assert plan.source.name == ("HUGGING_FACE" if path == "hf" else "MEGATRON")
    assert {name: getattr(plan, name) for name in restored} == restored
    assert plan.reasons == reasons
    assert plan_of(on_disk, options) == plan, "asked again, the same"


@pytest.mark.parametrize("case", REFUSALS)
def test_a_finetune_is_refused(on_disk, case):
    options, error, message = REFUSALS[case]
    with pytest.raises(error, match=message) as refusal:
        plan_of(on_disk, options)
    assert "\n" not in str(refusal.value)


def _by_verb(directory):
    """What each verb does with one configuration that names nothing to load: its error, or the steps it took."""
    from megatron.bridge.training.finetune import finetune
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain

    cfg = tiny_config(directory, train_iters=1)
    facts = []
    for verb in (finetune, pretrain, finetune, pretrain):
        recorder = Recorder()
        try:
            verb(cfg, forward_step, callbacks=[recorder])
            facts.append(len(recorder.losses))
        except FileNotFoundError as error:
            facts.append(str(error))
    return facts


def test_the_verb_alone_says_whether_a_run_must_find_weights(tmp_path):
    facts = run_on_ranks(_by_verb, 1, tmp_path)[0]
    assert facts[1] == facts[3] == 1, "a finetune before leaves nothing behind"
    assert "finetune needs weights to start from" in facts[0] and facts[2] == facts[0]


@pytest.mark.parametrize("case", REFUSALS_OF_PRETRAIN)
def test_a_pretraining_is_refused(on_disk, case):
    options, message = REFUSALS_OF_PRETRAIN[case]
    with pytest.raises(FileNotFoundError, match=message):
        plan_of(on_disk, options, load_required=False)


@pytest.mark.parametrize("options", [{}, {"save": "empty"}, {"load": "empty", "save": "./empty"}])
def test_a_pretraining_may_start_from_scratch(on_disk, options):
    assert plan_of(on_disk, options, load_required=False) is None


def test_a_pretraining_resumes(on_disk):
    assert plan_of(on_disk, {"load": "full", "save": "full"}, load_required=False).train_state


def changed_copy(on_disk, tmp_path, **common):
    """A copy of the checkpoint `full`, named `changed`, with another common state beside its tensors."""
    directory = tmp_path / "changed" / "iter_0000002"
    shutil.copytree(on_disk / "full", directory.parent)
    (directory / "manifest.json").unlink()
    torch.save(common, directory / "common.pt")
    return directory


@pytest.mark.parametrize("sharding_type", ["fully_sharded_model_space", "dp_zero_gather_scatter"])
def test_optimizer_state_in_a_format_that_cannot_be_read_is_refused(on_disk, tmp_path, sharding_type):
    common = read_common_state(on_disk / "full" / "iter_0000002")
    common["content_metadata"]["distrib_optim_sharding_type"] = sharding_type
    changed_copy(on_disk, tmp_path, **common)
    with pytest.raises(ValueError, match=f"in the format {sharding_type}, which can't be read.*load_optim=false"):
        plan_of(tmp_path, {"load": "changed"})
    assert not plan_of(tmp_path, {"load": "changed", "load_optim": False}).optimizer


@pytest.mark.parametrize(
    ("key", "is_optimizers"),
    [("optimizer.state.exp_avg", True), ("chained_1.optimizer.distributed.param", True), ("decoder.optimizer.", False)],
)
def test_optimizer_state_is_found_where_the_common_state_has_none(on_disk, tmp_path, key, is_optimizers):
    """As where the first rank trains nothing; with experts the names have a number before them."""
    directory = changed_copy(on_disk, tmp_path)
    for file in directory.glob("*.distcp"):
        file.unlink()
    tensors = {"decoder.weight": torch.zeros(1), key: torch.zeros(1)}
    torch.distributed.checkpoint.save(tensors, checkpoint_id=directory, no_dist=True)
    assert plan_of(tmp_path, {"load": "changed"}).optimizer is is_optimizers


def test_a_plan_says_what_it_restores_and_why_not(on_disk):
    assert str(plan_of(on_disk, {"load": "full"})) == (
        f"{on_disk}/full/iter_0000002: restoring weights, optimizer, schedule, rng, step"
    )
    assert str(plan_of(on_disk, {"load": "no_optim", "load_rng": False})) == (
        f"{on_disk}/no_optim/iter_0000002: restoring weights, step; not optimizer, schedule, rng "
        "(optimizer: the checkpoint has none; rng: checkpoint.load_rng=false)"
    )


@pytest.mark.parametrize(("vocab_size", "fits"), [(128, True), (127, False), (256, False)])
def test_check_vocabulary(on_disk, vocab_size, fits):
    """127 is padded to 128 as well: the shapes would fit."""
    from megatron.bridge.checkpoint.model_checkpoint import read_run_config
    from megatron.bridge.training.run_state.load_plan import check_vocabulary

    cfg = tiny_config(on_disk, model={"vocab_size": vocab_size})
    directory = on_disk / "full" / "iter_0000002"
    run_config = read_run_config(directory)
    if fits:
        check_vocabulary(cfg, run_config, directory)
        return
    with pytest.raises(ValueError, match=f"with vocab_size=128, this model has {vocab_size}: set model.vocab_size"):
        check_vocabulary(cfg, run_config, directory)


def local_of(directory, step, *, num_ranks=1, core=CORE_RELEASE, holds_optimizer=True, **sections):
    """What `find_local` would say of a local checkpoint that a run like those of the fixture wrote."""
    from megatron.bridge.training.run_state.local import LocalCheckpoint

    run_config = tiny_config(directory, **sections).to_dict()
    return LocalCheckpoint(step, Path("/local/0/file.pt"), run_config, num_ranks, core, holds_optimizer)


@pytest.mark.parametrize("case", LOCAL_PLANS)
def test_plan_with_a_local_checkpoint(on_disk, case):
    options, local, path, restored = LOCAL_PLANS[case]
    plan = plan_of(on_disk, options, local=local_of(on_disk, **local))
    assert plan.path == on_disk / path
    assert plan.source.name == ("LOCAL" if path == LOCAL else "MEGATRON")
    assert {name: getattr(plan, name) for name in restored} == restored


@pytest.mark.parametrize(
    ("local", "message"),
    [
        ({"num_ranks": 4}, "was saved under ranks 4 -> 1, and a local checkpoint can't be resharded: start as before"),
        ({"model": {"expert_model_parallel_size": 2}}, "saved under model.expert_model_parallel_size 2 -> 1, and"),
        ({"core": "0.1"}, f"saved under megatron-core 0.1 -> {CORE_RELEASE}, and"),
        (
            {"model": {"vocab_size": 127}},
            "/local/0/file.pt was saved by a model with vocab_size=127, this model has 128",
        ),
    ],
)
def test_a_local_checkpoint_of_another_layout_is_refused(on_disk, local, message):
    with pytest.raises(ValueError, match=message) as refusal:
        plan_of(on_disk, {"load": "full"}, local=local_of(on_disk, 3, **local))
    assert "\n" not in str(refusal.value)
    assert plan_of(on_disk, {"load": "full"}, local=local_of(on_disk, 1, **local)).path == on_disk / FULL_2


def test_the_newer_of_persistent_and_global_is_planned(on_disk):
    between = {"non_persistent_ckpt_type": "global", "non_persistent_global_ckpt_dir": "full"}
    pretrained = "pretrained/iter_0000000"
    assert plan_of(on_disk, {**between, "load": "pretrained"}).path == on_disk / FULL_2
    assert plan_of(on_disk, between).path == on_disk / FULL_2, "its own directory counts without checkpoint.load"
    assert plan_of(on_disk, {**between, "load": "no_optim"}).path == on_disk / FULL_2, "as new counts as newer"
    assert plan_of(on_disk, {**between, "load": "pretrained", "finetune": True}).path == on_disk / pretrained
    older = {**between, "non_persistent_global_ckpt_dir": "pretrained"}
    assert plan_of(on_disk, {**older, "load": "full"}).path == on_disk / FULL_2
    assert plan_of(on_disk, {"non_persistent_ckpt_type": "global", "load": "full"}).path == on_disk / FULL_2
