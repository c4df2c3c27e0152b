"""Settings of a run as controls, made from the fields of `TrainConfig`, and the configuration that they make.

A blank field has its default, which it shows. Nothing typed is a path: data is an upload or on the
Hub, and an adapter to continue is one of the library.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args, get_origin

import gradio as gr

from ...adapters.library import adapter_name
from ...config import DEFAULT_MAX_MINUTES, TrainConfig
from ...errors import AdapterError, ConfigError
from ...settings_files import resolve_settings
from ...text import CODE_EXTENSIONS, DATA_EXTENSIONS, data_extension, default_adapter_name

FIRST = ("name", "epochs", "minutes", "rank", "learning_rate")
# The rest is chosen by the server or elsewhere on the page, is a path, or sends to other hosts.
_NOT_OFFERED = (
    "dataset",
    "eval_dataset",
    "eval_split",
    "eval_max_rows",
    "base",
    "revision",
    "parent_sha256",
    "force",
    "adapters_dir",
    "runs_dir",
    "report_to",
    "overwrite",
    "device",
    "threads",
)
OFFERED = tuple(name for name in TrainConfig.model_fields if name not in _NOT_OFFERED)
FIELDS = ("dataset", *OFFERED)
_LABELS = {"parent": "Continue from"}
_DEFAULTS = {"epochs": f"1, for at most {DEFAULT_MAX_MINUTES} minutes"}
_CHOICES = {"file": "each file"}  # Gradio takes "file" for the name of some of its own texts
_FLAGS = {"from": "parent"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_NAME_OF_SETTING = re.compile(r"--([a-z][a-z-]*[a-z])|\b([a-z]+(?:_[a-z]+)+)\b")
FRESH = ("a fresh adapter", "")  # in place of one to continue from

Control = gr.Checkbox | gr.Dropdown | gr.Textbox


def label_of(name: str) -> str:
    return _LABELS.get(name, name.replace("_", " ").capitalize())


def in_labels(text: str) -> str:
    """Replace options and names of settings in a text by the labels of their fields."""

    def label(match: re.Match[str]) -> str:
        name = (match[1] or match[2]).replace("-", "_")
        name = _FLAGS.get(name, name)
        return label_of(name) if name in FIELDS else match[0]

    return _NAME_OF_SETTING.sub(label, text)


def help_of(name: str) -> str:
    """Return the help of a setting in the words of the page."""
    if name == "dataset":
        return "Its id, or imdb: the reviews of most examples."
    text = str(TrainConfig.model_fields[name].description)
    for phrase, replacement in {
        " Several values, separated by commas: one run each.": "",
        "Several values, separated by commas: one run each. ": "",
        "; may be repeated.": ".",
        "May be repeated.": "One per line.",
        "Repeat it for": "One per line, for",
        "; `methods` explains when to choose which": "",
    }.items():
        text = text.replace(phrase, replacement)
    return in_labels(text)


def _extra(name: str) -> dict[str, str]:
    """Return what a field says besides its type: panel, and meaning of a default of None."""
    extra = TrainConfig.model_fields[name].json_schema_extra
    assert isinstance(extra, dict)
    return {key: str(value or "") for key, value in extra.items()}


def panels() -> dict[str, list[str]]:
    """Return the settings that are not among the first, by the heading under which help lists them."""
    found: dict[str, list[str]] = {}
    for name in OFFERED:
        if name not in FIRST:
            found.setdefault(_extra(name)["panel"], []).append(name)
    return found


def control(name: str, adapters: Sequence[str] = ()) -> Control:
    """Create the control of a setting; `adapters` are those to continue from."""
    field = TrainConfig.model_fields[name]
    label, info = label_of(name), help_of(name)
    if field.annotation is bool:
        return gr.Checkbox(field.default, label=label, info=info)
    if name == "parent":
        return gr.Dropdown([FRESH, *adapters], value="", label=label, info=info)
    if get_origin(field.annotation) is Literal:
        choices = [(_CHOICES.get(choice, choice), choice) for choice in get_args(field.annotation)]
        return gr.Dropdown(choices, value=field.default, label=label, info=info)
    default = _DEFAULTS.get(name, _extra(name)["shown"]) if field.default in (None, []) else str(field.default)
    lines = 2 if get_origin(field.annotation) is list else 1
    return gr.Textbox(label=label, info=info, placeholder=default, lines=lines, max_lines=max(6, lines))


def hub_control() -> gr.Textbox:
    label = "Or a dataset of the Hugging Face Hub"
    return gr.Textbox(label=label, info=help_of("dataset"), placeholder="stanfordnlp/imdb")


def error_updates(problems: Mapping[str, str], shown: set[str]) -> list[object]:
    """Return an update of each offered control: the problem in place of its help, or its help again.

    `shown` are the settings that have shown a problem; it is brought up to date.
    """
    updates: list[object] = []
    for name in FIELDS:
        if name in problems:
            text = in_labels(problems[name])
            updates.append(gr.update(info=f"{text[0].upper()}{text[1:]}.", elem_classes=["invalid"]))
        elif name in shown:
            updates.append(gr.update(info=help_of(name), elem_classes=[]))
        else:
            updates.append(gr.skip())
    shown.clear()
    shown.update(name for name in problems if name in FIELDS)
    return updates


def hub_dataset(text: str) -> str:
    """Return a typed dataset, if it is one of the Hub or built in. Raises ConfigError."""
    name = text.strip()
    is_path = os.path.lexists(os.path.expanduser(name)) and name != "imdb"
    is_file = data_extension(Path(name)) in DATA_EXTENSIONS + CODE_EXTENSIONS
    if is_path or is_file or not _HUB_ID.fullmatch(name):
        problem = (
            "Give the id of a dataset on the Hugging Face Hub, such as stanfordnlp/imdb: files are dropped above"
        )
        raise ConfigError(problem, {"dataset": problem})
    return name


def read_settings(values: Mapping[str, object], server: Mapping[str, object]) -> TrainConfig:
    """Return the configuration of typed values, and of those that the server has chosen.

    Raises:
        ConfigError: `problems` has them by setting.
    """
    given: dict[str, object] = {}
    for name, value in values.items():
        field = TrainConfig.model_fields[name]
        if isinstance(value, str):
            value = value.strip()
            if get_origin(field.annotation) is list:
                value = [line.strip() for line in value.splitlines() if line.strip()]
        if value not in (None, "", []) and value != field.default:
            given[name] = value
    config = resolve_settings(TrainConfig, {**given, **server})
    try:
        adapter_name(config)
    except AdapterError as error:
        raise ConfigError(str(error), {"name": str(error).rstrip(".")}) from error
    return config


def free_name(dataset: Path | str, taken: Sequence[str]) -> str:
    """Return the name that an adapter of a dataset has by default, or one beside those taken."""
    name, number = default_adapter_name(str(dataset)), 2
    while name in taken:
        name = f"{default_adapter_name(str(dataset))[:60]}-{number}"
        number += 1
    return name
