"""What Ollama does with a Modelfile: the parser of its instructions, and templates with `.Messages`.

Templates are the subset of Go's text/template that exports use. Both follow ollama/ollama, August
2026: parser/parser.go (ParseFile, unquote) and template/template.go (Execute, collate).
"""

import re

ACTION = re.compile(r"\{\{ (.*?) \}\}", re.DOTALL)


def parse_modelfile(text):
    """Instruction -> its values; parameters by their name."""
    commands, rest = {}, text
    while rest := rest.lstrip():
        name, rest = re.match(r"(\w+) (.*)", rest, re.DOTALL).groups()
        if name == "PARAMETER":
            name, rest = re.match(r"(\w+) (.*)", rest, re.DOTALL).groups()
        value = ""
        while rest and not (rest[0] in " \t\r\n" and is_complete(value.strip())):
            if rest[0] in "\t\r\n" or rest[0].isprintable():
                value += rest[0]
            rest = rest[1:]
        commands.setdefault(name, []).append(unquote(value.strip()))
    return commands


def is_complete(value):
    if value.startswith('"""'):
        return len(value) >= 6 and value.endswith('"""')
    return not value.startswith('"') or (len(value) >= 2 and value.endswith('"'))


def unquote(value):
    for quotes in ('"""', '"'):
        if value.startswith(quotes):
            return value[len(quotes) : -len(quotes)]
    return value


def render(template, messages):
    """Render messages as Ollama does; consecutive messages of one role are joined."""
    joined = []
    for message in messages:
        if joined and joined[-1]["role"] == message["role"]:
            joined[-1]["content"] += "\n\n" + message["content"]
        else:
            joined.append(dict(message))
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    parts = iter(ACTION.split(template))
    scope = {".System": system, "$.System": system, "$.Messages": joined}
    return execute(parse(parts)[0], scope)


def parse(parts):
    """Nodes up to the end of a block, and the action that ends it."""
    nodes = []
    for number, part in enumerate(parts):
        if number % 2 == 0:
            nodes.append(("text", part))
        elif part == "end" or part.startswith("else"):
            return nodes, part
        elif part.startswith(("if ", "range ")):
            nodes.append(parse_block(parts, part))
        else:
            nodes.append(("action", part))
    return nodes, None


def parse_block(parts, action):
    body, end = parse(parts)
    otherwise = []
    if end.startswith("else if "):
        otherwise = [parse_block(parts, end.removeprefix("else "))]
    elif end == "else":
        otherwise, end = parse(parts)
        assert end == "end"
    return ("block", action, body, otherwise)


def execute(nodes, scope):
    return "".join(execute_node(node, scope) for node in nodes)


def execute_node(node, scope):
    kind, action, *bodies = node
    if kind == "text":
        return action
    if kind == "block" and action.startswith("if "):
        return execute(bodies[0 if evaluate(action.removeprefix("if "), scope) else 1], scope)
    if kind == "block":
        text = ""
        for index, message in enumerate(scope["$.Messages"]):
            scope |= {".Role": message["role"], ".Content": message["content"]}
            scope["$index"] = index if "$index" in action else None
            text += execute(bodies[0], scope)
        return text
    if "=" in action:
        name, value = re.fullmatch(r"(\$\w+) :?= (true|false)", action).groups()
        scope[name] = value == "true"
        return ""
    if action.startswith('"'):
        return re.sub(r"\\U(.{8})", lambda code: chr(int(code[1], 16)), action[1:-1])
    return scope[action]


def evaluate(condition, scope):
    if role := re.fullmatch(r'eq \.Role "(\w+)"', condition):
        return scope[".Role"] == role[1]
    if condition == "eq (len (slice $.Messages $index)) 1":
        return scope["$index"] == len(scope["$.Messages"]) - 1
    return scope[condition]
