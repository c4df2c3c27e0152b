"""The first hour of a newcomer with notes, poems, an export and chats, in 80 and in 120 columns.

Every command of the walk runs in this process, and what it shows is compared with the text in
first_hour/COLUMNS.txt. After a change of what is shown, record it, and read the difference:

    LORA_TUNER_RECORD=1 python -m pytest -n 0 -m "slow or not slow" tests/test_first_hour.py

The text is the same on every machine: figures, times, sizes and paths are marks, and every model
says the same. Lines of stdout fit the columns; those of stderr are not divided, so that a command
in them can be copied.
"""

import difflib
import itertools
import json
import os
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from rich.cells import cell_len
from transformers import AutoTokenizer
from typer.testing import CliRunner

from lora_tuner.cli.app import app
from lora_tuner.cli.line_editor import PROMPT

from .data.test_chat import save_chat_base

RECORDED = Path(__file__).with_name("first_hour")
RECORDS = "LORA_TUNER_RECORD" in os.environ
THINGS = ("rain", "river", "train", "garden", "winter", "letter", "harbour", "lantern")
DOINGS = ("waits", "returns", "forgets", "listens", "grows", "sleeps")
PLACES = ("behind the mill", "under the stairs", "by the old gate", "in the north")
FAULTS = ("klemmt", "öffnet nicht", "quietscht")
SAID = " the rain waits in the north and nobody listens"  # by every model
TRAINING = "--base tiny --device cpu --max-steps 12 --rank 4 --learning-rate 0.01 --batch-size 2"
STOP = "lora_tuner.training.trainer.StopOnSignal.on_step_end"
INTERRUPTED = f"train --dataset notes --name again {TRAINING}"  # after its third step
# Help, a look at the data and typing errors: quick.
ARRIVING = [
    "--help",
    "train --help",
    "adapters --help",
    "train --dataset notes --base tiny --preview 1",
    "train --dataset poems.txt --base tiny --preview 1",
    "train --dataset poems.txt --clean lines --base tiny --preview 1",
    "train --dataset export.csv --base tiny --preview 1",
    "train --dataset chats.jsonl --base tiny --preview 1",
    "train --dataset peoms.txt",
    "train --datset poems.txt",
    "generate --adapter poems",
    "evaluate --adapter poems",
]
# The rest of the hour, each command with the lines that are typed meanwhile.
WALKING = {
    "doctor": "",
    "data poems.txt --base tiny --loss-rows 1": "",
    "data export.csv --text-column meldung --base tiny --loss-rows 1": "",
    "adapters list": "",
    f"train --dataset notes {TRAINING}": "",
    f"train --dataset poems.txt --clean lines {TRAINING}": "",
    "train --dataset poems.txt --clean lines --base tiny --rank 8": "",
    f"train --dataset export.csv --text-column meldung --name tickets {TRAINING}": "",
    f"train --dataset chats.jsonl {TRAINING}": "",
    INTERRUPTED: "",
    "train --resume agian": "",
    "runs": "",
    "train --resume again": "",
    "adapters show poems": "",
    "adapters check --for ollama poems": "",
    "generate --adapter poems --max-new-tokens 12 The": "",
    "generate --adapter poems --max-new-tokens 12 --n 2 The": "",
    "generate --adapter poems --max-new-tokens 12 --file prompts.txt": "",
    "generate --adapter chats --max-new-tokens 12 Where?": "",
    "generate --adapter chats --max-new-tokens 12 --no-chat Where?": "",
    "compare --adapter poems --adapter notes --max-new-tokens 12 The": "",
    "compare --adapter chats --max-new-tokens 12 Where?": "",
    "generate --adapter chats --max-new-tokens 12": (
        "/help\n/adapters\nWhere?\n/seed 3\n/temperature 0\n/retry\n/new\n/adapter peoms\n/adapter poems\nThe\n\n"
    ),
    "blend poems --name mix": "",
    "blend poems notes --name mix --eval-rows 4": "",
    "compress mix --energy 0.9 --name small --eval-rows 4": "",
    "evaluate poems notes --eval-rows 4": "",
    "adapters rename small smaller": "",
    "adapters remove nope": "",
    "adapters remove smaller": "y\n",
    "adapters list --adapters-dir adapters": "",
}
CARDS = ["adapters/poems/README.md", "adapters/chats/README.md"]
MARKS = [
    # Progress has more lines on a slow machine.
    (r"^(.+?) \d+/\d+.*\n(?:\1 \d+/\d+.*\n)*", r"\1 ...\n"),
    (r"^training \.\.\.\n(?=Step )", ""),  # its number of lines is a matter of time
    (r"(?s)\bmost in .*?\n--json", "most in LAYERS\n--json"),
    (r"(?s)\bwith torch .*?accelerate \S+", "with VERSIONS"),
    (r"\b\d{4}-\d\d-\d\d(?:[ T]\d\d:\d\d(?::\d\d\S*)?)?", "DATE"),
    (r"\b\d{7,}\b", "#"),
    (r"\b[0-9a-f]{12,64}\b", "HASH"),
    (r"\b[\d.,]+ ?(?:ms|s|seconds|min|minutes|h|hours?|days?)\b", "TIME"),
    (r"\b[\d.,]+ (?:bytes|kB|MB|GB)", "SIZE"),
    (r"(?<![\w.+-])[+-]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?%?(?![\w.]*\w)", "#"),
    (r"█+", "█"),
    (r" {2,}", "  "),
]


def line(draw):
    return f"The {draw.choice(THINGS)} {draw.choice(DOINGS)} {draw.choice(PLACES)}"


def write_data(folder):
    """Write a folder of 40 notes, a file of 60 poems, an export from Excel, and 40 chats."""
    draw = random.Random(1)
    (folder / "notes").mkdir()
    for number in range(40):
        text = f"# Note {number}\n\n{line(draw)}. {line(draw)}.\n\n- {line(draw)}\n- {line(draw)}\n"
        (folder / "notes" / f"note-{number:02}.md").write_text(text)
    poems = ["\n".join(f"{line(draw)}," for _ in range(4)) for _ in range(60)]
    (folder / "poems.txt").write_text("\n\n".join(poems) + "\n")
    rows = ["Nr;Kunde;Meldung;Datum"]
    for number in range(60):
        fault = f"Die Tür {draw.choice(FAULTS)} seit März, bitte prüfen: {line(draw)} – danke."
        rows.append(f'{1000 + number};Müller & Söhne;"{fault}";{number % 28 + 1:02}.03.2024')
    (folder / "export.csv").write_bytes(("\r\n".join(rows) + "\r\n").encode("cp1252"))
    with (folder / "chats.jsonl").open("w") as file:
        for _ in range(40):
            question, answer = f"Where is the {draw.choice(THINGS)}?", f"{line(draw)}."
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")
    (folder / "prompts.txt").write_text("The rain\nThe river\n")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return save_chat_base(tmp_path_factory.mktemp("first_hour") / "tiny")


@pytest.fixture
def walk(tiny, tmp_path, monkeypatch):
    """Return a function that runs commands in so many columns, and returns what each has shown."""
    write_data(tmp_path)
    shutil.copytree(tiny, tmp_path / "tiny")
    monkeypatch.setenv("LORA_TUNER_CACHE", str(tmp_path / "cache"))
    tokens = AutoTokenizer.from_pretrained(tiny)(SAID)["input_ids"]
    monkeypatch.setattr("lora_tuner.inference.sequence.make_logits_processors", saying(tokens))
    for module in ("text", "cli.runs"):
        # A column is as wide as it is.
        monkeypatch.setattr(f"lora_tuner.{module}.format_age", lambda _: "5 s")

    def call(columns, steps):
        monkeypatch.setenv("COLUMNS", str(columns))
        shown = {}
        for command, typed in steps.items():
            with monkeypatch.context() as patched:
                if command == INTERRUPTED:
                    patched.setattr(STOP, stop_after_third_step)
                result = CliRunner().invoke(app, command.split(), input=typed, prog_name="cli.py")
            if result.exception and not isinstance(result.exception, SystemExit):
                raise result.exception
            output = result.output if typed else result.stderr + result.stdout
            stdout = result.stdout.replace(PROMPT, f"{PROMPT}\n")  # a terminal shows Enter
            assert [text for text in stdout.splitlines() if cell_len(text) > columns] == [], command
            status = f"[exit status {result.exit_code}]" if result.exit_code else ""
            shown[f"python cli.py {command}"] = normalize(command, f"{output.rstrip()}\n{status}")
        return shown

    return call


def saying(tokens):
    """Make what stands for the logits processors of a sequence: these tokens are its text."""

    def make(sampling, *_):
        following = itertools.cycle(tokens)

        def choose(token_ids, logits):
            chosen = torch.zeros_like(logits)
            chosen[0, next(following)] = 1.0
            return chosen

        return choose

    return make


def stop_after_third_step(self, args, state, control, **kwargs):
    """Stop a run as Ctrl-C does."""
    if state.global_step == 3:
        control.should_save = control.should_training_stop = True
        self.stop.set()


def normalize(command, text):
    """Return what is the same on every machine."""
    text = text.replace(str(Path.cwd()), "FOLDER")
    if command == "doctor":  # its values are those of the machine
        text = "\n".join(re.findall(r"^\S+", text, re.MULTILINE))
    if "--help" not in command:
        for pattern, mark in MARKS:
            text = re.sub(pattern, mark, text, flags=re.MULTILINE)
    return "\n".join(line.rstrip() for line in text.splitlines()).strip("\n")


def compare(columns, shown):
    """Compare what commands have shown with what is recorded, or record it."""
    file = RECORDED / f"{columns}.txt"
    parts = re.split(r"^\$ (.*)\n", file.read_text() if file.exists() else "", flags=re.MULTILINE)
    recorded = dict(zip(parts[1::2], (text.strip("\n") for text in parts[2::2]), strict=True))
    if RECORDS:
        commands = [
            *(f"python cli.py {command}" for command in [*ARRIVING, *WALKING]),
            *(f"cat {card}" for card in CARDS),
        ]
        known = recorded | shown
        file.parent.mkdir(exist_ok=True)
        sections = [f"$ {command}\n{known.get(command, '')}\n" for command in commands]
        file.write_text("\n".join(sections))
        return
    for command, text in shown.items():
        before, now = recorded.get(command, "").splitlines(), text.splitlines()
        lines = difflib.unified_diff(before, now, "recorded", "shown", lineterm="", n=2)
        difference = "\n".join(lines)
        assert not difference, f"{command}\n{difference}\nRecord it if it is wanted: see {__file__}."


@pytest.mark.parametrize("columns", [80, 120])
def test_arriving_shows_recorded_text(walk, columns):
    compare(columns, walk(columns, dict.fromkeys(ARRIVING, "")))


@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, 120])
def test_first_hour_shows_recorded_text(walk, columns):
    compare(columns, walk(columns, WALKING))
    compare(columns, {f"cat {card}": normalize(card, Path(card).read_text()) for card in CARDS})
