"""Generate docs/commands.md from the commands: `python -m tests.command_reference`."""

import typer

from lora_tuner.cli.app import app
from lora_tuner.cli.help import argument_usage, default_text, help_parts, option_usage, sections


def reference() -> str:
    lines = [
        "# Commands",
        "",
        "Generated from the commands by `make docs`. `python cli.py COMMAND --help` prints the same.",
    ]
    group = typer.main.get_command(app)
    _describe("", group, lines)
    return "\n".join(lines) + "\n"


def _describe(path: str, command: object, lines: list[str]) -> None:
    for name, sub in getattr(command, "commands", {}).items():
        if getattr(sub, "commands", None):
            _describe(f"{path}{name} ", sub, lines)
            continue
        ctx = sub.context_class(sub)
        texts, examples, documents = help_parts(sub)
        panels = sections(sub, ctx)
        usage = [argument_usage(param) for param in panels.get("Arguments", [])]
        usage += [f"{p.opts[0]} ..." for p in sub.params if p.param_type_name == "option" and p.required]
        usage = " ".join([f"python cli.py {path}{name}", *usage])
        examples = ["", *examples] if examples not in ([], [usage]) else []
        lines += ["", f"## {path}{name}", "", "\n\n".join(texts), "", "```", usage, *examples, "```"]
        for title, params in panels.items():
            described = [param for param in params if param.name != "help"]
            lines += ["", f"**{title}**", ""] if described else []
            for param in described:
                default = f" Default: {default_text(param)}." if default_text(param) else ""
                lines.append(f"- `{option_usage(param, ctx)}`: {param.help}{default}")
        if documents:
            lines += ["", documents]


if __name__ == "__main__":
    print(reference(), end="")
