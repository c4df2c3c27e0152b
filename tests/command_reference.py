"""Generate docs/commands.md from the commands: `python -m tests.command_reference`."""

import typer

from lora_tuner.cli.app import app


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
        arguments = [p for p in sub.params if p.param_type_name == "argument"]
        names = [p.name.upper() + ("..." if p.nargs == -1 else "") for p in arguments]
        usage = [name if p.required else f"[{name}]" for name, p in zip(names, arguments, strict=True)]
        usage += [f"{p.opts[0]} ..." for p in sub.params if p.param_type_name == "option" and p.required]
        lines += [
            "",
            f"## {path}{name}",
            "",
            sub.help,
            "",
            "```",
            " ".join([f"python cli.py {path}{name}", *usage]),
            "```",
            "",
        ]
        lines += [f"- `{p.name.upper()}`: {p.help}" for p in arguments]
        panel = None
        for option in (p for p in sub.params if p.param_type_name == "option"):
            if option.name == "help":
                continue
            if (heading := getattr(option, "rich_help_panel", None)) != panel:
                panel = heading
                lines += ["", f"**{panel}**", ""]
            names = " / ".join([*option.opts, *option.secondary_opts])
            default = option.show_default if isinstance(option.show_default, str) else None
            if default is None and option.show_default and option.default not in (None, False):
                default = str(option.default)
            lines.append(f"- `{names}`: {option.help}" + (f" Default: {default}." if default else ""))


if __name__ == "__main__":
    print(reference(), end="")
