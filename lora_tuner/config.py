"""Every setting of the package: its type, default, bounds and help text.

The command line, docs/commands.md and run.yaml are derived from these fields.
"""

import codecs
import csv
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import BaseModel, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from .errors import ConfigError, EventHandler, ignore_events
from .text import split_weight

DEFAULT_BASE = "distilgpt2"
AUTO_MODEL = "auto"  # lets the adapter be chosen by the prompt
RESERVED_NAME = f"the name {AUTO_MODEL} lets an adapter be chosen by the prompt, so rename this one."
NO_ADAPTER_TO_CHOOSE = (
    "there is no adapter whose scores on its held-out rows are known. Training measures them, and "
    "`python cli.py evaluate NAME --probes` for an older adapter."
)
EMBEDDED_BASE = "smollm2-135m"
HELD_OUT = "held-out"  # an `eval_dataset`: the rows held out of the training data
DELIMITER_NAMES = {"tab": "\t", "space": " "}  # of those that are not easily typed
FILE_SETTINGS = ("delimiter", "encoding", "txt_rows")  # of files of text; auto unless they are given
HELD_OUT_MAX_TOKENS = 512  # independent of `max_length`, so that runs can be compared
BATCH_SIZE_CPU, BATCH_SIZE_GPU = 1, 8  # on a CPU many small steps learn more in the same time
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
InferenceDtype = Literal["auto", "float32", "bfloat16", "float16", "int8"]
TRACKERS = ("tensorboard", "trackio", "wandb", "mlflow")
LoadIn = Literal["auto", "full", "8bit", "4bit"]
CleanMode = Literal["full", "lines", "none"]
LongRows = Literal["auto", "truncate", "chunk"]
RowFormat = Literal["auto", "text", "messages", "sharegpt", "alpaca", "prompt-completion"]
Objective = Literal["sft", "dpo", "orpo", "kto"]  # TRL's names
DEFAULT_BETA = 0.1
TEXT_PREFERENCES = "preferences of texts"  # without prompts
_PLAIN_FORMATS = {"text", "template", TEXT_PREFERENCES}  # formats in a manifest that are no conversations
NearDuplicatesRule = Literal["drop", "keep"]
MAX_RANK, MAX_ALPHA = 4096, 1_000_000
MAX_THREADS = 1024
# Upper bound of steps, minutes and sizes: a larger number is a typing error.
MAX_COUNT = 1_000_000_000
# Logits divided by less may overflow. A lower temperature is greedy, as in vLLM.
MIN_TEMPERATURE, MIN_REPETITION_PENALTY = 1e-5, 1e-9
MAX_SETTING_CHARS = 10_000  # of one value
MAX_SAMPLE_PROMPTS, MAX_SAMPLE_PROMPT_CHARS = 10, 1_000
MAX_ADDED_TOKENS, MAX_ADDED_TOKEN_CHARS = 1_000, 100
MAX_LABELS, MAX_LABEL_CHARS = 100, 200
RSLORA_ALPHA = 6  # gives rank 8 about the same scale as the other methods
LORA_PLUS_RATIO = 4.0  # learning rate of B / learning rate of A
SECRET_FIELDS = ("api_key",)  # their values never appear in error messages
INVALID_TEXT = re.compile("[\0\ud800-\udfff]")  # null bytes and lone surrogates (undecodable bytes)
# As browsers send it: http://localhost:3000, app://obsidian.md. `null` can be any page.
_ORIGIN = re.compile(
    r"(?!http:.*:80$|https:.*:443$)[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[1-9]\d{0,4})?"
)
PROBE: Final = "probe"  # a `learning_rate`: that of the best of a few short runs
# Settings that take several values: one run for each.
COMMA_SEPARATED = ("labels", "label_names", "add_tokens")  # lists that the command line takes in one value
SWEEPABLE = ("rank", "learning_rate", "max_rows", "max_steps", "epochs", "beta")
STOP_RULES = ("epochs", "max_steps", "minutes")
DEFAULT_EVAL_ROWS = 200
DEFAULT_MAX_MINUTES = 10  # limit of the default one-epoch run when no stop rule is given


def is_conversation(format: str) -> bool:
    """Return whether a format in a manifest is one of conversations; that of a blend may be several."""
    return bool(set(format.split(" + ")) - _PLAIN_FORMATS)


@dataclass(frozen=True)
class MethodInfo:
    """Peak learning rate that suits a LoRA variant (benchmarks/RESULTS.md), and when to choose it.

    `rate_share` is the share of the rate measured on B that suits A, whose rate is given.
    """

    learning_rate: float
    when: str
    rate_share: float = 1.0


MethodName = Literal["lora", "rslora", "dora", "lora+", "pissa", "eva"]
METHODS: dict[MethodName, MethodInfo] = {
    "lora": MethodInfo(2e-3, "The default: every tool reads it; no other method was clearly better on reviews."),
    "rslora": MethodInfo(
        2e-3, "To compare ranks: its scale falls with the square root of the rank, not with the rank."
    ),
    "dora": MethodInfo(2e-3, "When slightly better results at the same rank justify steps that take 50% longer."),
    "lora+": MethodInfo(
        1e-3, "B learns faster than A: the largest gain on program code. Saved as a plain LoRA.", rate_share=0.5
    ),
    "pissa": MethodInfo(
        2.5e-4,
        "Starts from the largest singular directions of the base. Saved as a plain LoRA of twice the rank.",
    ),
    "eva": MethodInfo(
        5e-4,
        "Starts from the activations that your text causes in each layer, and distributes ranks "
        "by need; this takes half a minute or more.",
    ),
}


def _split_at_commas(value: object) -> object:
    """Return the parts of a text, of which those that contain a comma are quoted; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return next(csv.reader([value], skipinitialspace=True, strict=True), None) or [""]
    except csv.Error as error:
        raise ValueError(
            "it is not a list separated by commas, with entries that contain one in quotes"
        ) from error


def _setting(
    default: Any, text: str, panel: str, shown: str | None = None, flag: str | None = None, **bounds: Any
) -> Any:
    """Create a field.

    Args:
        text: help text.
        panel: heading under which `--help` lists it.
        shown: meaning of a default of None or [].
        flag: name of the option on the command line, unless it is that of the field.
        bounds: further arguments of pydantic's Field.
    """
    return Field(
        default, description=text, json_schema_extra={"panel": panel, "shown": shown, "flag": flag}, **bounds
    )


class _Settings(BaseModel, extra="forbid", frozen=True):
    @field_validator("*", mode="before")
    @classmethod
    def _check_value(cls, value: object, info: ValidationInfo) -> object:
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("true and false are not valid here")
        texts = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
        if any(INVALID_TEXT.search(text) for text in texts):
            raise ValueError("null bytes and lone surrogates are not valid text")
        if isinstance(value, str) and len(value) > MAX_SETTING_CHARS:
            raise ValueError(f"longer than {MAX_SETTING_CHARS:,} characters")
        if value == "":
            raise ValueError("it is empty: give a value, or leave it out")
        return value


_NEEDED_SETTINGS = {  # setting -> the setting that it needs, and how the error names that
    "eval_split": ("eval_dataset", "eval_dataset"),
    "answer_column": ("template", "template, which says where in the text the answer stands"),
    **dict.fromkeys(
        ("labels", "label_names", "balance"), ("label_column", "label_column, the column of the labels")
    ),
    "parent_sha256": ("parent", "an adapter to continue from: give --from"),
    "force": ("parent", "an adapter to continue from: give --from"),
    "patience": ("eval_every", "eval_every: it counts evaluations"),
}


class TrainConfig(_Settings):
    """Configuration of one training run.

    None means that the value is derived from the rest, as the field's help text says.

    Examples:
        >>> config = TrainConfig(dataset="reviews.csv", name="noir", max_steps=20)
        >>> config.rank, config.learning_rate
        (8, None)
    """

    dataset: str | list[str] = _setting(
        "imdb",
        "imdb, a csv, tsv, json, jsonl, txt (also .gz .zst .xz .bz2), parquet, xlsx, SQLite or "
        "program code file, a document (md, html, docx, epub, eml, mbox), a folder of such files, "
        "or a Hub dataset id. Repeat it for several, maybe with weights: --dataset "
        "tickets.csv=0.7 --dataset notes=0.3 takes 70% of the training sequences from "
        "tickets.csv.",
        "Data",
    )
    subset: str | None = _setting(None, "Subset (configuration) of a Hub dataset.", "Data")
    split: str | None = _setting(
        None, "Split of a Hub dataset, or of a folder whose files are named after splits.", "Data", "train"
    )
    table: str | None = _setting(
        None, "Sheet of an Excel workbook, or table of an SQLite database.", "Data", "the only one with rows"
    )
    text_column: str | None = _setting(
        None, "Column that contains the text.", "Data", "text, content, or the only text column"
    )
    format: RowFormat = _setting(
        "auto",
        "Layout of the rows. text: the column of --text-column; messages, sharegpt: a list of "
        "messages; alpaca: instruction, input, output; prompt-completion: two columns, such as "
        "prompt and completion, or question and answer. auto: by the columns, if they leave no "
        "doubt.",
        "Data",
    )
    template: str | None = _setting(
        None,
        'Make the text of a row out of columns, such as "Question: {question}\\nAnswer: {answer}". \\n is a line break, \\t a '
        "tab, {{ and }} are braces. Only the values of the columns are cleaned.",
        "Data",
        "none",
    )
    answer_column: str | None = _setting(
        None,
        "Column in --template of which alone the text is learned, and the end of the text.",
        "Data",
        "all of the text",
    )
    label_column: str | None = _setting(
        None,
        "Learn to say which label a text has: the column of the labels. The text is that of "
        "--text-column; --template sets what is written around the two. `classify` uses the adapter.",
        "Data",
        "none",
    )
    labels: list[str] = _setting(
        [],
        "The labels that a text can have, separated by commas, one that contains a comma in double quotes; may "
        "be repeated. Rows with another label are left out and counted.",
        "Data",
        "those of the data",
    )
    label_names: list[str] = _setting(
        [],
        "Names of labels, as VALUE=NAME, separated by commas, such as 0=negative,1=positive; may be repeated.",
        "Data",
        "those of the data",
    )
    balance: bool = _setting(False, "Train on each label equally often, however many rows it has.", "Data")
    where: list[str] = _setting(
        [],
        "Keep only rows with this value, as COLUMN=VALUE. Repeat it for other values of the "
        "column, or for other columns, of which all must agree.",
        "Data",
    )
    group_by: str | None = _setting(
        None,
        "Keep all rows with the same value of this column on one side of the split, such as an "
        "author or a thread; file: all rows of a file. The standard error of the gain is then by "
        "group.",
        "Data",
    )
    max_rows: int | None = _setting(
        None,
        "Use a random sample of N rows: the same every time, and a larger N contains it. Several "
        "values, separated by commas: one run each.",
        "Data",
        "all",
        ge=2,
    )
    eval_max_rows: int | None = Field(
        default=None,
        description="Take the held-out rows from a sample of so many rows: of a sweep over max_rows the largest.",
    )
    max_invalid: float = _setting(
        0.05,
        "Stop if more than this fraction of the rows cannot be read. Up to it they are left out "
        "and counted by reason.",
        "Data",
        ge=0,
        le=1,
    )
    delimiter: str = _setting(
        "auto",
        "Delimiter of csv, tsv and txt tables: one character, tab or space. auto: by the first lines; ending: a comma "
        "in .csv, a tab in .tsv.",
        "Data",
    )
    encoding: str = _setting(
        "auto",
        "Encoding of files of text, such as cp1252 or utf-16. auto: UTF-8, or UTF-16 with its mark; else cp1252, if it "
        "looks like that.",
        "Data",
    )
    txt_rows: Literal["auto", "line", "paragraph", "file", "blank"] = _setting(
        "auto",
        "How to split txt files. line: each line is a row; file: each file; blank: at blank lines if the first 1,000 "
        "lines have any, else at each line. auto: file in a folder of documents, the rows of a table if the first "
        "lines are one, else blank.",
        "Data",
    )
    clean: Literal["auto", CleanMode] = _setting(
        "auto",
        "Cleaning of the text. full: one line without HTML tags; lines: the same with line "
        "breaks, as in poems; none: as written. auto: none for documents, program code, YAML and "
        "Markdown, else full. Messages, prompts and completions are kept as written, but for the "
        "white space around them, which only none keeps: the auto of prompt and completion.",
        "Data",
    )
    streaming: bool = _setting(
        False,
        "Read rows during training, for data that exceeds memory or disk. Duplicates are not removed.",
        "Data",
    )
    shuffle_buffer: int = _setting(
        10_000, "Rows that are shuffled and packed together with --streaming.", "Data", ge=1, le=MAX_COUNT
    )
    max_length: int = _setting(512, "Maximum tokens of a training row.", "Data", ge=8)
    long_rows: LongRows = _setting(
        "auto",
        "Rows over --max-length. truncate: drop the rest; chunk: train on the rest as further "
        "rows; auto: chunk texts, truncate conversations; of a text with a label leave the middle out.",
        "Data",
    )
    packing: bool = _setting(
        True,
        "Pack several short rows into one sequence, each with its own attention, instead of padding.",
        "Data",
    )
    split_salt: str = _setting(
        "lora_tuner", "Change this to get a different held-out split.", "Data", min_length=1
    )
    near_duplicates: NearDuplicatesRule = _setting(
        "drop",
        "Training rows that nearly copy a held-out row: drop leaves them out, as they make the "
        "gain too good; keep trains on them and counts them. With --streaming the held-out rows "
        "that are measured are compared.",
        "Data",
    )
    eval_rows: int | None = _setting(
        None,
        "Maximum number of held-out rows to evaluate on.",
        "Data",
        f"{DEFAULT_EVAL_ROWS}, or fewer if the error is small",
        ge=2,
    )
    eval_dataset: str | None = _setting(
        None,
        "Evaluate on --eval-rows of this dataset instead; its rows are read like the training "
        f"data and never trained on. {HELD_OUT}: rows held out of the training data, even if it "
        "has files of a validation or test split.",
        "Data",
        "the split validation or test of a folder, if it is the only dataset; else held-out rows",
    )
    eval_split: str | None = _setting(
        None,
        "Split of --eval-dataset, if that is a Hub dataset or a folder with splits.",
        "Data",
        "validation, else test",
    )

    base: str | None = _setting(
        None,
        "Base model: a local folder, a GGUF file or a Hub id.",
        "Model",
        f"{DEFAULT_BASE}; {EMBEDDED_BASE} if the Hub is unreachable",
    )
    revision: str | None = _setting(None, "Branch, tag or commit of the base on the Hub.", "Model")
    parent: str | None = _setting(
        None,
        "Continue training from this adapter (name or path), with its base, rank, alpha and target modules.",
        "Model",
        flag="--from",
    )
    parent_sha256: str | None = _setting(
        None,
        "Refuse --from if the sha256 of its weights is another; run.yaml contains it.",
        "Model",
        flag="--from-sha256",
    )
    force: bool = _setting(False, "With --from: allow a base that the adapter was not trained on.", "Model")
    method: MethodName = _setting("lora", "LoRA variant; `methods` explains when to choose which.", "Model")
    rank: int = _setting(
        8,
        "LoRA rank. Higher learns more and makes a larger file. Several values, separated by "
        "commas: one run each.",
        "Model",
        ge=1,
        le=MAX_RANK,
    )
    alpha: int | None = _setting(
        None,
        "The LoRA update is scaled by alpha / rank; with rslora by alpha / sqrt(rank).",
        "Model",
        f"2 x rank; {RSLORA_ALPHA} with rslora",
        ge=1,
        le=MAX_ALPHA,
    )
    dropout: float = _setting(0.0, "Dropout probability on the input of LoRA layers.", "Model", ge=0, lt=1)
    target_modules: str = _setting(
        "auto",
        "Layers that get LoRA: auto (all-linear without the routers of a mixture), attention, "
        "all-linear (linear layers and experts), or module names separated by commas.",
        "Model",
        min_length=1,
    )
    add_tokens: list[str] = _setting(
        [],
        "New tokens, separated by commas, such as '<|note|>,<|end_note|>'; may be repeated. Each "
        "is one token wherever a text has it; its rows in embedding and output head are trained "
        "and saved with the adapter, as is the tokenizer.",
        "Model",
        "none",
    )

    objective: Objective = _setting(
        "sft",
        "What is learned. sft: the text, or the answers. dpo, orpo: to prefer the answer in `chosen` to that in "
        "`rejected`. kto: the same from `prompt`, `completion` and a `label` that is true or false, or from pairs.",
        "Training",
    )
    beta: float | None = _setting(
        None,
        "Strength of a preference. dpo, kto: higher stays closer to the model before training; "
        "orpo: weight of the preference beside the text loss. Several values, separated by commas: one run each.",
        "Training",
        f"{DEFAULT_BETA} with dpo, orpo and kto",
        gt=0,
        le=MAX_COUNT,
        allow_inf_nan=False,
    )
    epochs: float | None = _setting(
        None,
        "Stop after N passes over the training rows. Several values, separated by commas: one run each.",
        "Training",
        gt=0,
        le=MAX_COUNT,
        allow_inf_nan=False,
    )
    max_steps: int | None = _setting(
        None,
        "Stop after N optimizer steps. Several values, separated by commas: one run each.",
        "Training",
        ge=1,
        le=MAX_COUNT,
    )
    minutes: float | None = _setting(
        None,
        "Stop after about N minutes of training; a measurement at the start converts them to steps.",
        "Training",
        gt=0,
        le=MAX_COUNT,
        allow_inf_nan=False,
        validate_default=True,  # its validator checks all stop rules
    )
    batch_size: int | None = _setting(
        None,
        "Sequences per batch, on each process.",
        "Training",
        f"{BATCH_SIZE_CPU} on a CPU, {BATCH_SIZE_GPU} on a GPU",
        ge=1,
        le=MAX_COUNT,
    )
    gradient_accumulation: int = _setting(
        1, "Batches whose gradients are accumulated for one optimizer step.", "Training", ge=1, le=MAX_COUNT
    )
    learning_rate: float | Literal["probe"] | None = _setting(
        None,
        "Peak learning rate; with lora+ that of A (B: 4 times as high). Several values, separated "
        "by commas: one run each. probe: the best by held-out loss of a few short runs around the "
        "default, which cost at most a fifth of the run.",
        "Training",
        "measured on the base with some of the data",
    )
    schedule: Literal["linear", "cosine", "constant"] = _setting(
        "linear", "Learning rate schedule after the warmup.", "Training"
    )
    warmup: float = _setting(
        0.05, "Fraction of the steps in which the learning rate rises.", "Training", ge=0, lt=1
    )
    weight_decay: float = _setting(0.0, "Weight decay of AdamW.", "Training", ge=0, allow_inf_nan=False)
    max_grad_norm: float = _setting(1.0, "Clip gradients to this norm.", "Training", gt=0, allow_inf_nan=False)
    eval_every: int | None = _setting(
        None,
        "Measure the loss of all held-out rows every N steps.",
        "Training",
        "after training; until then, an eighth of the run apart, on a fixed subset that takes up to 3% "
        "of the run, or a few seconds",
        ge=1,
        le=MAX_COUNT,
    )
    patience: int | None = _setting(
        None,
        "Stop after N evaluations without improvement and keep the best weights. Needs --eval-every.",
        "Training",
        ge=1,
    )
    sample_prompt: list[str] = _setting(
        [],
        "Show base and adapter continuing this prompt, with one seed, at the start, with each held-out loss and at the "
        "end; samples.jsonl has them. Changes nothing in the result; takes up to 3% of the run, or a few seconds. May be "
        "repeated.",
        "Training",
        "three from held-out rows",
    )
    save_every: int = _setting(100, "Save a checkpoint every N steps.", "Training", ge=1, le=MAX_COUNT)
    seed: int = _setting(
        0, "Random seed. On one machine, the same seed gives a bitwise equal adapter.", "Training", ge=0, lt=2**32
    )

    name: str | None = _setting(None, "Name of the adapter.", "Output", "that of the dataset", min_length=1)
    adapters_dir: Path = _setting(Path("adapters"), "Folder of the adapter library.", "Output")
    runs_dir: Path = _setting(Path("runs"), "Folder for checkpoints of unfinished runs.", "Output")
    report_to: list[str] = _setting(
        [], f"Report loss and learning rate to {', '.join(TRACKERS)}, if installed. May be repeated.", "Output"
    )
    overwrite: bool = _setting(False, "Replace an adapter or an unfinished run of this name.", "Output")
    keep_checkpoints: bool = _setting(False, "Keep the checkpoints of the run when it has finished.", "Output")
    device: str = _setting("auto", "auto (CUDA, else MPS, else the CPU), cpu, cuda, cuda:N or mps.", "Machine")
    dtype: Dtype = _setting(
        "auto",
        "Precision of the base. auto: bfloat16 on CUDA, on a CPU that multiplies in it faster, or "
        "if float32 does not fit into memory; else float32.",
        "Machine",
    )
    load_in: LoadIn = _setting(
        "auto",
        "Precision of the base's weights: full, or quantized to 8 or 4 bits, by bitsandbytes "
        "(QLoRA); for generation on a CPU without it, which is the fastest there. auto: quantized "
        "only if the full weights do not fit into memory.",
        "Machine",
    )
    threads: int | None = _setting(
        None,
        "Threads that compute on a CPU. On a busy machine 1 may be much faster.",
        "Machine",
        "OMP_NUM_THREADS, else the cores",
        ge=1,
        le=MAX_THREADS,
    )
    gradient_checkpointing: Literal["auto", "on", "off"] = _setting(
        "auto",
        "Recompute activations instead of storing them: a third slower, far less memory. auto: "
        "only if they do not fit into memory.",
        "Machine",
    )

    @field_validator("format")
    @classmethod
    def _check_format(cls, value: str, info: ValidationInfo) -> str:
        if value not in ("auto", "text") and info.data.get("text_column") is not None:
            raise _contradiction(
                f"format {value} reads conversations and text_column a text: give one of the two, or format text"
            )
        return value

    @field_validator("dataset", mode="before")
    @classmethod
    def _check_datasets(cls, value: object) -> object:
        entries = value if isinstance(value, list) else [value]
        if isinstance(value, bool):
            return value  # `_check_value` refuses it
        if not all(isinstance(entry, str) for entry in entries):
            raise ValueError("input should be a valid string")
        names, weights = zip(*map(split_weight, entries), strict=True) if entries else ((), ())
        if len(entries) == 1 and weights == (None,):
            return entries[0]
        if len(entries) < 2:
            raise ValueError("a weight needs several datasets" if entries else "no dataset is named")
        if len(set(names)) < len(names) or not all(names):
            raise ValueError("a dataset is named twice, or has no name")
        if any(weights) and None in weights:
            raise ValueError(f"{names[weights.index(None)]} has no weight: give all a weight, or none")
        if any(weight is not None and not 0 < weight < math.inf for weight in weights):
            raise ValueError("a weight is a number above 0")
        return value

    @field_validator("delimiter")
    @classmethod
    def _check_delimiter(cls, value: str) -> str:
        name = next((name for name, character in DELIMITER_NAMES.items() if value in (name, character)), None)
        if name or value in ("auto", "ending", r"\t"):
            return name or value.replace(r"\t", "tab")
        if len(value) > 1 or value.isalnum() or value in '"\r\n':
            raise ValueError(
                "give one character that is no letter, digit or quote, or tab, space, auto or ending"
            )
        return value

    @field_validator("encoding")
    @classmethod
    def _check_encoding(cls, value: str) -> str:
        if value == "auto":
            return value
        try:
            "".encode(value)  # not of bytes, as those of base64
        except (LookupError, ValueError):
            raise ValueError("unknown: give one of Python's names, such as cp1252, utf-16 or shift_jis") from None
        return codecs.lookup(value).name

    @field_validator("template")
    @classmethod
    def _check_template(cls, value: str | None, info: ValidationInfo) -> str | None:
        for name in ("text_column", "format"):
            chosen = info.data.get(name)
            if value is not None and chosen not in (None, "auto", "text" if name == "format" else None):
                raise _contradiction(f"template and {name} {chosen} contradict each other: give one of them")
        return value

    @field_validator("label_column")
    @classmethod
    def _check_label_column(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("answer_column") is not None:
            raise _contradiction("label_column and answer_column both name what is learned: give one of them")
        if value is not None and info.data.get("format") not in ("auto", "text", None):
            raise _contradiction(
                f"label_column reads texts and format {info.data['format']} conversations: give one of the two"
            )
        if value is not None and value == info.data.get("text_column"):
            raise _contradiction("label_column and text_column are the same column: name two")
        return value

    @field_validator("labels", "label_names", mode="before")
    @classmethod
    def _split_labels(cls, value: object) -> object:
        entries = _split_at_commas(value)
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            return value  # its type is refused
        labels = [" ".join(label.split()) for label in entries]
        if "" in labels:
            raise ValueError("a label is empty: separate labels by single commas")
        if len(labels) > MAX_LABELS:
            raise ValueError(f"{len(labels):,} labels are too many: at most {MAX_LABELS} are taken")
        if any(len(label) > MAX_LABEL_CHARS for label in labels):
            raise ValueError(f"a label is too long: at most {MAX_LABEL_CHARS} characters are taken")
        return labels

    @field_validator("labels")
    @classmethod
    def _check_labels(cls, value: list[str]) -> list[str]:
        if twice := [label for label in dict.fromkeys(value) if value.count(label) > 1]:
            raise ValueError(f"{twice[0]} is given twice")
        if len(value) == 1:
            raise ValueError(f"{value[0]} is the only label: give two or more")
        return value

    @field_validator("label_names")
    @classmethod
    def _check_label_names(cls, value: list[str]) -> list[str]:
        pairs = [entry.partition("=") for entry in value]
        for entry, (number, _, name) in zip(value, pairs, strict=True):
            if not number.strip() or not name.strip():
                raise ValueError(f"'{entry}' is not of the form VALUE=NAME")
        for column in (0, 2):
            parts = [pair[column].strip() for pair in pairs]
            if twice := [part for part in dict.fromkeys(parts) if parts.count(part) > 1]:
                raise ValueError(f"{twice[0]} is given twice")
        return value

    @field_validator("balance")
    @classmethod
    def _check_balance(cls, value: bool, info: ValidationInfo) -> bool:
        names = info.data.get("dataset")
        if value and isinstance(names, list) and any(split_weight(name)[1] is not None for name in names):
            raise _contradiction("balance and weights of datasets contradict each other: give one of them")
        return value

    @field_validator("objective")
    @classmethod
    def _check_objective(cls, value: Objective, info: ValidationInfo) -> Objective:
        if value == "sft":
            return value
        for name in ("text_column", "template", "label_column"):
            if info.data.get(name) is not None:
                raise _contradiction(f"objective {value} learns from preferences: leave {name} out")
        if (layout := info.data.get("format", "auto")) != "auto":
            raise _contradiction(f"objective {value} learns from preferences: leave format {layout} out")
        if info.data.get("long_rows") == "chunk":
            raise _contradiction(f"objective {value} compares whole answers: long_rows chunk would divide them")
        if info.data.get("streaming"):
            raise _contradiction(
                f"objective {value} is not possible with streaming: its rows are prepared before the first step"
            )
        return value

    @field_validator("beta")
    @classmethod
    def _check_beta(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and info.data.get("objective") == "sft":
            raise _contradiction("beta needs objective dpo, orpo or kto: sft has no preferences")
        return value

    @field_validator("where")
    @classmethod
    def _check_conditions(cls, value: list[str]) -> list[str]:
        for condition in value:
            if not condition.partition("=")[0] or "=" not in condition:
                raise ValueError(f"'{condition}' is not of the form COLUMN=VALUE")
        return value

    @field_validator("add_tokens", mode="before")
    @classmethod
    def _check_added_tokens(cls, value: object) -> object:
        entries = _split_at_commas(value)
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            return value  # its type is refused
        tokens = [token.strip() for token in entries]
        if "" in tokens:
            raise ValueError("a token is empty: separate tokens by single commas")
        if twice := [token for token in dict.fromkeys(tokens) if tokens.count(token) > 1]:
            raise ValueError(f"{twice[0]} is given twice")
        if len(tokens) > MAX_ADDED_TOKENS:
            raise ValueError(f"{len(tokens):,} tokens are too many: at most {MAX_ADDED_TOKENS:,} are added")
        if long := [token for token in tokens if len(token) > MAX_ADDED_TOKEN_CHARS]:
            raise ValueError(
                f"a token has {len(long[0]):,} characters: at most {MAX_ADDED_TOKEN_CHARS} are taken"
            )
        if spaced := [token for token in tokens if " ".join(token.split()) != token]:
            raise ValueError(f"{spaced[0]!r} has white space other than single spaces, which no cleaned text has")
        return tokens

    @field_validator("sample_prompt")
    @classmethod
    def _check_sample_prompts(cls, value: list[str]) -> list[str]:
        if len(value) > MAX_SAMPLE_PROMPTS:
            raise ValueError(f"{len(value):,} prompts are too many: at most {MAX_SAMPLE_PROMPTS} are taken")
        if any(not prompt.strip() for prompt in value):
            raise ValueError("a prompt is blank: give text to continue")
        if any(len(prompt) > MAX_SAMPLE_PROMPT_CHARS for prompt in value):
            raise ValueError(f"a prompt is too long: at most {MAX_SAMPLE_PROMPT_CHARS:,} characters are taken")
        if len(set(value)) < len(value):
            raise ValueError("a prompt is given twice")
        return value

    @field_validator("report_to")
    @classmethod
    def _check_trackers(cls, value: list[str]) -> list[str]:
        if unknown := sorted(set(value) - set(TRACKERS)):
            raise ValueError(f"unknown tracker {unknown[0]}: choose from {', '.join(TRACKERS)}")
        return value

    @field_validator(*_NEEDED_SETTINGS)
    @classmethod
    def _check_needed_setting(cls, value: object, info: ValidationInfo) -> object:
        needed, text = _NEEDED_SETTINGS[str(info.field_name)]
        if value and info.data.get(needed, "") is None:
            raise _contradiction(f"{info.field_name} needs {text}")
        return value

    @field_validator("learning_rate", mode="before")
    @classmethod
    def _check_learning_rate(cls, value: object) -> object:
        if value in (None, PROBE) or isinstance(value, bool):
            return value  # `_check_value` refuses the latter
        try:
            rate = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"input should be a valid number, or {PROBE}") from None
        if not math.isfinite(rate):
            raise ValueError("input should be a finite number")
        if rate <= 0:
            raise ValueError("input should be greater than 0")
        return rate

    @field_validator("learning_rate", "patience")
    @classmethod
    def _check_chosen_by_text(cls, value: object, info: ValidationInfo) -> object:
        objective = info.data.get("objective", "sft")
        if objective != "sft" and value is not None and (info.field_name == "patience" or value == PROBE):
            chosen = "patience" if info.field_name == "patience" else f"learning_rate {PROBE}"
            raise _contradiction(
                f"{chosen} chooses by the held-out loss of text, which objective {objective} does not lower: leave it out"
            )
        return value

    @field_validator("eval_max_rows")
    @classmethod
    def _check_eval_max_rows(cls, value: int | None, info: ValidationInfo) -> int | None:
        max_rows = info.data.get("max_rows")
        if value is not None and (max_rows is None or value < max_rows):
            raise _contradiction(
                f"eval_max_rows is {value}, but max_rows {max_rows}: give both, max_rows no larger"
            )
        return value

    @field_validator("streaming")
    @classmethod
    def _check_streaming(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("max_rows") is not None:
            raise _contradiction("streaming cannot sample max_rows from all rows: give one of the two")
        if value and info.data.get("balance"):
            raise _contradiction("streaming cannot count labels before it reads them: leave balance out")
        if value and info.data.get("label_column") is not None and not info.data.get("labels"):
            raise _contradiction("streaming does not know the labels before it has read all rows: give labels")
        if value and info.data.get("txt_rows") == "file":
            raise _contradiction(
                "streaming reads line by line, but txt_rows file needs whole files: give one of the two"
            )
        return value

    @field_validator("long_rows")
    @classmethod
    def _check_long_rows(cls, value: str, info: ValidationInfo) -> str:
        if value != "auto" and info.data.get("label_column") is not None:
            raise _contradiction(
                f"long_rows {value} would lose labels: with label_column the middle of a long text is left out"
            )
        return value

    @field_validator("shuffle_buffer")
    @classmethod
    def _check_shuffle_buffer(cls, value: int, info: ValidationInfo) -> int:
        if not info.data.get("streaming", True):
            raise _contradiction("shuffle_buffer needs streaming: give both or none")
        return value

    @field_validator("epochs")
    @classmethod
    def _check_epochs(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and info.data.get("streaming"):
            raise _contradiction(
                "epochs is not possible with streaming, where the number of rows is unknown: give "
                "max_steps or minutes"
            )
        return value

    @field_validator("minutes")
    @classmethod
    def _check_stop_rules(cls, value: float | None, info: ValidationInfo) -> float | None:
        settings = info.data | {"minutes": value}
        stops = [name for name in STOP_RULES if settings.get(name) is not None]
        if len(stops) > 1:
            names = f"{', '.join(stops[:-1])} and {stops[-1]}"
            raise _contradiction(f"{names} contradict each other: give one of them")
        return value

    @field_validator("weight_decay")
    @classmethod
    def _check_weight_decay(cls, value: float, info: ValidationInfo) -> float:
        if value and info.data.get("method") == "pissa":
            raise _contradiction(
                "weight_decay is not possible with pissa: it would decay the part of its weights "
                "that belongs to the base"
            )
        return value

    @property
    def weighted_datasets(self) -> list[tuple[str, float | None]]:
        """Name and weight of each dataset; a weight is None without weights."""
        return [
            split_weight(entry) for entry in ([self.dataset] if isinstance(self.dataset, str) else self.dataset)
        ]

    @property
    def dataset_names(self) -> list[str]:
        """Name of each dataset, without its weight."""
        return [name for name, _ in self.weighted_datasets]

    @property
    def other_eval_dataset(self) -> str | None:
        """The evaluation dataset, if it is not rows held out of the training data."""
        return None if self.eval_dataset == HELD_OUT else self.eval_dataset

    @property
    def eval_rows_limit(self) -> int:
        """Largest number of held-out rows that are measured."""
        return self.eval_rows or DEFAULT_EVAL_ROWS

    @property
    def learns_preferences(self) -> bool:
        """True if the rows are preferences (`data.preferences`), not texts."""
        return self.objective != "sft"

    @property
    def sides_per_row(self) -> int:
        """Answers in a training row: two of a pair, else one."""
        return 2 if self.objective in ("dpo", "orpo") else 1

    @property
    def label_name_of(self) -> dict[str, str]:
        """Name of each value in `label_names`."""
        pairs = [entry.partition("=") for entry in self.label_names]
        return {value.strip(): name.strip() for value, _, name in pairs}

    @property
    def scaling_alpha(self) -> int:
        """Alpha, or its default for this rank and method."""
        default = RSLORA_ALPHA if self.method == "rslora" else 2 * self.rank
        return self.alpha or default


_NEEDS_SAMPLING = {  # setting that has no effect without sampling -> error
    "seed": "greedy does not sample: leave seed out",
    "n": "n above 1 needs sampling: greedy outputs are all the same",
}


class SamplingParams(_Settings):
    """Sampling settings of one request.

    Examples:
        >>> SamplingParams(temperature=0.7, seed=1, stop=["###"]).max_new_tokens
        120
    """

    greedy: bool = _setting(False, "Always take the most likely token.", "Sampling")
    max_new_tokens: int = _setting(120, "Maximum number of tokens to generate per output.", "Sampling", ge=1)
    temperature: float = _setting(
        0.8,
        "Sampling temperature. Higher is more random; 0, or less than 0.00001, is the same as --greedy.",
        "Sampling",
        ge=0,
        le=10,
    )
    top_p: float = _setting(
        0.95, "Sample from the most likely tokens whose probabilities add up to this.", "Sampling", gt=0, le=1
    )
    top_k: int = _setting(50, "Sample from the K most likely tokens; 0 for all.", "Sampling", ge=0)
    repetition_penalty: float = _setting(
        1.1,
        "Values above 1 make tokens that occurred before less likely. Greedy decoding has none unless this is given.",
        "Sampling",
        ge=MIN_REPETITION_PENALTY,
        le=10,
    )
    min_p: float = _setting(
        0.0,
        "Leave out tokens with less than this share of the top token's probability.",
        "More sampling",
        ge=0,
        le=1,
    )
    presence_penalty: float = _setting(
        0.0,
        "Lower the logits of tokens that the output has so far; below 0 raises them.",
        "More sampling",
        ge=-2,
        le=2,
    )
    frequency_penalty: float = _setting(
        0.0, "Like --presence-penalty, once for each time that the token occurs.", "More sampling", ge=-2, le=2
    )
    seed: int | None = _setting(
        None, "Random seed. The same seed and settings give the same text.", "Sampling", "random", ge=0, lt=2**63
    )
    n: int = _setting(1, "Number of outputs per prompt.", "Sampling", ge=1, le=256)
    stop: list[str] = _setting([], "Stop sequence: the output ends before it. May be repeated.", "Sampling")
    # Of the API alone: without a panel a field is no option of the command line.
    logit_bias: dict[int, float] = Field(default={}, description="Added to the logits of these tokens.")
    min_new_tokens: int = Field(
        default=0, ge=0, description="Nothing ends the output before it has so many tokens."
    )
    stop_token_ids: list[int] = Field(
        default=[], description="Tokens that end the output, and are no part of it."
    )
    ignore_eos: bool = Field(default=False, description="Continue past the end of text and of a turn.")
    include_stop_str_in_output: bool = Field(default=False, description="Keep the stop sequence in the output.")

    @field_validator("temperature")
    @classmethod
    def _round_temperature(cls, value: float) -> float:
        return value if value >= MIN_TEMPERATURE else 0.0

    @field_validator("temperature", "top_p", "top_k", "min_p")  # run for a given value, be it the default
    @classmethod
    def _check_greedy(cls, value: float, info: ValidationInfo) -> float:
        if info.data.get("greedy"):
            raise _contradiction("greedy does not sample: leave temperature, top_p, top_k and min_p out")
        return value

    @field_validator(*_NEEDS_SAMPLING)
    @classmethod
    def _check_sampling(cls, value: object, info: ValidationInfo) -> object:
        name, is_greedy = str(info.field_name), info.data.get("greedy") or info.data.get("temperature") == 0
        if is_greedy and value != cls.model_fields[name].default:
            raise _contradiction(_NEEDS_SAMPLING[name])
        return value

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, value: list[str]) -> list[str]:
        if "" in value:
            raise _contradiction("stop is empty: it would end every output at once")
        return value

    @model_validator(mode="after")
    def _decode_greedily(self) -> Self:
        """Make greedy decoding the argmax of the logits, as in other tools, if no penalty is given."""
        if self.is_greedy and "repetition_penalty" not in self.model_fields_set:
            self.__dict__["repetition_penalty"] = 1.0  # settings are frozen
        return self

    @property
    def is_greedy(self) -> bool:
        """True if each token is the most likely one, so that no seed is used."""
        return self.greedy or self.temperature == 0


class ServerConfig(_Settings):
    """Address and limits of the server."""

    host: str = _setting(
        "127.0.0.1", "Address to listen on; all but loopback addresses need --api-key.", "Serving"
    )
    port: int = _setting(8000, "Port to listen on; 0 for any free port.", "Serving", ge=0, le=65535)
    api_key: str | None = _setting(
        None, "API key that clients must send.", "Serving", "LORA_TUNER_API_KEY, if that is set", min_length=8
    )
    allow_origin: list[str] = _setting(
        [],
        "Origin of web pages that may call the API from a browser, such as http://localhost:3000; "
        "* for any page. May be repeated.",
        "Serving",
        "none",
    )
    max_batch: int = _setting(
        64, "Maximum number of outputs generated at the same time.", "Serving", ge=1, le=1024
    )
    max_waiting: int = _setting(
        256,
        "Maximum number of outputs in the queue; further requests get status 429.",
        "Serving",
        ge=1,
        le=100_000,
    )
    max_connections: int = _setting(
        400,
        "Maximum number of open connections. Beyond it the ones that wait for their client are "
        "closed, and requests get status 503 if there are none.",
        "Serving",
        ge=4,
        le=100_000,
    )
    max_resident: int = _setting(
        64, "Maximum number of adapters in memory; the least recently used are unloaded.", "Serving", ge=1
    )
    max_tokens: int = _setting(
        2048, "Maximum number of tokens that a request may generate.", "Serving", ge=1, le=MAX_COUNT
    )
    timeout: float = _setting(
        300.0, "Maximum seconds per request, time in the queue included.", "Serving", gt=0, le=86_400
    )
    log_prompts: bool = _setting(False, "Log prompts and outputs as well.", "Serving")
    allow_training: bool = _setting(
        False,
        "Let the page upload files and train. At a loopback address, which only this machine can reach, it may anyway.",
        "Serving",
    )
    runs_dir: Path = _setting(
        Path("runs"),
        "Folder of the runs that the page shows and starts, of uploaded files, and of thumbs in feedback.jsonl.",
        "Serving",
    )

    @field_validator("allow_origin")
    @classmethod
    def _check_origins(cls, value: list[str]) -> list[str]:
        for origin in value:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise _contradiction(
                    f"allow_origin: {origin} is no origin as browsers send it. Give SCHEME://HOST "
                    "or SCHEME://HOST:PORT in lower case, without a path or the scheme's default "
                    "port, or *"
                )
        return value


@dataclass(frozen=True)
class ModelOptions:
    """Select the base model and how it is loaded.

    Args:
        base: a local folder, a GGUF file or a Hub id; None means the base that the adapter names, else the default.
        revision: branch, tag or commit on the Hub.
        device: auto, cpu, cuda, cuda:N or mps.
        dtype: auto, float32, bfloat16, float16 or int8 (on a CPU, the same as `load_in` 8bit).
        load_in: auto, full, 8bit or 4bit (bitsandbytes; for generation on a CPU `models/quantization`).
        threads: threads that compute on a CPU, in this process from then on; None leaves torch's number.
        force: accept an adapter on a base that it was not trained on.
        notify: receives Notice and Progress events.
    """

    base: str | None = None
    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    load_in: str = "auto"
    threads: int | None = None
    force: bool = False
    notify: EventHandler = ignore_events

    def require_default(self, *names: str, why: str) -> None:
        """Raise ConfigError when one of these options is set: it would have no effect."""
        for name in names:
            if getattr(self, name) != getattr(ModelOptions, name):
                raise ConfigError(f"{name} is {getattr(self, name)}: {why}, so leave it out.")


def _contradiction(text: str) -> PydanticCustomError:
    """Create the error of a setting that contradicts earlier ones.

    Raised per field, so that pydantic reports it together with the other problems.
    """
    return PydanticCustomError("contradiction", "{text}", {"text": text})
