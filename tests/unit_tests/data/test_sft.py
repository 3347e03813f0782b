# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from megatron.bridge.data.config import SFTOptions, TokenizerConfig
from megatron.bridge.data.sft import load_sft_dataset
from megatron.bridge.data.tokenizer import NullTokenizer, build_tokenizer
from tests.unit_tests.data.conftest import MARKED_CHATML, write_tokenizer

CONVERSATION = [
    {"role": "user", "content": "the cat?"},
    {"role": "assistant", "content": "\n\nsat é😀"},
    {"role": "user", "content": "and the dog?"},
    {"role": "assistant", "content": "ran"},
]


def load(path, tokenizer, *, seq_length=256, max_samples=None, **options):
    return load_sft_dataset(
        path,
        tokenizer=tokenizer,
        seq_length=seq_length,
        options=SFTOptions.from_kwargs(options),
        max_samples=max_samples,
    )


def learned_text(sample, tokenizer):
    return tokenizer.ids_to_text(sample["labels"][sample["loss_mask"] == 1].tolist())


def whole_text(sample, tokenizer):
    return tokenizer.ids_to_text([int(sample["tokens"][0]), *sample["labels"].tolist()])


def test_prompt_and_answer(write_jsonl, tokenizer):
    path = write_jsonl([{"input": "the cat ", "output": "sat on the mat"}])
    dataset = load(path, tokenizer)
    sample = dataset[0]
    assert whole_text(sample, tokenizer) == "the cat sat on the mat<|im_end|>"
    assert learned_text(sample, tokenizer) == " sat on the mat<|im_end|>"
    assert sample["tokens"][1:].tolist() == sample["labels"][:-1].tolist()
    assert set(sample["loss_mask"].tolist()) == {0.0, 1.0}
    assert dataset.lengths.tolist() == [len(sample["tokens"])]
    # EOS is the padding token too, and is learned all the same.
    assert tokenizer.eos_id == tokenizer.pad_id == int(sample["labels"][-1])
    assert sample["loss_mask"][-1] == 1.0
    assert tokenizer.eos_id not in sample["tokens"].tolist()


def test_the_prompts_tokens_are_those_of_the_prompt_alone(write_jsonl, tokenizer):
    sample = load(write_jsonl([{"input": "the cat", "output": "sat"}]), tokenizer)[0]
    prompt = tokenizer.text_to_ids("the cat")
    assert sample["tokens"][: len(prompt)].tolist() == prompt
    assert sample["loss_mask"].tolist().index(1.0) == len(prompt) - 1


@pytest.mark.parametrize(
    ("options", "whole", "learned"),
    [
        ({"answer_only_loss": False}, "the cat sat<|im_end|>", "he cat sat<|im_end|>"),
        ({"add_eos": False}, "the cat sat", " sat"),
        ({"add_bos": True}, "<|begin|>the cat sat<|im_end|>", " sat<|im_end|>"),
        ({"prompt_template": "Q: {input}\nA:{output}"}, "Q: the cat\nA:sat<|im_end|>", "sat<|im_end|>"),
        ({"prompt_template": "{{{input}}} {output}"}, "{the cat} sat<|im_end|>", " sat<|im_end|>"),
    ],
)
def test_options(write_jsonl, tokenizer, options, whole, learned):
    sample = load(write_jsonl([{"input": "the cat", "output": "sat"}]), tokenizer, **options)[0]
    assert whole_text(sample, tokenizer) == whole
    first = tokenizer.ids_to_text([int(sample["tokens"][0])])
    expected = whole.removeprefix(first) if options.get("answer_only_loss") is False else learned
    assert learned_text(sample, tokenizer) == expected


@pytest.mark.parametrize("row", [{"input": "the cat", "output": "sat"}, {"text": "the cat sat"}])
def test_a_bos_that_the_tokenizer_puts_is_asked_for_or_warned_of(write_jsonl, tokenizer_directory, row):
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_model=str(tokenizer_directory)))
    bos = tokenizer.hf_tokenizer.bos_token
    assert not load(write_jsonl([row]), tokenizer).report.warnings
    tokenizer.hf_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_id)]
    )
    [warning] = load(write_jsonl([row]), tokenizer).report.warnings
    assert "the tokenizer's BOS is left out in 1 row" in warning and "add_bos=true" in warning
    dataset = load(write_jsonl([row]), tokenizer, add_bos=True)
    assert not dataset.report.warnings
    assert whole_text(dataset[0], tokenizer) == bos + "the cat sat<|im_end|>"


def test_other_field_names(write_jsonl, tokenizer):
    path = write_jsonl([{"question": "the cat", "context": "mat", "answer": "sat"}])
    options = {
        "prompt_template": "{context} {question} {answer}",
        "label_key": "answer",
        "truncation_field": "context,question",
    }
    assert learned_text(load(path, tokenizer, **options)[0], tokenizer) == " sat<|im_end|>"


def test_conversation_masks_are_those_of_transformers(write_jsonl, tokenizer):
    sample = load(write_jsonl([{"messages": CONVERSATION}]), tokenizer)[0]
    reference = tokenizer.hf_tokenizer.apply_chat_template(
        CONVERSATION,
        chat_template=MARKED_CHATML,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert [int(sample["tokens"][0]), *sample["labels"].tolist()] == reference["input_ids"]
    assert sample["loss_mask"].tolist() == [float(mark) for mark in reference["assistant_masks"][1:]]
    assert learned_text(sample, tokenizer) == "\n\nsat é😀<|im_end|>ran<|im_end|>"


def test_conversations_in_the_other_spelling_are_the_same(write_jsonl, tokenizer):
    speakers = {"user": "human", "assistant": "gpt"}
    turns = [{"from": speakers[turn["role"]], "value": turn["content"]} for turn in CONVERSATION]
    system = {"role": "system", "content": "sat"}
    path = write_jsonl([{"conversations": turns, "system": "sat"}])
    other = write_jsonl([{"messages": [system, *CONVERSATION]}], "other.jsonl")
    ours, theirs = load(path, tokenizer)[0], load(other, tokenizer)[0]
    for key in ("tokens", "labels", "loss_mask"):
        assert ours[key].tolist() == theirs[key].tolist()


def test_a_turn_without_end_token_is_learned_to_its_last_character(write_jsonl, tokenizer_directory):
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    config = TokenizerConfig(tokenizer_model=str(tokenizer_directory), chat_template=template)
    plain = build_tokenizer(config)
    path = write_jsonl([{"messages": CONVERSATION[2:]}])
    assert learned_text(load(path, plain)[0], plain).strip(" ") == "ran\n"


def test_a_template_that_hides_earlier_answers_is_refused(write_jsonl, tokenizer_directory):
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' and not loop.last %}-{% else %}{{ m['content'] }}"
        "{% endif %}{% endfor %}"
    )
    config = TokenizerConfig(tokenizer_model=str(tokenizer_directory), chat_template=template)
    path = write_jsonl([{"messages": CONVERSATION[:2]}, {"messages": CONVERSATION}])
    with pytest.raises(ValueError, match=r"training\.jsonl:2: the chat template cannot be split into turns: message 2"):
        load(path, build_tokenizer(config))


def test_conversations_need_a_template(write_jsonl, tmp_path):
    bare = build_tokenizer(TokenizerConfig(tokenizer_model=str(write_tokenizer(tmp_path / "t", chat_template=None))))
    with pytest.raises(ValueError, match=r"no chat template: set tokenizer\.chat_template"):
        load(write_jsonl([{"messages": CONVERSATION}]), bare)


def test_a_long_prompt_is_cut_and_the_answer_kept(write_jsonl, tokenizer):
    path = write_jsonl([{"input": "x" * 30 + "y" * 30, "output": "sat"}])
    room = 21 - len(tokenizer.text_to_ids(" sat")) - 1  # 20 positions are 21 tokens, the last one EOS
    for method, letter in (("right", "x"), ("left", "y")):
        dataset = load(path, tokenizer, seq_length=20, truncation_method=method)
        assert whole_text(dataset[0], tokenizer) == letter * room + " sat<|im_end|>"
        assert learned_text(dataset[0], tokenizer) == " sat<|im_end|>"
        assert len(dataset[0]["tokens"]) == 20
        assert dataset.report.truncated == 1


def test_a_long_answer_is_cut_at_its_end_and_then_has_no_eos(write_jsonl, tokenizer):
    dataset = load(write_jsonl([{"input": "the cat", "output": "z" * 50}]), tokenizer, seq_length=10)
    assert whole_text(dataset[0], tokenizer) == " " + "z" * 10
    assert tokenizer.eos_id not in dataset[0]["labels"].tolist()
    assert dataset.report.truncated == 1


def test_an_answer_that_has_lost_its_prompt_is_warned_of(write_jsonl, tokenizer):
    rows = [{"input": "the cat", "output": "sat on the mat " * 9}, {"input": "the dog " * 9, "output": "ran"}]
    [warning] = load(write_jsonl(rows), tokenizer, seq_length=8).report.warnings
    assert "an answer has lost all of its prompt in 1 row (the first in line 1): it fills seq_length=8 alone" in warning


def test_a_conversation_is_cut_at_its_end(write_jsonl, tokenizer):
    full = load(write_jsonl([{"messages": CONVERSATION}]), tokenizer)[0]
    cut = load(write_jsonl([{"messages": CONVERSATION}]), tokenizer, seq_length=len(full["tokens"]) - 4)
    assert cut[0]["tokens"].tolist() == full["tokens"][:-4].tolist()
    assert cut.report.truncated == 1


def test_samples_at_the_limit_are_not_truncated(write_jsonl, tokenizer):
    path = write_jsonl([{"input": "a", "output": "b"}])
    longest = load(path, tokenizer).report.longest
    assert load(path, tokenizer, seq_length=longest).report.truncated == 0
    assert load(path, tokenizer, seq_length=longest - 1).report.truncated == 1


def test_report_counts_what_is_dropped(write_jsonl, tokenizer):
    rows = [
        {"messages": CONVERSATION},
        {"messages": CONVERSATION[:1]},
        {"messages": [{"role": "user", "content": "x" * 500}, {"role": "assistant", "content": "lost"}]},
    ]
    dataset = load(write_jsonl(rows), tokenizer, seq_length=200)
    report = dataset.report
    assert (report.samples, report.dropped, report.truncated) == (1, 2, 0)
    assert report.tokens == report.longest == len(dataset[0]["tokens"])
    assert report.learned_tokens == int(dataset[0]["loss_mask"].sum())
    assert "1 samples" in str(report)


def test_blank_answers_are_dropped(write_jsonl, tokenizer):
    dataset = load(write_jsonl([{"input": "a", "output": "  "}, {"input": "a", "output": "b"}]), tokenizer)
    assert (len(dataset), dataset.report.dropped) == (1, 1)


def test_a_sample_of_one_token_has_nothing_to_predict(write_jsonl, tokenizer):
    path = write_jsonl([{"output": "a"}, {"output": "ab"}])
    dataset = load(path, tokenizer, prompt_template="{output}", truncation_field="", add_eos=False)
    assert (len(dataset), dataset.report.dropped) == (1, 1)


def test_many_lines_keep_their_order(write_jsonl, tokenizer):
    rows = [{"input": "n", "output": str(number)} for number in range(2500)]
    dataset = load(write_jsonl(rows), tokenizer)
    assert len(dataset) == 2500
    for number in (0, 999, 1000, 2499):
        assert learned_text(dataset[number], tokenizer) == f" {number}<|im_end|>"
    assert np.array_equal(dataset.lengths, [len(dataset[i]["tokens"]) for i in range(2500)])
    assert len(load(write_jsonl(rows), tokenizer, max_samples=7)) == 7


PAIR = {"input": "a", "output": "b"}
TURNS = {"messages": CONVERSATION[:2]}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([PAIR, "{oops"], r":2: not valid JSON"),
        ([PAIR, PAIR, {"input": "a"}], r":3: no field 'output' \(found: 'input'\)"),
        ([PAIR, {"input": 7, "output": "b"}], r":2: field 'input' is a number: expected a string"),
        ([PAIR, {"input": "a", "output": None}], r":2: field 'output' is null: expected a string"),
        ([PAIR, {"input": "a", "output": ["b"]}], r":2: field 'output' is a list of 1: expected a string"),
        ([PAIR, {"input": "a", "output": "\ud800"}], r":2: the text holds '\\ud800', half a character"),
        ([TURNS, {"messages": "hi"}], r":2: field 'messages' is a string: expected a list"),
        ([TURNS, {"messages": []}], r":2: field 'messages' is a list of 0"),
        ([TURNS, {"messages": ["hi"]}], r":2: messages\[0\] is a string: expected an object"),
        ([TURNS, {"messages": [{"content": "a"}]}], r":2: messages\[0\] has role None"),
        ([TURNS, {"messages": [{"role": "user"}]}], r":2: messages\[0\]\.content is missing"),
        ([TURNS, {"messages": CONVERSATION[1:]}], r":2: the conversation begins with the assistant"),
        ([TURNS, {"conversations": [{"from": "cat", "value": "a"}]}], r":2: conversations\[0\] is from 'cat'"),
        ([TURNS, {"conversations": [{"from": "human", "value": 3}]}], r":2: conversations\[0\]\.value is a number"),
        ([TURNS, PAIR], r":2: no field 'messages' or 'conversations' \(found: 'input', 'output'\)"),
        ([PAIR, TURNS], r":2: no field 'input' \(found: 'messages'\)"),
    ],
)
def test_bad_lines_are_named(write_jsonl, tokenizer, rows, message):
    with pytest.raises(ValueError, match=r"training\.jsonl" + message) as caught:
        load(write_jsonl(rows), tokenizer)
    assert "\n" not in str(caught.value)


def test_a_line_the_tokenizer_refuses_is_named(write_jsonl):
    path = write_jsonl([{"input": "1", "output": "2"}, {"input": "1", "output": "word"}])
    with pytest.raises(ValueError, match=r"training\.jsonl:2: 'word' is not a token"):
        load(path, NullTokenizer(10))


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_is_named(tmp_path, tokenizer, content):
    (tmp_path / "training.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"training\.jsonl is empty: expected one JSON object a line"):
        load(tmp_path / "training.jsonl", tokenizer)


def test_a_file_without_answers_is_refused(write_jsonl, tokenizer):
    with pytest.raises(ValueError, match="none of its 2 samples has an answer token within seq_length=5"):
        load(write_jsonl([{"messages": CONVERSATION}] * 2), tokenizer, seq_length=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chatt": True}, "unknown key 'chatt': did you mean 'chat'"),
        ({"prompt_template": "{output} {input}"}, r"expected it to end with \{output\}"),
        ({"prompt_template": "{input!r} {output}"}, "formats 'input': expected its name alone, as {input}"),
        ({"prompt_template": "{input} {output:>9}"}, "formats 'output': expected its name alone"),
        ({"prompt_template": "{question} {output}"}, "truncation_field='input' is no prompt field"),
        ({"prompt_template": "{input {output}"}, "cannot be parsed|expected it to end"),
        ({"truncation_method": "middle"}, "expected 'left' or 'right'"),
        ({"use_hf_tokenizer_chat_template": False}, "is not supported"),
        ({"answer_only_loss": "yes"}, "expected true or false"),
        ({"pad_seq_length_to_mult": 0}, "expected an integer of 1 or more"),
    ],
)
def test_options_that_cannot_work_are_refused(write_jsonl, tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        load(write_jsonl([PAIR]), tokenizer, **options)


def test_missing_special_tokens_are_refused(write_jsonl, tokenizer):
    with pytest.raises(ValueError, match="add_bos=true, but tokenizer NullTokenizer has no such token"):
        load(write_jsonl([PAIR]), NullTokenizer(10), add_bos=True)


def test_indices_outside_are_refused(write_jsonl, tokenizer):
    dataset = load(write_jsonl([PAIR]), tokenizer)
    with pytest.raises(IndexError):
        dataset[-1]
