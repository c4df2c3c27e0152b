"""Go templates derived from chat templates render conversations as these do, in Ollama."""

import functools

import pytest
from tokenizers import processors

from lora_tuner.convert.go_template import derive_chat_format, example_conversations
from lora_tuner.data.chat_template import apply_template
from lora_tuner.errors import AdapterError, ignore_events

from .. import ollama, tiny_models

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') "
    "+ m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = messages[1:] %}"
    "{% endif %}{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] "
    "{% if loop.last and system is defined %}{{ system + '\n\n' }}{% endif %}{{ m.content }}[/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "<|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ date_string }}\n\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% set messages = messages[1:] %}{% endif %}"
    "<|eot_id|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
    "<｜User｜>{{ m.content }}{% else %}<｜Assistant｜>{{ m.content }}<｜end▁of▁sentence｜>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }} {% elif m.role == 'user' %}USER: {{ m.content }} "
    "{% else %}ASSISTANT: {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
# Braces, quotation marks, and characters that a Modelfile drops.
AWKWARD = (
    "{% for m in messages %}{{ '{{' }}{{ m.role }}{{ '{' }}{{ m.content }}}}\"\"\"\u00a0\u200b{{ '{' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '{%' }} \"{% endif %}"
)
TEMPLATES = {
    name: template
    for name, template in globals().items()
    if name.isupper() and isinstance(template, str) and "messages" in template
}


def add_bos(tokenizer):
    """Let a tokenizer put the beginning-of-text token before each text."""
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{tiny_models.END} $A", special_tokens=[(tiny_models.END, 0)]
    )


@pytest.fixture(scope="module")
def derive():
    tokenizer = tiny_models.tokenizer()
    add_bos(tokenizer)

    @functools.cache
    def with_template(template):
        tokenizer.chat_template = template
        notices = []
        chat_format = derive_chat_format(tokenizer, "tiny", lambda event: notices.append(event.text))
        return tokenizer, chat_format, notices

    def cached(template):
        tokenizer, chat_format, notices = with_template(template)
        tokenizer.chat_template = template
        return tokenizer, chat_format, notices

    return cached


@pytest.mark.parametrize("name", TEMPLATES)
def test_go_template_renders_as_chat_template(derive, name):
    tokenizer, chat_format, _ = derive(TEMPLATES[name])
    modelfile = f'FROM x\nTEMPLATE """{chat_format.go_template()}"""\nPARAMETER a b\n'
    parsed = ollama.parse_modelfile(modelfile)
    assert parsed["a"] == ["b"]
    bos = tokenizer.bos_token if chat_format.adds_bos else ""
    for messages in example_conversations(takes_system=name != "GEMMA"):
        rendered = apply_template(tokenizer, messages, add_generation_prompt=True, date_string="26 Jul 2024")
        assert bos + ollama.render(parsed["TEMPLATE"][0], messages) == rendered


def test_chatml_go_template_is_plain(derive):
    assert derive(CHATML)[1].go_template() == (
        "{{ if $.System }}<|im_start|>system\n{{ $.System }}<|im_end|>\n"
        "{{ else }}<|im_start|>system\nBe kind.<|im_end|>\n{{ end }}"
        '{{ range .Messages }}{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n{{ end }}{{ end }}'
        "<|im_start|>assistant\n"
    )


def test_bos_is_left_to_llama_cpp(derive):
    """Where the tokenizer adds it too; else it stays in the template, as ChatML's of SmolLM2."""
    tokenizer = tiny_models.tokenizer()
    tokenizer.chat_template = DEEPSEEK
    plain = derive_chat_format(tokenizer, "tiny", ignore_events)
    assert plain.go_template().startswith("{{ if $.System }}<|endoftext|>{{ $.System }}")
    assert not plain.adds_bos
    assert {name: derive(template)[1].adds_bos for name, template in TEMPLATES.items()} == {
        name: name not in ("CHATML", "VICUNA", "AWKWARD") for name in TEMPLATES
    }


def test_what_ollama_lacks_is_said(derive):
    assert derive(CHATML)[2] == []
    assert derive(GEMMA)[2] == [
        "The chat template of tiny takes no system message: in Ollama, SYSTEM has no effect.",
        "The chat template of tiny strips white space around messages: Ollama's template does not.",
    ]
    assert derive(LLAMA_3)[2] == [
        "The chat template of tiny writes the date of today: the template for Ollama always has 26 Jul 2024, as in training."
    ]
    able = "{% if tools %}{{ tools | tojson }}{% endif %}{% if enable_thinking is false %}/no_think{% endif %}"
    assert derive(able + CHATML)[2] == [
        "The chat template of tiny has tools and a switch for thinking, which the template for Ollama leaves out."
    ]
    assert derive("{% if tools %}{{ raise_exception('no tools') }}{% endif %}" + CHATML)[2] == []
    dated = LLAMA_3.replace("date_string", "today")
    (notice,) = derive(dated)[2]
    assert "the date of today: the template for Ollama always has 20" in notice


REFUSED = {
    "it writes user messages 2 times": "{% for m in messages %}{{ m.content * 2 }}|{% endfor %}",
    "it leaves out assistant messages": "{% for m in messages if m.role != 'assistant' %}{{ m.content }}|{% endfor %}",
    "it changes the order of the messages": "{% for m in messages | reverse %}{{ m.role }}{{ m.content }}{% endfor %}",
    "what it writes before a user message depends on earlier turns": (
        "{% for m in messages %}{{ loop.index if m.role == 'user' }}{{ m.content }}|{% endfor %}"
    ),
    "what it writes before an answer depends on earlier turns": (
        "{% for m in messages %}{{ loop.index if m.role == 'assistant' }}{{ m.content }}|{% endfor %}"
    ),
    "it writes the system message after a user message": (
        "{% for m in messages if m.role != 'system' %}{{ m.role }}{{ m.content }}|"
        "{{ messages[0].content if loop.first and messages[0].role == 'system' }}{% endfor %}"
    ),
    "it writes system messages 2 times": (
        "{% for m in messages %}{{ m.role }}{{ m.content * (2 if m.role == 'system' else 1) }}|{% endfor %}"
    ),
    "it changes messages, or treats some texts differently": (
        "{% for m in messages %}{{ m.role }}{{ m.content | replace('Why', 'How') }}|{% endfor %}"
    ),
    "never": "{% for m in messages %}{{ raise_exception('never') }}{% endfor %}",
}


@pytest.mark.parametrize("why", REFUSED)
def test_inexpressible_chat_template_is_refused(derive, why):
    with pytest.raises(AdapterError) as error:
        derive(REFUSED[why])
    assert str(error.value) == (
        f"The chat template of tiny cannot be written as a template for Ollama: {why}. Use --to gguf --merged: the "
        "GGUF file has the chat template itself, which llama.cpp and Ollama read where a Modelfile has no TEMPLATE."
    )
