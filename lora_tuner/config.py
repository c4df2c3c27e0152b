"""Every setting, its default, its bounds and its one line of help. The command line and the docs are made from this.

`TrainConfig` is what `run.yaml` holds; `Sampling` is how text is drawn. A YAML file and the command line both fill the
same fields, the command line last. Unknown keys are errors, and all problems are reported together.
"""

import itertools
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from .errors import ConfigError, EventHandler, ignore_events

DEFAULT_BASE = "distilgpt2"
EMBEDDED_BASE = "smollm2-135m"
HELD_OUT_MAX_TOKENS = 512  # tokens: held-out rows are cut here whatever `max_length` was, so that runs can be compared
BATCH_SIZE_CPU, BATCH_SIZE_GPU = 1, 8  # in few minutes many small steps teach more; a GPU wants more at once
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
InferenceDtype = Literal["auto", "float32", "bfloat16", "float16", "int8"]  # where nothing is trained
TRACKERS = ("tensorboard", "trackio", "wandb", "mlflow")
LoadIn = Literal["auto", "full", "8bit", "4bit"]
MAX_RANK, MAX_ALPHA = 4096, 1_000_000
MAX_COUNT = 1_000_000_000  # of what is counted while training; beyond it a number is a slip
MAX_SETTINGS_CHARS, MAX_SETTING_CHARS = 1_000_000, 10_000  # characters of a file of settings, and of one of them
RSLORA_ALPHA = 6  # at rank 8 the scale that the other methods have
LORA_PLUS_RATIO = 4.0  # B learns so many times as fast as A
SECRET_FIELDS = ("api_key",)  # settings whose values are never said
INVALID_TEXT = re.compile("[\0\ud800-\udfff]")  # null bytes, and bytes of a command line that are no UTF-8
NAME_PATTERN = re.compile(r"(?!(?i:con|prn|aux|nul|com\d|lpt\d)$)[A-Za-z][A-Za-z0-9_-]{0,63}")  # not Windows' devices
SWEEPABLE = ("rank", "learning_rate")  # settings of which the command line takes several, one run each
STOP_RULES = ("epochs", "max_steps", "minutes")
RENAMED_SETTINGS = {  # old key in the run.yaml of existing adapters and runs -> the key that replaced it
    "rows": "max_rows",
    "buffer": "shuffle_buffer",
    "targets": "target_modules",
    "accumulation": "gradient_accumulation",
    "clip": "max_grad_norm",
    "checkpointing": "gradient_checkpointing",
}
DEFAULT_MAX_MINUTES = 10  # with no stop rule, an epoch that takes longer than this is cut to it


@dataclass(frozen=True)
class MethodInfo:
    """A kind of update: the peak learning rate that suits it (benchmarks/RESULTS.md), and when to choose it."""

    learning_rate: float
    when: str


MethodName = Literal["lora", "rslora", "dora", "lora+", "pissa", "eva"]
METHODS: dict[MethodName, MethodInfo] = {
    "lora": MethodInfo(2e-3, "The default: read by every tool, and on reviews no other gained clearly more."),
    "rslora": MethodInfo(
        2e-3, "Several ranks beside one another: its scale falls with the root of the rank, not with the rank."
    ),
    "dora": MethodInfo(2e-3, "Where a little more at the same rank is worth steps that take half as long again."),
    "lora+": MethodInfo(1e-3, "B learns faster than A: on program code it gained most. What is saved is a plain LoRA."),
    "pissa": MethodInfo(
        2.5e-4, "Begins with the base's largest directions. What is saved is a plain LoRA of twice the rank."
    ),
    "eva": MethodInfo(
        5e-4, "Begins with what your text excites in each layer, ranks by need; that takes half a minute and more."
    ),
}


def _setting(
    default: Any, text: str, panel: str, shown: str | None = None, flag: str | None = None, **bounds: Any
) -> Any:
    """A setting. `shown` says what its default of None means, `flag` how the command line calls it, where not by its name."""
    extra: dict[str, Any] = {"panel": panel, "shown": shown, "flag": flag}
    return Field(default, description=text, json_schema_extra=extra, **bounds)


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _plausible(cls, value: Any, info: Any) -> Any:
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError("yes or no is not a value here")
        if any(
            isinstance(text, str) and INVALID_TEXT.search(text)
            for text in (value if isinstance(value, list) else [value])
        ):
            raise ValueError("null bytes and halves of characters are no text")
        if isinstance(value, str) and len(value) > MAX_SETTING_CHARS:
            raise ValueError(f"it is longer than {MAX_SETTING_CHARS:,} characters")
        if value == "":
            raise ValueError("it is empty: give a value, or leave it out")
        return value


class TrainConfig(_Settings):
    """One training run. `None` means: worked out from the rest, as the field's text says."""

    dataset: str = _setting(
        "imdb", "imdb, a local csv, tsv, json, jsonl, txt or parquet file, a folder of them, or a Hub id.", "Data"
    )
    subset: str | None = _setting(None, "Subset of a Hub dataset, where it has several.", "Data")
    split: str = _setting("train", "Split of a Hub dataset.", "Data")
    text_column: str | None = _setting(
        None, "The column that holds the text.", "Data", "text, or the only column of text"
    )
    where: list[str] = _setting([], "Only rows with this value, as COLUMN=VALUE. May be repeated.", "Data")
    max_rows: int | None = _setting(
        None, "So many rows, drawn always alike: 1000 are among the 2000.", "Data", "all", ge=2
    )
    txt_rows: Literal["auto", "line", "paragraph", "file"] = _setting(
        "auto", "What a row is in a txt file; auto: blank lines part rows or, where there are none, lines do.", "Data"
    )
    keep_lines: bool = _setting(False, "Keep line breaks, as in poems; else each text becomes one line.", "Data")
    streaming: bool = _setting(
        False, "Read rows as they are needed, for data that neither memory nor disk holds. Copies stay in.", "Data"
    )
    shuffle_buffer: int = _setting(
        10_000, "Rows that are shuffled and packed together with --streaming.", "Data", ge=1, le=MAX_COUNT
    )
    max_length: int = _setting(512, "Tokens a training row has at the most.", "Data", ge=8)
    long_rows: Literal["truncate", "chunk"] = _setting(
        "truncate", "Rows over --max-length: cut their end off, or train on it as rows of its own.", "Data"
    )
    packing: bool = _setting(
        True, "Several short rows to a sequence, isolated from one another, instead of padding.", "Data"
    )
    split_salt: str = _setting("lora_tuner", "Another salt holds out other rows.", "Data", min_length=1)
    eval_rows: int = _setting(200, "Held-out rows that are measured, at the most.", "Data", ge=2)
    eval_dataset: str | None = _setting(
        None,
        "Measure on --eval-rows of this data, read with the settings of the other; none of its rows is trained on.",
        "Data",
        "the rows held out",
    )
    eval_split: str | None = _setting(None, "Split of --eval-dataset, where that is on the Hub.", "Data", "test")

    base: str | None = _setting(
        None,
        "Base model: a local folder or a Hub id.",
        "Model",
        f"{DEFAULT_BASE}; {EMBEDDED_BASE} when that is out of reach",
    )
    revision: str | None = _setting(None, "Branch, tag or commit of the base on the Hub.", "Model")
    parent: str | None = _setting(
        None,
        "Go on from this adapter, by name or path, in place of a fresh one: its base, rank, alpha and targets.",
        "Model",
        flag="--from",
    )
    parent_sha256: str | None = _setting(
        None, "Refuse --from with other weights than these; `run.yaml` holds it.", "Model", flag="--from-sha256"
    )
    force: bool = _setting(False, "With --from: on a base that the adapter was not trained on.", "Model")
    method: MethodName = _setting("lora", "Kind of update; `methods` says when to choose which.", "Model")
    rank: int = _setting(
        8,
        "Rank of the update: its size and its power. Several, with commas, train one after another.",
        "Model",
        ge=1,
        le=MAX_RANK,
    )
    alpha: int | None = _setting(
        None,
        "The update is scaled by alpha / rank; with rslora by alpha / its root.",
        "Model",
        f"2 x rank; {RSLORA_ALPHA} with rslora",
        ge=1,
        le=MAX_ALPHA,
    )
    dropout: float = _setting(0.0, "Dropout on the input of the update.", "Model", ge=0, lt=1)
    target_modules: str = _setting(
        "auto",
        "Layers that get an update: auto, attention, all-linear, or names with commas between them.",
        "Model",
        min_length=1,
    )

    epochs: float | None = _setting(
        None, "Stop after so many passes over the training rows.", "Training", gt=0, le=MAX_COUNT, allow_inf_nan=False
    )
    max_steps: int | None = _setting(None, "Stop after so many steps.", "Training", ge=1, le=MAX_COUNT)
    minutes: float | None = _setting(
        None,
        "Stop after so many minutes of training, turned into steps by a measurement before it starts.",
        "Training",
        gt=0,
        le=MAX_COUNT,
        allow_inf_nan=False,
        validate_default=True,  # by its validator, which looks at all stop rules
    )
    batch_size: int | None = _setting(
        None,
        "Sequences that are computed at once.",
        "Training",
        f"{BATCH_SIZE_CPU} on a CPU, {BATCH_SIZE_GPU} on a GPU",
        ge=1,
        le=MAX_COUNT,
    )
    gradient_accumulation: int = _setting(
        1, "Batches whose gradients are summed for one step.", "Training", ge=1, le=MAX_COUNT
    )
    learning_rate: float | None = _setting(
        None,
        "Peak learning rate; with lora+ that of A, and B's is 4 times as high. Several, with commas, as with --rank.",
        "Training",
        "by method: " + ", ".join(f"{name} {method.learning_rate:g}" for name, method in METHODS.items()),
        gt=0,
        allow_inf_nan=False,
    )
    schedule: Literal["linear", "cosine", "constant"] = _setting(
        "linear", "How the learning rate falls after the warm-up.", "Training"
    )
    warmup: float = _setting(0.05, "Share of the steps in which the learning rate rises.", "Training", ge=0, lt=1)
    weight_decay: float = _setting(0.0, "AdamW's weight decay.", "Training", ge=0, allow_inf_nan=False)
    max_grad_norm: float = _setting(
        1.0, "Gradients are scaled down to this norm.", "Training", gt=0, allow_inf_nan=False
    )
    eval_every: int | None = _setting(
        None, "Measure the held-out loss every so many steps.", "Training", "before and after", ge=1, le=MAX_COUNT
    )
    patience: int | None = _setting(
        None,
        "Stop after so many measurements without a better one, and keep the best. Needs --eval-every.",
        "Training",
        ge=1,
    )
    save_every: int = _setting(100, "Checkpoint every so many steps.", "Training", ge=1, le=MAX_COUNT)
    seed: int = _setting(0, "Same seed, same machine: bitwise the same adapter.", "Training", ge=0, lt=2**32)

    name: str | None = _setting(None, "Name of the adapter.", "Output", "the dataset's", min_length=1)
    adapters_dir: Path = _setting(Path("adapters"), "Where adapters are kept.", "Output")
    runs_dir: Path = _setting(Path("runs"), "Where a running job keeps its checkpoints.", "Output")
    report_to: list[str] = _setting(
        [],
        f"Hand loss and learning rate on to {' '.join(TRACKERS)}, where that is installed. May be repeated.",
        "Output",
    )
    overwrite: bool = _setting(False, "Replace an adapter of that name.", "Output")
    keep_checkpoints: bool = _setting(False, "Keep the run's folder when it has finished.", "Output")
    device: str = _setting("auto", "auto, cpu, cuda, cuda:1, mps.", "Machine")
    dtype: Dtype = _setting(
        "auto",
        "Numbers of the base; auto is bfloat16 on CUDA, or where float32 does not fit, else float32. A CPU with AMX is faster in "
        "bfloat16.",
        "Machine",
    )
    load_in: LoadIn = _setting(
        "auto",
        "Weights of the base in 8 or 4 bits (QLoRA, by bitsandbytes); auto: where they do not fit in full.",
        "Machine",
    )
    gradient_checkpointing: Literal["auto", "on", "off"] = _setting(
        "auto",
        "Compute activations again in place of keeping them: a third slower, far less memory. auto: where they do not fit.",
        "Machine",
    )

    @field_validator("where")
    @classmethod
    def _where(cls, value: list[str]) -> list[str]:
        for condition in value:
            if not condition.partition("=")[0] or "=" not in condition:
                raise ValueError(f"'{condition}' is not of the form COLUMN=VALUE")
        return value

    @field_validator("report_to")
    @classmethod
    def _trackers(cls, value: list[str]) -> list[str]:
        if unknown := sorted(set(value) - set(TRACKERS)):
            raise ValueError(f"{unknown[0]} is none of {', '.join(TRACKERS)}")
        return value

    @field_validator("eval_split")
    @classmethod
    def _of_a_dataset(cls, value: str | None, info: Any) -> str | None:
        if value is not None and info.data.get("eval_dataset", "") is None:
            raise _contradiction("eval_split needs eval_dataset: it is a split of that")
        return value

    @field_validator("force", "parent_sha256")
    @classmethod
    def _of_a_parent(cls, value: Any, info: Any) -> Any:
        if value and info.data.get("parent", "") is None:
            raise _contradiction(f"{info.field_name} is for an adapter to go on from: name it with --from")
        return value

    @field_validator("streaming")
    @classmethod
    def _unseen(cls, value: bool, info: Any) -> bool:
        if value and info.data.get("max_rows") is not None:
            raise _contradiction("streaming never has all rows, of which --max-rows draws some: give one of the two")
        if value and info.data.get("txt_rows") == "file":
            raise _contradiction("streaming reads a line at a time, and txt_rows file all of them: give one of the two")
        return value

    @field_validator("shuffle_buffer")
    @classmethod
    def _streamed(cls, value: int, info: Any) -> int:
        if value != cls.model_fields["shuffle_buffer"].default and not info.data.get("streaming", True):
            raise _contradiction("shuffle_buffer is for streaming: give that too, or leave it out")
        return value

    @field_validator("epochs")
    @classmethod
    def _counted(cls, value: float | None, info: Any) -> float | None:
        if value is not None and info.data.get("streaming"):
            raise _contradiction("epochs are not known with streaming: give max_steps or minutes")
        return value

    @field_validator("minutes")
    @classmethod
    def _one_stop(cls, value: float | None, info: Any) -> float | None:
        given = info.data | {"minutes": value}
        stops = [name for name in STOP_RULES if given.get(name) is not None]
        if len(stops) > 1:
            raise _contradiction(f"{' and '.join(stops)} contradict each other: give one of them")
        return value

    @field_validator("weight_decay")
    @classmethod
    def _whole(cls, value: float, info: Any) -> float:
        if value and info.data.get("method") == "pissa":
            raise _contradiction(
                "weight_decay would wear off the half of the update that stands for the base with pissa"
            )
        return value

    @field_validator("patience")
    @classmethod
    def _measured(cls, value: int | None, info: Any) -> int | None:
        if value is not None and info.data.get("eval_every", 1) is None:
            raise _contradiction("patience needs eval_every: it counts measurements")
        return value

    @property
    def scaling_alpha(self) -> int:
        if self.alpha is not None:
            return self.alpha
        return RSLORA_ALPHA if self.method == "rslora" else 2 * self.rank


class SamplingParams(_Settings):
    """How a continuation is drawn."""

    max_new_tokens: int = _setting(
        120, "Tokens to write at the most; the end of the text can come earlier.", "Sampling", ge=1
    )
    temperature: float = _setting(0.8, "Higher is bolder; 0 is the same as --greedy.", "Sampling", ge=0, le=10)
    top_p: float = _setting(0.95, "Draw from the likeliest tokens that make up this share.", "Sampling", gt=0, le=1)
    top_k: int = _setting(50, "Draw from so many of the likeliest tokens; 0 for all.", "Sampling", ge=0)
    repetition_penalty: float = _setting(1.1, "Above 1 makes repeating less likely.", "Sampling", gt=0, le=10)
    greedy: bool = _setting(False, "Always take the likeliest token.", "Sampling")
    seed: int | None = _setting(
        None, "Same seed, same settings, same text.", "Sampling", "another every time", ge=0, lt=2**63
    )
    n: int = _setting(1, "So many answers to each prompt.", "Sampling", ge=1, le=256)
    stop: list[str] = _setting([], "End the answer before this text. May be repeated.", "Sampling")

    @field_validator("greedy")
    @classmethod
    def _not_drawn(cls, value: bool, info: Any) -> bool:
        drawing = ("temperature", "top_p", "top_k")
        if value and any(
            info.data.get(name) != cls.model_fields[name].default for name in drawing if name in info.data
        ):
            raise _contradiction("greedy draws nothing: leave temperature, top_p and top_k out")
        return value

    @field_validator("seed")
    @classmethod
    def _of_a_draw(cls, value: int | None, info: Any) -> int | None:
        if value is not None and (info.data.get("greedy") or info.data.get("temperature") == 0):
            raise _contradiction("greedy draws nothing: leave seed out")
        return value

    @field_validator("n")
    @classmethod
    def _different(cls, value: int, info: Any) -> int:
        if value > 1 and (info.data.get("greedy") or info.data.get("temperature") == 0):
            raise _contradiction("n above 1 would all be the same: greedy has one answer")
        return value

    @field_validator("stop")
    @classmethod
    def _not_at_once(cls, value: list[str]) -> list[str]:
        if "" in value:
            raise _contradiction("stop is empty: it would end every answer at once")
        return value


class ServerConfig(_Settings):
    """How the server answers: where it listens, and how much it takes on."""

    host: str = _setting(
        "127.0.0.1", "The address to listen on; any but this machine's own needs --api-key.", "Serving"
    )
    port: int = _setting(8000, "The port to listen on; 0 for any that is free.", "Serving", ge=0, le=65535)
    api_key: str | None = _setting(
        None, "What clients must send as their API key.", "Serving", "LORA_TUNER_API_KEY, if that is set", min_length=8
    )
    max_batch: int = _setting(64, "Answers that are written at once.", "Serving", ge=1, le=1024)
    max_waiting: int = _setting(256, "Answers that may wait; beyond that, 429.", "Serving", ge=1, le=100_000)
    max_resident: int = _setting(64, "Adapters in memory; of more, those not used for longest leave.", "Serving", ge=1)
    max_tokens: int = _setting(2048, "Tokens that a request may ask for.", "Serving", ge=1, le=MAX_COUNT)
    timeout: float = _setting(300.0, "Seconds that a request may take, waiting included.", "Serving", gt=0, le=86_400)
    log_prompts: bool = _setting(False, "Write prompts and answers into the log as well.", "Serving")


@dataclass(frozen=True)
class ModelOptions:
    """Select the base model and how it is loaded.

    Args:
        base: a local folder or a Hub id; None means the base that the adapter names, else the default.
        revision: branch, tag or commit on the Hub.
        device: auto, cpu, cuda, cuda:N or mps.
        dtype: auto, float32, bfloat16, float16 or int8 (inference on a CPU).
        load_in: auto, full, 8bit or 4bit (bitsandbytes).
        force: accept an adapter on a base that it was not trained on.
        notify: receives Notice and Progress events.
    """

    base: str | None = None
    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    load_in: str = "auto"
    force: bool = False
    notify: EventHandler = ignore_events

    def require_default(self, *names: str, why: str) -> None:
        """Raise ConfigError when one of these options is set: it would have no effect."""
        for name in names:
            if getattr(self, name) != getattr(ModelOptions, name):
                raise ConfigError(f"{name} is {getattr(self, name)}: {why}, so leave it out.")


def _contradiction(text: str) -> PydanticCustomError:
    """Wrong in view of the settings before it. Said per field, so that it is reported beside the other problems."""
    return PydanticCustomError("contradiction", "{text}", {"text": text})


def _format_problems(error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        text = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "contradiction":
            where = ""
        elif problem["type"] == "extra_forbidden":
            text = "there is no such setting"
        elif where:
            text = f"{text[0].lower()}{text[1:]}"
            if where not in SECRET_FIELDS:
                got = repr(problem["input"])
                text += f" (got {got if len(got) <= 200 else f'{got[:200]} ...'})"
        lines.append(f"{where}: {text}" if where else text)
    return "; ".join(lines)


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a name is given once: of several, PyYAML takes the last without a word. And without aliases: settings need
    none, and few of them can stand for more than any memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise ValueError(
                f"line {event.start_mark.line + 1}: *{event.anchor} is an alias: write out what it stands for"
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if names and names.most_common(1)[0][1] > 1:
            raise ValueError(f"{names.most_common(1)[0][0]} is given twice")
        return super().construct_mapping(node, deep)


S = TypeVar("S", bound=_Settings)


def read_settings(file: Path) -> dict[str, Any]:
    """What a YAML file of settings holds, whosever it is. Raises ConfigError."""
    try:
        with file.open(encoding="utf-8-sig") as opened:
            text = opened.read(MAX_SETTINGS_CHARS + 1)
        if len(text) > MAX_SETTINGS_CHARS:
            raise ValueError(f"it is longer than {MAX_SETTINGS_CHARS:,} characters, and settings are not")
        loaded = yaml.load(text, _StrictLoader)
    except FileNotFoundError as error:
        raise ConfigError(f"There is no file {file}.") from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: a date such as 2024-13-45
        raise ConfigError(f"{file} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{file} holds no settings: one `name: value` a line is expected.")
    try:
        return rename_old_keys(loaded)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


def rename_old_keys(settings: dict[str, Any]) -> dict[str, Any]:
    """Replace old keys (RENAMED_SETTINGS). Raises ConfigError where the old and the new key are both given."""
    for old, new in RENAMED_SETTINGS.items():
        if old in settings and new in settings:
            raise ConfigError(f"{old} is the old name of {new}: give one of them.")
    return {RENAMED_SETTINGS.get(key, key): value for key, value in settings.items()}


def resolve_settings(kind: type[S], given: dict[str, Any], file: Path | None = None) -> S:
    """Settings from a YAML file, where there is one, with `given` laid over it. ConfigError names every problem."""
    settings = read_settings(file) if file is not None else {}
    if any(name in given for name in STOP_RULES):  # another stop rule on the command line takes the place of the file's
        settings = {key: value for key, value in settings.items() if key not in STOP_RULES}
    try:
        return kind.model_validate(settings | given)
    except ValidationError as error:
        raise ConfigError(f"{file}: {_format_problems(error)}" if file else _format_problems(error)) from error


def expand_sweep(given: dict[str, Any]) -> list[dict[str, Any]]:
    """The settings of each run, where some of `LADDER` have several values: every one with every other."""
    several = {name: given[name] for name in SWEEPABLE if isinstance(given.get(name), list)}
    return [given | dict(zip(several, values, strict=True)) for values in itertools.product(*several.values())]


def config_to_yaml(config: TrainConfig) -> str:
    """The configuration as `run.yaml` holds it: every field that has a value."""
    return yaml.safe_dump(config.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)


def default_adapter_name(dataset: str) -> str:
    """A name for an adapter after its dataset: the last part, with what names may not hold replaced."""
    stem = (
        Path(dataset).stem
        if Path(dataset).suffix.lower() in DATA_EXTENSIONS
        else dataset.rstrip("/").rpartition("/")[2]
    )
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-")[:64]
    return name if NAME_PATTERN.fullmatch(name) else f"data-{name}"[:64].rstrip("-")


DATA_EXTENSIONS = (".csv", ".tsv", ".json", ".jsonl", ".txt", ".parquet")
