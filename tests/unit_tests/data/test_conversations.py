# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What is learned of conversations, with templates of every kind, and what is said of what is lost."""

import json

import pytest

from megatron.bridge.data.config import SFTOptions, TokenizerConfig
from megatron.bridge.data.sft import load_sft_dataset
from megatron.bridge.data.tokenizer import build_tokenizer
from tests.unit_tests.data.conftest import CHATML, MARKED_CHATML

EACH = "{% for m in messages %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# As Qwen3's: the last answer gets a thought, if only an empty one; those of earlier answers are taken out.
QWEN3 = (
    EACH + "{% if m.role == 'assistant' %}{% set answer = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in m.content %}"
    "{{ '<|im_start|>assistant\n' }}{% generation %}"
    "{% if loop.last %}{{ '<think>\n' + (thought or '') + '\n</think>\n\n' }}{% endif %}"
    "{{ answer + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}" + PROMPT
)
# As DeepSeek-R1's: the generation prompt opens a thought, and a written turn has none.
R1 = (
    EACH + "{% if m.role == 'assistant' %}A:{{ m.content.split('</think>')[-1] + '<|im_end|>' }}"
    "{% else %}Q:{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}A:<think>\n{% endif %}"
)
PLAIN = (
    EACH
    + "{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
END_AT_LAST = PLAIN.replace("{% endfor %}", "{% endfor %}{% if not add_generation_prompt %}<|im_end|>{% endif %}")
END_BETWEEN = PLAIN.replace("+ '\n' }}", "}}{% if m.role == 'assistant' and not loop.last %}<|im_end|>{% endif %}")
# As Llama 3's first one: the generation prompt stands behind every conversation, asked for or not.
ALWAYS_PROMPTED = CHATML.replace("{% if add_generation_prompt %}", "{% if true %}")
ALWAYS_PROMPTED_PLAIN = EACH + "{{ '[' + m.role + ']' + m.content }}{% endfor %}[assistant]"
SPACED = EACH + "{{ m.content + '<|im_end|> ' }}{% endfor %}"  # as Mistral's first one: a space behind the end token
TOOLS = (
    "{% for t in tools or [] %}{{ t | tojson + '\n' }}{% endfor %}" + EACH + "{{ '<|im_start|>' + m.role + '\n' }}"
    "{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ c.function.name + ' ' + ARGUMENTS }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}" + PROMPT
)
AS_OBJECT = TOOLS.replace("ARGUMENTS", "(c.function.arguments | tojson)")
AS_ITEMS = TOOLS.replace("ARGUMENTS", "(c.function.arguments.items() | list | tojson)")
AS_TEXT = TOOLS.replace("ARGUMENTS", "c.function.arguments")
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def user(content, **more):
    return {"role": "user", "content": content, **more}


def answer(content, **more):
    return {"role": "assistant", "content": content, **more}


def call(arguments, content=None, **more):
    function = {"name": "weather", "arguments": arguments}
    return answer(content, tool_calls=[{"id": "c1", "type": "function", "function": function}], **more)


TWO = [user("the cat?"), answer("sat"), user("the dog?"), answer("ran")]


@pytest.fixture
def learn(write_jsonl, tokenizer_directory):
    """What is learned of rows: a list of the learned texts of each, whole texts, and the report."""

    def learned(rows, template=CHATML, **options):
        tokenizer = build_tokenizer(TokenizerConfig(tokenizer_model=str(tokenizer_directory), chat_template=template))
        rows = [{"messages": row} if isinstance(row, list) else row for row in rows]
        made = load_sft_dataset(
            write_jsonl(rows), tokenizer=tokenizer, seq_length=512, options=SFTOptions.from_kwargs(options)
        )
        learned.tokenizer = tokenizer
        learned.samples = [made[index] for index in range(len(made))]
        learned.report = made.report
        learned.whole = [
            tokenizer.ids_to_text([int(sample["tokens"][0]), *sample["labels"].tolist()]) for sample in learned.samples
        ]
        return [spans_of(sample, tokenizer) for sample in learned.samples]

    return learned


def spans_of(sample, tokenizer):
    runs, was_learned = [], False
    for token, is_learned in zip(sample["labels"].tolist(), sample["loss_mask"].tolist(), strict=True):
        if is_learned and not was_learned:
            runs.append([])
        if is_learned:
            runs[-1].append(token)
        was_learned = is_learned
    return [tokenizer.ids_to_text(run) for run in runs]


def warned(report, *words):
    return any(all(word in line for word in words) for line in report.warnings)


# Where the answers are


@pytest.mark.parametrize("template", [QWEN3, MARKED_CHATML, QWEN3.replace("+ '<|im_end|>' }}{% endg", "}}{% endg")])
@pytest.mark.parametrize(
    "messages", [TWO, [user("a"), answer("<think>\nmat\n</think>\n\nsat")], [*TWO, user("b"), answer("é😀 ran")]]
)
def test_marks_give_the_tokens_and_the_mask_of_transformers(learn, template, messages):
    learn([messages], template)
    [sample] = learn.samples
    made = learn.tokenizer.hf_tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    assert [int(sample["tokens"][0]), *sample["labels"].tolist()] == made["input_ids"]
    assert sample["loss_mask"].tolist() == made["assistant_masks"][1:]
    assert any(made["assistant_masks"])


def test_marks_that_hold_nothing_and_marks_in_one_branch(learn):
    last_only = MARKED_CHATML.replace(" == 'assistant' %}{% gen", " == 'assistant' and loop.last %}{% gen")
    rows = [TWO, [*TWO, user("end")]]
    assert learn(rows, last_only) == [["ran<|im_end|>"]]
    assert learn.report.dropped == 1 and "marks hold nothing in 1 (the first in line 2)" in str(learn.report)
    assert warned(learn.report, "an answer has no generation mark")


def test_a_flag_counts_with_marks_too(learn):
    flagged = [TWO[0], answer("sat", weight=0), *TWO[2:]]
    assert learn([flagged], MARKED_CHATML) == [["ran<|im_end|>"]]
    assert learn([flagged], QWEN3) == [["<think>\n\n</think>\n\nran<|im_end|>"]]
    beside = (  # answers whose marks touch
        EACH + "{% if m.role == 'user' %}{{ m.content }}{% else %}{% generation %}{{ m.content + '<|im_end|>' }}"
        "{% endgeneration %}{% endif %}{% endfor %}"
    )
    said = [user("a"), answer("sat"), answer("ran", weight=0), answer("mat")]
    assert learn([said], beside) == [["sat<|im_end|>", "mat<|im_end|>"]]


UNMARKED_QWEN3 = QWEN3.replace("{% generation %}", "").replace("{% endgeneration %}", "")
EMPTY = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    ("template", "messages", "spans"),
    [
        (UNMARKED_QWEN3, TWO, ["sat<|im_end|>", EMPTY + "ran<|im_end|>"]),
        (UNMARKED_QWEN3, [user("sat", role="system"), *TWO], ["sat<|im_end|>", EMPTY + "ran<|im_end|>"]),
        (UNMARKED_QWEN3, [*TWO, user("x"), answer("sat")], ["sat<|im_end|>", "ran<|im_end|>", EMPTY + "sat<|im_end|>"]),
        (
            UNMARKED_QWEN3,
            [*TWO[:3], answer("<think>\nmat\n</think>\n\nran")],
            ["sat<|im_end|>", "<think>\nmat\n</think>\n\nran<|im_end|>"],
        ),
        (R1, TWO, ["sat<|im_end|>", "ran<|im_end|>"]),
        (R1, [user("a"), answer("<think>mat</think>sat")], ["sat<|im_end|>"]),
        (END_AT_LAST, TWO, [" sat\n", " ran\n<|im_end|>"]),
        (END_BETWEEN, TWO, [" sat<|im_end|>", " ran"]),
        (ALWAYS_PROMPTED, TWO, ["sat<|im_end|>", "ran<|im_end|>"]),
        (ALWAYS_PROMPTED, TWO[:2], ["sat<|im_end|>"]),
        (ALWAYS_PROMPTED, TWO[:3], ["sat<|im_end|>"]),
        (ALWAYS_PROMPTED, [*TWO[:2], answer("ran")], ["sat<|im_end|>", "ran<|im_end|>"]),
        (ALWAYS_PROMPTED_PLAIN, TWO, ["sat", "ran"]),
        (SPACED, TWO, [" sat<|im_end|>", " ran<|im_end|>"]),
    ],
)
def test_answers_are_found_in_the_rendering_of_the_whole(learn, template, messages, spans):
    assert learn([messages], template) == [spans]
    assert learn.whole[0] == learn.tokenizer.apply_chat_template(messages)


def test_a_template_that_counts_backwards_can_be_learned(learn):
    template = "{% for m in messages %}{{ loop.revindex }}{{ m['content'] }}{% endfor %}"
    assert learn([TWO[:2], TWO], template) == [["sat"], ["sat", "ran"]]


def test_thoughts_that_are_left_out_are_warned_of(learn):
    learn([TWO, [user("a"), answer("<think>mat</think>sat"), *TWO]], UNMARKED_QWEN3)
    assert warned(learn.report, "text of 'assistant' messages is changed or left out", "1 row (the first in line 2)")


def test_an_answer_that_is_written_twice_is_refused(learn):
    with pytest.raises(ValueError, match="cannot be split into turns: message 2 is not found"):
        learn([TWO], "{{ messages | length }}{% for m in messages %}{{ m.content + m.content }}{% endfor %}")


@pytest.mark.parametrize(
    ("template", "warns"),
    [(PLAIN, True), (END_AT_LAST, True), (END_BETWEEN, True), (CHATML, False), (QWEN3, False), (R1, False)],
)
def test_answers_without_an_end_token_are_warned_of(learn, template, warns):
    learn([TWO], template)
    assert warned(learn.report, "a learned answer ends in no special token in 1 row") == warns


# What a row says


@pytest.mark.parametrize("flag", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": False}, {"loss_mask": 0}])
def test_a_turn_that_is_marked_is_context(learn, flag):
    flagged = [TWO[0], answer("sat", **flag), *TWO[2:]]
    assert learn([flagged]) == [["ran<|im_end|>"]]
    assert "sat<|im_end|>" in learn.whole[0] and not learn.report.warnings
    spelled = [{"from": entry["role"], "value": entry["content"], **flag} for entry in (TWO[0], TWO[1])]
    assert learn([{"conversations": spelled}, TWO]) == [["sat<|im_end|>", "ran<|im_end|>"]]
    assert "all answers are marked as not to be learned in 1 (the first in line 1)" in str(learn.report)
    [[before, after]] = learn([flagged], answer_only_loss=False)
    assert before.endswith("assistant\n") and after.startswith("<|im_start|>user\nthe dog?")


@pytest.mark.parametrize("flag", [{"weight": 1}, {"train": True}, {"loss": True}, {"weight": None}])
def test_a_flag_for_learning_changes_nothing(learn, flag):
    assert learn([[TWO[0], answer("sat", **flag), *TWO[2:]]]) == [["sat<|im_end|>", "ran<|im_end|>"]]
    assert not learn.report.warnings
    learn([[user("a", **flag), answer("sat")]])
    assert warned(learn.report, f"{next(iter(flag))!r} on a message of 'user' is ignored") == any(flag.values())


def test_system_beside_messages_comes_first_in_both_spellings(learn):
    turns = [{"from": "human", "value": "the cat?"}, {"from": "gpt", "value": "sat"}]
    rows = [{"system": "be red", "messages": TWO[:2]}, {"system": "be red", "conversations": turns}]
    assert learn([*rows, {"system": "", "messages": TWO}, {"system": None, "messages": TWO}])[0] == ["sat<|im_end|>"]
    assert learn.whole[0] == learn.whole[1] and learn.whole[0].startswith("<|im_start|>system\nbe red<|im_end|>")
    assert "be red" not in learn.whole[2] + learn.whole[3]


@pytest.mark.parametrize("as_text", [True, False])
@pytest.mark.parametrize(
    ("template", "written"),
    [(AS_OBJECT, '{"city": "lima"}'), (AS_ITEMS, '[["city", "lima"]]'), (AS_TEXT, '{"city": "lima"}')],
)
def test_arguments_are_written_once(learn, template, written, as_text):
    arguments = {"city": "lima"}
    if template == AS_TEXT and not as_text:
        pytest.skip("the template takes text alone, as transformers says in its error")
    row = {"messages": [user("a"), call(json.dumps(arguments) if as_text else arguments), *TWO[2:]]}
    row["tools"] = json.dumps([TOOL]) if as_text else [TOOL]
    assert learn([row], template) == [[f"weather {written}<|im_end|>", "ran<|im_end|>"]]
    assert '"name": "weather"' in learn.whole[0] and not learn.report.warnings


def test_a_call_is_found_in_a_template_that_rewrites_turns(learn):
    rewriting = AS_OBJECT.replace(
        "{{ m.content or '' }}", "{{ '-' if loop.last and m.role == 'assistant' }}{{ m.content or '' }}"
    )
    assert learn([[user("a"), call({}), *TWO[2:]]], rewriting) == [["weather {}<|im_end|>", "-ran<|im_end|>"]]


def test_what_holds_no_empty_answer_is_not_warned_of(learn):
    no_content = {key: value for key, value in call({}).items() if key != "content"}
    learn([[user("a"), no_content], [user("a"), answer("", weight=0), *TWO]], AS_OBJECT)
    learn([{"input": "", "output": "the cat sat"}], add_bos=True)
    assert not learn.report.warnings and learn.whole == ["<|begin|> the cat sat<|im_end|>"]


@pytest.mark.parametrize("role", ["Assistant", "model", "GPT", " assistant"])
def test_other_spellings_of_roles_are_read_and_counted(learn, role):
    assert learn([TWO, [user("a"), {"role": role, "content": "sat"}]])[1] == ["sat<|im_end|>"]
    assert f"role {role!r} is read as 'assistant' in 1 (the first in line 2)" in str(learn.report)


# What is lost


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"input": "a", "output": "b", "instruction": "c"}, "field 'instruction' is ignored"),
        ({"input": "a", "output": "b", "history": [["c", "d"]]}, "field 'history' is ignored"),
        ({"text": "a", "context": "c"}, "field 'context' is ignored"),
        ({"messages": TWO, "documents": [{"text": "a"}]}, "field 'documents' is ignored"),
        ({"messages": TWO, "weight": 0}, "field 'weight' is ignored"),
        ({"messages": TWO, "tools": [TOOL]}, "'tools' are left out by the chat template"),
        ({"messages": [user("a", name="x"), answer("b")]}, "'name' of messages is left out by the chat template"),
        ({"messages": [user("a"), answer("b", reasoning_content="c")]}, "'reasoning_content' of messages is left"),
        ({"messages": [user("a"), call({}, "b")]}, "'tool_calls' of messages is left out by the chat template"),
        ({"messages": [user("a"), answer("b", function_call={"name": "c"})]}, "'function_call' of messages is left"),
        ({"messages": [*TWO, {"role": "Bot", "content": "a"}]}, "role 'Bot' is not known"),
        ({"messages": [*TWO, user("a"), answer(" ")]}, "an answer is empty"),
        ({"input": "", "output": "the cat sat"}, "the prompt is empty"),
        ({"input": "a", "output": "b", "task": "say what comes after the letter"}, "field 'task' is ignored"),
        ({"text": "a", "label": "b"}, "field 'label' is ignored"),
        ({"text": "a", "label": 1}, "field 'label' is ignored"),
    ],
)
def test_what_no_part_of_a_sample_takes_is_warned_of(learn, row, words):
    learn([row])
    assert warned(learn.report, words, "in 1 row (the first in line 1)")
    assert words in str(learn.report)


def test_what_is_about_a_row_is_counted_alone(learn):
    learn([{"id": 7, "source": "web", "input": "a", "output": "b", "score": 0.5}, {"input": "a", "output": "b"}])
    assert not learn.report.warnings and "field 'source' is ignored in 1 (the first in line 1)" in str(learn.report)


def test_a_field_that_the_template_names_is_not_lost(learn):
    learn([{"instruction": "the", "input": "cat", "output": "sat"}], prompt_template="{instruction} {input} {output}")
    assert learn.whole == ["the cat sat<|im_end|>"] and not learn.report.notes


def test_notes_are_kept_with_the_tokens(write_jsonl, tokenizer, tmp_path):
    path = write_jsonl([{"input": "a", "output": "b", "instruction": "c"}, {"input": "a", "output": ""}])
    options = {"tokenizer": tokenizer, "seq_length": 64, "options": SFTOptions(), "cache_directory": tmp_path / "kept"}
    first, second = load_sft_dataset(path, **options), load_sft_dataset(path, **options)
    assert first.report == second.report and len(second.report.warnings) == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [user("a"), answer("b", weight=0.5)]}, r"messages\[1\]\.weight is 0\.5: expected 0 or 1"),
        ({"messages": [user("a"), answer("b", train="no")]}, r"messages\[1\]\.train is 'no': expected 0 or 1"),
        ({"messages": [user("a"), answer("b", weight=0, train=True)]}, "is to be learned and not to be learned"),
        ({"messages": [user("a"), call({})]}, r"messages\[1\] has tool_calls and no content, and the chat template"),
        ({"messages": [user("a"), answer("", function_call={"name": "b"})]}, r"messages\[1\] has function_call and no"),
        ({"messages": [user("a"), call("{oops")]}, r"messages\[1\]\.tool_calls\[0\]\.function\.arguments is a string"),
        ({"messages": [user("a"), call('{"a": 1, "a": 2}')]}, "arguments is a string .*the key 'a' stands twice"),
        ({"messages": [user("a"), call("[1]")]}, r"arguments is JSON text of a list of 1: expected an object"),
        ({"messages": TWO, "tools": "weather"}, "field 'tools' is a string that is no JSON"),
        ({"messages": TWO, "tools": {"name": "weather"}}, "field 'tools' is an object: expected a list of tools"),
        ({"messages": TWO, "tools": [1]}, r"tools\[0\] is a number: expected an object"),
        ({"messages": TWO, "system": ["a"]}, "field 'system' is a list of 1: expected a string"),
        ({"messages": [user("a", role="system"), *TWO], "system": "b"}, "'system' and messages.0. hold two system"),
        ({"messages": [user("a"), user("b", role="Bot")]}, "nothing to|anything to learn .*no message of the assist"),
        ({"conversations": [{"from": "human", "value": "a", "content": "b"}]}, "has 'content' beside 'from' and"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(learn, row, message):
    with pytest.raises(ValueError, match=message) as caught:
        learn([row])
    assert "\n" not in str(caught.value)
