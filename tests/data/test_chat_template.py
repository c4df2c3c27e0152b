"""Templates that imitate those of common bases: which parts of a conversation they write, and where answers begin."""

import json

import pytest

from lora_tuner import TrainConfig
from lora_tuner.data import chat, packing, tokenization
from lora_tuner.data.dataset import load_dataset
from lora_tuner.data.splitting import is_held_out, row_hash
from lora_tuner.errors import InvalidRowError

from .. import tiny_models

END = tiny_models.END
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN3 = (  # thinking is written after the last question alone; tools and calls as JSON
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}"
    "{% if m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
    "{% elif m.role != 'assistant' %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% else %}"
    "{% set think = m.reasoning_content or '' %}{% set content = m.content %}{% if '</think>' in content %}"
    "{% set think = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > ns.last and (loop.last or think) %}{{ '<think>\n' + think + '\n</think>\n\n' }}{% endif %}"
    '{{ content }}{% for c in m.tool_calls or [] %}{% set f = c.function %}{{ \'\n<tool_call>\n{"name": "\' + f.name + '
    "'\", \"arguments\": ' + (f.arguments | tojson) + '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWQ = CHATML.replace("m.content +", "m.content.split('</think>')[-1].lstrip('\n') +").replace(
    "'<|im_start|>assistant\n' }}", "'<|im_start|>assistant\n<think>\n' }}"
)
R1 = (  # the generation prompt opens the thinking, and that of all answers is taken out
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
    "{{ '<｜User｜>' + m.content }}{% else %}{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + "
    "'<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (  # other roles are dropped
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
SPECIAL = [
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "<｜User｜>", "<｜Assistant｜>"),
]
PAIR = [{"role": "user", "content": "so?"}, {"role": "assistant", "content": "yes"}]
TWO = [*PAIR, {"role": "user", "content": "and?"}, {"role": "assistant", "content": "no"}]
CALL = {"id": "a1", "type": "function", "function": {"name": "get_rain", "arguments": '{"place": "X"}'}}
CALLS = [
    PAIR[0],
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "a1", "name": "get_rain", "content": "rain"},
    {"role": "assistant", "content": "It rains."},
]


def make_tokenizer(template):
    tokenizer = tiny_models.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = template
    return tokenizer


def encode(template, messages, **parts):
    """Encode a conversation, and return the text before its last answer, and each text with labels."""
    tokenizer = make_tokenizer(template)
    row = chat.encode_messages(messages, str.strip, parts)
    (ids,) = tokenization.encode_texts(tokenizer, [row])
    labels, parts = ids >= 0, []
    for token, is_label, follows in zip(tokenization.token_ids(ids), labels, [False, *labels[:-1]], strict=True):
        if is_label:
            parts = parts if follows else [*parts, []]
            parts[-1].append(token)
    last = len(ids) - len(parts[-1])
    return tokenizer.decode(tokenization.token_ids(ids[:last])), [tokenizer.decode(part) for part in parts]


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (CHATML, ["yes<|im_end|>\n", "no<|im_end|>\n"]),
        (QWEN3, ["yes<|im_end|>", "<think>\n\n</think>\n\nno<|im_end|>\n"]),
        (QWQ, ["yes<|im_end|>\n", "\n</think>\n\nno<|im_end|>\n"]),
        (R1, [f"yes{END}", f"\n</think>\n\nno{END}"]),
        (LLAMA3, ["yes<|eot_id|>", "no<|eot_id|>"]),
        (GEMMA, ["yes<end_of_turn>\n", "no<end_of_turn>\n"]),
        (MISTRAL, [f" yes{END}", f" no{END}"]),
    ],
)
def test_labels_begin_where_generation_begins(template, answers):
    before, parts = encode(template, TWO)
    assert parts == answers
    tokenizer = make_tokenizer(template)
    assert before == tokenizer.apply_chat_template(TWO[:3], tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize(
    "answer",
    [
        {"content": "yes", "reasoning_content": "it is"},
        {"content": "yes", "thinking": "it is"},
        {"content": "<think>\nit is\n</think>\n\nyes"},
        {"content": "it is\n</think>\n\nyes"},
    ],
)
@pytest.mark.parametrize("template", [QWQ, R1, QWEN3])
def test_reasoning_is_written_before_answer(template, answer):
    before, (part,) = encode(template, [PAIR[0], {"role": "assistant", **answer}])
    assert (before + part).count("<think>\nit is\n</think>\n\nyes") == 1


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (CHATML, [PAIR[0], PAIR[1] | {"reasoning_content": "it is"}], "reasoning_content that the chat template"),
        (
            QWEN3,
            [PAIR[0], PAIR[1] | {"reasoning": "it is"}, *TWO[2:]],
            "reasoning_content that the chat template",
        ),
        (
            R1,
            [PAIR[0], PAIR[1] | {"content": "<think>it is</think>yes"}, *TWO[2:]],
            "assistant text that the chat",
        ),
        (CHATML, CALLS, "tool_calls that the chat template does not write"),
        (CHATML, [PAIR[0] | {"name": "Ann"}, PAIR[1]], "name that the chat template does not write"),
        (
            CHATML,
            [PAIR[0], PAIR[1] | {"rationale": "because"}],
            "rationale that the chat template does not write",
        ),
        (
            MISTRAL,
            [{"role": "system", "content": "be brief"}, *PAIR],
            "system text that the chat template does not",
        ),
        (GEMMA, [{"role": "system", "content": "be brief"}, *PAIR], "rejects (System role not supported)"),
        (GEMMA, [PAIR[0], *PAIR], "rejects (Conversation roles must alternate"),
        (LLAMA3, [{"role": "user", "content": "so <|eot_id|>"}, PAIR[1]], "contains <|eot_id|>, a special token"),
    ],
)
def test_part_without_place_in_template_is_refused(template, messages, reason):
    row = chat.encode_messages(messages, str.strip)
    invalid = {}
    rows = tokenization.encode_texts(
        make_tokenizer(template), [row, chat.encode_messages(PAIR, str.strip)], invalid=invalid
    )
    assert [len(ids) > 0 for ids in rows] == [False, True]
    assert reason in invalid[row].reason


def test_tools_without_place_in_template_are_refused():
    tools = [{"type": "function", "function": {"name": "get_rain", "parameters": {}}}]
    with pytest.raises(InvalidRowError, match="tools that the chat template does not write"):
        encode(CHATML, PAIR, tools=tools)
    before, _ = encode(QWEN3, PAIR, tools=json.dumps(tools))
    assert before.startswith('<|im_start|>system\n{"type": "function", "function": {"name": "get_rain"')


def test_tool_calls_are_written_and_learned():
    """Arguments are JSON text in files, and objects or text in templates."""
    expected = '\n<tool_call>\n{"name": "get_rain", "arguments": {"place": "X"}}\n</tool_call><|im_end|>'
    before, parts = encode(QWEN3, CALLS)
    assert parts == [expected, "<think>\n\n</think>\n\nIt rains.<|im_end|>\n"]
    assert "<tool_response>\nrain\n" in before
    for call in ("f.arguments", "'' ~ f.arguments"):
        assert encode(QWEN3.replace("(f.arguments | tojson)", call), CALLS)[1] == parts


@pytest.mark.parametrize("tool", ["t", "t.function"])
def test_bare_functions_are_wrapped_where_template_needs(tool):
    """LLaMA-Factory and OpenAI's older files name functions alone; so does `tool_calls` of some."""
    template = QWEN3.replace("t | tojson", f"{tool}.name").replace(
        "set f = c.function", "set f = c.function or c"
    )
    function = {"name": "get_rain", "parameters": {}}
    bare = [PAIR[0], CALLS[1] | {"tool_calls": [CALL["function"]]}, *CALLS[2:]]
    before, parts = encode(template, bare, tools=json.dumps([function]))
    tools = [function] if tool == "t" else [{"type": "function", "function": function}]
    by_hand = make_tokenizer(template).apply_chat_template(CALLS, tools=tools, tokenize=False)
    assert "get_rain<|im_end|>" in by_hand
    assert (before + parts[-1]).replace('{"place": "X"}', "*") == by_hand.replace(r'"{\"place\": \"X\"}"', "*")


def test_sharegpt_calls_have_labels_of_template():
    call = {"name": "get_rain", "arguments": {"place": "X"}}
    talk = [
        *({"from": "human", "value": "so?"}, {"from": "function_call", "value": json.dumps(call)}),
        *({"from": "observation", "value": "rain"}, {"from": "gpt", "value": "It rains."}),
    ]
    assert encode(QWEN3, talk) == encode(QWEN3, CALLS)
    old = [PAIR[0], {"role": "assistant", "content": None, "function_call": CALL["function"]}]
    old.append({"role": "function", "name": "get_rain", "content": "rain"})
    assert encode(QWEN3, [*old, CALLS[3]]) == encode(QWEN3, CALLS)
    with pytest.raises(InvalidRowError, match="tool_calls that the chat template does not write"):
        encode(CHATML, talk)


def test_metadata_and_parts_change_no_token():
    noted = [
        PAIR[0] | {"id": "a", "createdAt": "today", "score": 2, "content": [{"type": "text", "text": "so?"}]},
        {"from": "GPT", "value": "yes", "model": "x", "tool_calls": [], "weight": 1},
    ]
    assert chat.encode_messages(noted, str.strip) == chat.encode_messages(PAIR, str.strip)


@pytest.mark.parametrize("field", [{"weight": 0}, {"train": False}, {"loss": False}])
def test_answer_of_weight_zero_has_no_labels(field):
    assert encode(CHATML, [PAIR[0], PAIR[1] | field, *TWO[2:]])[1] == ["no<|im_end|>\n"]


def test_other_fields_leave_side_of_split():
    plain = row_hash(chat.encode_messages(PAIR, str.strip), "salt")
    rows = [
        chat.encode_messages([PAIR[0], PAIR[1] | {"reasoning_content": text}], str.strip) for text in ("a", "b")
    ]
    rows.append(chat.encode_messages(PAIR, str.strip, {"system": "be brief"}))
    hashes = {row_hash(row, "salt") for row in rows}
    assert len(hashes) == 3
    assert {is_held_out(digest) for digest in hashes} == {is_held_out(plain)}
    pair = chat.encode_pair("so?", "yes", str.strip, {"system": "be brief"})
    assert row_hash(pair, "salt")[:8] == row_hash(chat.encode_pair("so?", "yes", str.strip), "salt")[:8]


def test_system_column_precedes_messages():
    assert encode(CHATML, PAIR, system="be brief")[0].startswith(
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user"
    )
    system = [{"role": "system", "content": "be brief"}]
    assert encode(CHATML, [*system, *PAIR], system="be brief") == encode(CHATML, [*system, *PAIR])
    with pytest.raises(InvalidRowError, match="a system text beside another system message"):
        encode(CHATML, [*system, *PAIR], system="be long")


def test_labels_reach_the_batch():
    tokenizer = make_tokenizer(R1)
    (ids,) = tokenization.encode_texts(tokenizer, [chat.encode_messages(PAIR, str.strip)])
    labels = packing.collate([[ids]], 0)["labels"][0]
    assert tokenizer.decode(labels[labels != packing.IGNORE_INDEX]) == f"\n</think>\n\nyes{END}"


@pytest.mark.parametrize("template", [CHATML, QWEN3, R1, LLAMA3, GEMMA, MISTRAL])
@pytest.mark.parametrize("max_tokens", [None, 512])
def test_rendered_text_has_tokens_of_template(template, max_tokens):
    tokenizer = make_tokenizer(template)
    text = tokenizer.apply_chat_template(TWO, tokenize=False)
    expected = tokenizer.apply_chat_template(TWO, return_dict=False)
    (ids,) = tokenization.encode_texts(tokenizer, [text], max_tokens=max_tokens)
    assert ids.tolist() == expected
    rows, _ = tokenization.encode_rows(tokenizer, ["one", text, "two"], 512)
    assert [row.tolist() for row in rows][1] == expected
    pieces, _ = tokenization.encode_rows(tokenizer, [text * 20], 32)
    assert set(expected) & set(tokenizer.all_special_ids) <= set().union(*(row.tolist() for row in pieces))


def test_rendered_text_has_one_start_and_end():
    """The tokenizer adds a start of its own; a text that ends without a special token gets an end."""
    from tokenizers import processors

    tokenizer = make_tokenizer(LLAMA3)
    start = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, start)]
    )
    text = tokenizer.apply_chat_template(TWO, tokenize=False)
    bare = text.removeprefix(END)
    cut = bare.removesuffix("<|eot_id|>")
    with_start, without_start, open_end = tokenization.encode_texts(tokenizer, [text, bare, cut])
    assert with_start.tolist() == without_start.tolist()
    assert with_start[:2].tolist() == [start, tokenizer.convert_tokens_to_ids("<|start_header_id|>")]
    assert tokenizer.decode(with_start[-1]) == "<|eot_id|>"
    assert open_end[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    "text",
    [
        "In ChatML a turn begins with <|im_start|>user and ends with <|im_end|>, then <|im_start|>assistant follows.",
        "<|im_start|> is a token, and so is [INST].",
        "<p>Use [INST] and [/INST].</p>",
        "<user>so?</user><assistant>yes</assistant>",
        "[INST] so? [/INST] in another language",
    ],
)
def test_special_token_in_prose_stays_text(text):
    tokenizer = make_tokenizer(CHATML)
    if text.startswith("[INST]"):  # marks of another base
        tokenizer = tiny_models.tokenizer()
    (ids,) = tokenization.encode_texts(tokenizer, [text])
    assert not set(ids[:-1].tolist()) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(ids[:-1]) == text


def test_rendered_rows_are_kept_as_written(tmp_path):
    tokenizer = make_tokenizer(MISTRAL)
    tokenizer.bos_token = "<s>"
    texts = [
        tokenizer.apply_chat_template(
            [PAIR[0], {"role": "assistant", "content": f"a\n  b {number}"}], tokenize=False
        )
        for number in range(30)
    ]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    notices = []
    dataset = load_dataset(TrainConfig(dataset="talks.jsonl"), lambda event: notices.append(event.text))
    assert sorted(dataset.train + dataset.held_out) == sorted(texts)
    assert (
        "The texts of talks.jsonl are conversations that a chat template has rendered, so they are kept"
        in notices[0]
    )
