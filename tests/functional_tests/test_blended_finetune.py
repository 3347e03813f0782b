# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A finetune on a blend, packed, for a number of epochs, with two validation sets: whole, and resumed in the middle."""

import json

import numpy as np
import pytest

from megatron.bridge.data.config import GPTSFTDatasetConfig, PackedSequenceSpecs
from tests.rigs.on_ranks import Recorder, differing
from tests.rigs.ranks import run_on_ranks
from tests.rigs.tiny import VOCAB_SIZE, tiny_config

pytestmark = pytest.mark.any_core  # which samples a run takes; packed rows and resumes have tests of their own

SEQ_LENGTH = 32
SIZES = {"books": (40, 9), "code": (60, 5)}


class Sets(Recorder):
    def __init__(self):
        super().__init__()
        self.of_sets, self.counts = [], []

    def on_eval_end(self, context):
        super().on_eval_end(context)
        self.of_sets.append(context.loss_dict)
        self.counts.append(context.num_tokens)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("blended")
    for step, (name, sizes) in enumerate(SIZES.items(), start=1):
        (path / name).mkdir()
        for split, size in zip(("training", "validation"), sizes, strict=True):
            rows = []
            for index in range(size):
                numbers = [str((index + position * step) % (VOCAB_SIZE - 1)) for position in range(12)]
                rows.append(
                    {"input": " ".join(numbers[: 2 + index % 4]), "output": " ".join(numbers[6 : 7 + index % 5])}
                )
            (path / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _run(directory, *, sets=True, dataset=None, validation=None, global_batch_size=4, **checkpoint):
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain

    cfg = tiny_config(
        directory,
        model={"seq_length": SEQ_LENGTH},
        train={"micro_batch_size": 1, "global_batch_size": global_batch_size},
        validation={"eval_iters": None, "multiple_validation_sets": sets, **(validation or {})},
        scheduler={"lr_decay_iters": None, "override_opt_param_scheduler": True},
        checkpoint={"save": None, **checkpoint},
    )
    cfg.train.train_iters, cfg.train.num_epochs = None, 2
    blend = ([f"{directory}/{name}" for name in SIZES], [0.25, 0.75])
    options = dataset or {"blend": blend, "packed_sequence_specs": PackedSequenceSpecs(packed_sequence_size=SEQ_LENGTH)}
    cfg.dataset = GPTSFTDatasetConfig(SEQ_LENGTH, do_test=False, **options)
    recorder = Sets()
    pretrain(cfg, forward_step, callbacks=[recorder])
    return recorder


def test_it_trains_its_epochs_and_resumes_bit_exact_in_the_middle(directory, tmp_path):
    whole = run_on_ranks(_run, 2, directory, save=f"{tmp_path}/saved", save_interval=3)
    steps, state = len(whole[0].losses), whole[0].train_state
    assert state["step"] == steps > 6 and state["consumed_train_samples"] == 4 * steps
    resumed = run_on_ranks(_run, 2, directory, load=f"{tmp_path}/saved", ckpt_step=3)
    for uninterrupted, continued in zip(whole, resumed, strict=True):
        assert continued.losses == uninterrupted.losses[3:]
        assert continued.of_sets == uninterrupted.of_sets
        assert differing(continued.weights_after, uninterrupted.weights_after) == {}
    larger = run_on_ranks(_run, 2, directory, load=f"{tmp_path}/saved", ckpt_step=3, global_batch_size=8)
    for one in larger:
        taken = one.train_state["consumed_train_samples"]
        assert taken == 3 * 4 + 8 * len(one.losses) and 0 <= state["consumed_train_samples"] - taken < 8
    for one in whole:
        assert list(one.of_sets[-1]) == ["lm loss", "books/lm loss", "code/lm loss"]


def test_sets_together_are_what_one_joined_set_is(directory):
    apart, together = (run_on_ranks(_run, 1, directory, sets=sets)[0] for sets in (True, False))
    assert apart.losses == together.losses and apart.counts == together.counts
    assert apart.of_sets[-1]["lm loss"] == pytest.approx(together.of_sets[-1]["lm loss"], rel=1e-6)
    assert list(together.of_sets[-1]) == ["lm loss"]
    for name in SIZES:
        blend = ([f"{directory}/books", f"{directory}/code"], [0.25, 0.75])
        dataset = {"blend_per_split": [blend, ([f"{directory}/{name}"], None), None], "enable_offline_packing": True}
        (alone,) = run_on_ranks(_run, 1, directory, sets=False, dataset=dataset)
        assert alone.of_sets[-1]["lm loss"] == apart.of_sets[-1][f"{name}/lm loss"]
    key = "consumed_valid_samples"
    assert apart.train_state.get(key) == together.train_state.get(key)


def _write_packs(directory, path):
    """The packs that a run on one directory would make, as NeMo writes them."""
    from megatron.bridge.data.config import DatasetBuildContext
    from megatron.bridge.data.sft_datasets import build_sft_datasets
    from megatron.bridge.data.tokenizer import NullTokenizer

    specs = PackedSequenceSpecs(packed_sequence_size=SEQ_LENGTH)
    config = GPTSFTDatasetConfig(
        SEQ_LENGTH, dataset_root=f"{directory}/books", packed_sequence_specs=specs, do_test=False
    )
    for split, dataset in zip(
        ("train", "val"),
        build_sft_datasets(config, DatasetBuildContext(1, 1, 1, NullTokenizer(VOCAB_SIZE))),
        strict=False,
    ):
        rows = []
        for pack in dataset.packs:
            row = {"input_ids": [], "loss_mask": [], "seq_start_id": []}
            for sample in (dataset.samples[number] for number in pack):
                row["seq_start_id"].append(len(row["input_ids"]))
                row["input_ids"] += [*sample["tokens"].tolist(), int(sample["labels"][-1])]
                row["loss_mask"] += [*sample["loss_mask"].tolist(), 0]
            rows.append(row)
        np.save(path / f"{split}.npy", np.array(rows, dtype=object))


def test_packs_in_files_train_as_those_that_the_run_makes(directory, tmp_path):
    run_on_ranks(_write_packs, 1, directory, tmp_path)
    paths = {"packed_train_data_path": f"{tmp_path}/train.npy", "packed_val_data_path": f"{tmp_path}/val.npy"}
    made, read = (
        run_on_ranks(_run, 1, directory, sets=False, dataset={
            "dataset_root": root, "packed_sequence_specs": PackedSequenceSpecs(packed_sequence_size=SEQ_LENGTH, **files)
        })[0]
        for root, files in ((f"{directory}/books", {}), (None, paths))
    )  # fmt: skip
    assert made.losses == read.losses and made.of_sets == read.of_sets and len(made.losses) > 2


def test_one_set_alone_is_refused_as_several(directory):
    with pytest.raises(
        Exception, match="validation.multiple_validation_sets=true, but the data has one validation set"
    ):
        run_on_ranks(_run, 1, directory, dataset={"dataset_root": f"{directory}/books"})
