"""Settings from YAML files and the command line, merged and validated; `run.yaml`.

A YAML file and the command line fill the same fields; the command line wins. Unknown keys are
errors, and all problems of a configuration are reported together. Old names are read for ever.
"""

import itertools
import re
from collections import Counter
from collections.abc import Hashable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from .config import SECRET_FIELDS, STOP_RULES, SWEEPABLE, TrainConfig
from .errors import ConfigError

MAX_PROBLEMS = 10  # that an error names
MAX_SETTINGS_CHARS = 1_000_000  # of a file
RENAMED_SETTINGS = {  # old key in run.yaml files of existing adapters and runs -> current key
    "rows": "max_rows",
    "buffer": "shuffle_buffer",
    "targets": "target_modules",
    "accumulation": "gradient_accumulation",
    "clip": "max_grad_norm",
    "checkpointing": "gradient_checkpointing",
    "keep_lines": "clean",
}
# Old key -> old value -> current value.
RENAMED_VALUES = {"keep_lines": {"True": "lines", "False": "full"}}
# Defaults that the run.yaml of earlier versions spells out where they are no choice, and the keys that tell such a file.
SPELLED_OUT = {"split": "train", "shuffle_buffer": 10_000}
_RUN_FILE_KEYS = {"adapters_dir", "runs_dir", "split_salt"}
# Settings that such a file lacks, with the values that repeat its run.
_FORMER_SETTINGS = {"near_duplicates": "keep", "delimiter": "ending", "txt_rows": "blank"}
# Setting -> value, as YAML or the command line gives it; not validated.
SettingValues = dict[str, Any]


def _list_problems(error: ValidationError) -> list[tuple[str, str, str]]:
    """Return of each problem the setting, what is wrong with it, and both in one text."""
    problems = []
    for problem in error.errors():
        key, is_contradiction = ".".join(map(str, problem["loc"])), problem["type"] == "contradiction"
        text = problem["msg"].removeprefix("Value error, ").partition(", unable to ")[0]
        if problem["type"] == "extra_forbidden":
            text = "unknown setting"
        elif key and not is_contradiction:  # that names the settings
            text = f"{text[0].lower()}{text[1:]}"
            if key not in SECRET_FIELDS:
                value = repr(problem["input"])
                text += f" (got {value if len(value) <= 200 else f'{value[:200]} ...'})"
        problems.append((key, text, f"{key}: {text}" if key and not is_contradiction else text))
    return problems


def _format_problems(lines: list[str]) -> str:
    problems, rest = list(dict.fromkeys(lines))[:MAX_PROBLEMS], len(set(lines)) - MAX_PROBLEMS
    return "; ".join([*problems, f"and {rest:,} more problems"] if rest > 0 else problems)


class _StrictLoader(yaml.SafeLoader):
    """YAML as people mean it: null, true and false, and plain numbers; all else is text.

    So it is in YAML 1.2. PyYAML reads YAML 1.1, where `1:30` is 90, `010` is 8, and `no` is false.
    A number that it reads as text, such as `1e-3`, stays text: files that it wrote have such texts
    without quotes, and the setting converts it. Duplicate keys are refused, as PyYAML silently
    keeps the last. Nested aliases, which can expand to more than memory holds, are too."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - filled below

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise ValueError(
                f"line {event.start_mark.line + 1}: *{event.anchor} is an alias: write its value out"
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if keys and keys.most_common(1)[0][1] > 1:
            raise ValueError(f"{keys.most_common(1)[0][0]} is given twice")
        return super().construct_mapping(node, deep)

    def refuse_octal(self, node: yaml.ScalarNode) -> None:
        octal, decimal = (int(node.value.replace("_", ""), base) for base in (8, 10))
        raise ValueError(
            f"line {node.start_mark.line + 1}: {node.value} is {octal} for some programs and "
            f"{decimal} for others: write a number without the 0, or a text in quotes"
        )


for _tag, _pattern in {
    "tag:yaml.org,2002:null": "~|null|Null|NULL|",
    "tag:yaml.org,2002:bool": "true|True|TRUE|false|False|FALSE",
    "tag:yaml.org,2002:int": r"[-+]?(0|[1-9]\d*|0x[\da-fA-F]+)",
    "tag:yaml.org,2002:float": r"[-+]?(\d+\.\d*|\.\d+)([eE][-+]\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    "octal": r"[-+]?0[0-7_]+",
}.items():
    _StrictLoader.add_implicit_resolver(_tag, re.compile(rf"({_pattern})\Z", re.ASCII), None)
_StrictLoader.add_constructor("octal", _StrictLoader.refuse_octal)


def read_settings(file: Path) -> SettingValues:
    """Read a YAML file of settings, with current names for old keys. Values are not validated.

    Raises:
        ConfigError: the file is missing, a pipe, too large, not YAML, or holds no settings.
    """
    if file.is_fifo() and not file.is_relative_to("/dev"):  # would block; `<(command)` is in /dev/fd
        raise ConfigError(f"{file} is a pipe, not a file.")
    try:
        with file.open(encoding="utf-8-sig") as opened:
            text = opened.read(MAX_SETTINGS_CHARS + 1)
        if len(text) > MAX_SETTINGS_CHARS:
            raise ValueError(f"longer than {MAX_SETTINGS_CHARS:,} characters")
        loaded = yaml.load(text, _StrictLoader)
    except FileNotFoundError as error:
        raise ConfigError(f"There is no file {file}.") from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{file} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{file} holds no settings: expected one `name: value` per line.")
    for old, new in RENAMED_SETTINGS.items():
        if old in loaded and new in loaded:
            raise ConfigError(f"{file}: {old} is the old name of {new}: give one of them.")
        if old in loaded:
            value = loaded.pop(old)
            loaded[new] = RENAMED_VALUES.get(old, {}).get(str(value), value)
    if loaded.keys() >= _RUN_FILE_KEYS:
        if "delimiter" not in loaded and loaded.get("txt_rows") == "auto":
            del loaded["txt_rows"]
        loaded = _FORMER_SETTINGS | {
            name: value for name, value in loaded.items() if name not in SPELLED_OUT or value != SPELLED_OUT[name]
        }
    return loaded


S = TypeVar("S", bound=BaseModel)


def resolve_settings(kind: type[S], given: SettingValues, file: Path | None = None) -> S:
    """Merge a YAML file, if there is one, with `given`, which wins, and validate the result.

    A stop rule in `given` replaces any stop rule of the file.

    Raises:
        ConfigError: names every problem; `problems` has them by setting.
    """
    settings = read_settings(file) if file is not None else {}
    if any(name in given for name in STOP_RULES):
        settings = {key: value for key, value in settings.items() if key not in STOP_RULES}
    try:
        return kind.model_validate(settings | given)
    except ValidationError as error:
        problems = _list_problems(error)
        text = _format_problems([line for *_, line in problems])
        by_setting = {key.partition(".")[0]: text for key, text, _ in reversed(problems)}
        raise ConfigError(f"{file}: {text}" if file else text, by_setting) from error


def expand_sweep(given: SettingValues) -> list[SettingValues]:
    """List the settings of each run: all combinations of the values of SWEEPABLE settings."""
    lists = {name: given[name] for name in SWEEPABLE if isinstance(given.get(name), list)}
    return [given | dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]


def config_to_yaml(config: TrainConfig) -> str:
    """Format the configuration as `run.yaml` has it: every field that has an effect and is not None."""
    unused = None if config.streaming else {"shuffle_buffer"}
    values = config.model_dump(mode="json", exclude_none=True, exclude=unused)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
