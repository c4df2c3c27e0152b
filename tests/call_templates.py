"""Chat templates with tools, which imitate those of common bases."""


def _template(call, begin="", end="", between="", tools="{{ t | tojson }}", one_only=False):
    """A template of turns; each call is an expression over `f`, its function, and `c`."""
    refuse = (
        "{% if m.tool_calls | length > 1 %}{{ raise_exception('one call only') }}{% endif %}" if one_only else ""
    )
    return (
        "{% if tools %}{{ 'system: ' }}{% for t in tools %}" + tools + "{% endfor %}{{ '\n' }}{% endif %}"
        "{% for m in messages %}{{ m.role + ': ' + m.content }}{% if m.tool_calls %}"
        + refuse
        + "{{ "
        + repr(begin)
        + " }}"
        "{% for c in m.tool_calls %}{% set f = c.function %}{{ " + call + " }}"
        "{% if not loop.last %}{{ "
        + repr(between)
        + " }}{% endif %}{% endfor %}{{ "
        + repr(end)
        + " }}{% endif %}"
        "{{ eos_token if m.role == 'assistant' else '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )


_JSON = '\'{"name": "\' + f.name + \'", "arguments": \' + (f.arguments | tojson)'
HERMES = _template(f"'<tool_call>\n' + {_JSON} + '}}\n</tool_call>'", between="\n")
LLAMA = _template(
    "'{\"name\": \"' + f.name + '\", \"parameters\": ' + (f.arguments | tojson) + '}'", one_only=True
)
MISTRAL = _template(f"{_JSON} + ', \"id\": \"' + c.id + '\"}}'", "[TOOL_CALLS] [", "]", ", ")
MISTRAL_NEW = _template("'[TOOL_CALLS]' + f.name + '[ARGS]' + (f.arguments | tojson)")
DEEPSEEK = _template(  # arguments are written as text
    "'<call>function<sep>' + f.name + '\n```json\n' + f.arguments + '\n```</call>'", "<calls>", "</calls>", "\n"
)
XML = _template(
    "'<function=' + f.name + '>' + (f.arguments.keys() | join(',')) + (f.arguments.values() | join(',')) + '</function>'"
)
