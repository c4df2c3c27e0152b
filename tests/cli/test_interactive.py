"""The interactive prompt: commands, editing on a terminal, history, Ctrl-C."""

import os
import pty
import re
import select
import shutil
import signal
import stat
import sys
from types import SimpleNamespace

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from lora_tuner import Generator, ModelOptions, SamplingParams
from lora_tuner.atomic_io import cache_dir
from lora_tuner.cli import interactive, line_editor
from lora_tuner.cli.interactive import ANSWER, COMMANDS
from lora_tuner.cli.line_editor import PROMPT

from .test_commands import run

SPACE = "A prompt may begin with a space before its /."
SHORT = ("--device", "cpu", "--max-new-tokens", "4")


def answers(result):
    """The texts after the prompts of a session in a pipe."""
    return [part.removeprefix(ANSWER).removesuffix("\n") for part in result.stdout.split(PROMPT) if part]


def test_commands_change_settings_of_session(two):
    typed = [
        *("/retry", "/seed", "the", "/seed 5", "the", "/retry", "/retry", "/seed 5", "the", "/adapter verse"),
        *("/retry", "/temperature 0", "the", "/retry", "/seed 1", "/temperature", "/temperature 0.5", "/seed"),
        *(
            "/temperature hot",
            "/seed -1",
            "/adapter",
            "/seed random",
            "/base",
            "a\\",
            "b",
            "/what",
            "/help me",
            " /the",
            "/quit",
            "the",
        ),
    ]
    result = run("generate", "--adapter", "noir", *SHORT, "--seed", "3", stdin="\n".join(typed))
    generator = Generator("noir", "verse", options=ModelOptions(device="cpu"))
    short = SamplingParams(max_new_tokens=4)
    seeds = [("noir", seed) for seed in (3, 5, 6, 7, 5)] + [("verse", 5)]
    expected = [
        generator.generate_batch([("the", name)], short.model_copy(update={"seed": seed}))[0].text
        for name, seed in seeds
    ]
    expected.append(
        generator.generate_batch([("the", "verse")], SamplingParams(greedy=True, max_new_tokens=4))[0].text
    )
    shown = answers(result)
    assert shown[:-2] == [f"the{text}" for text in expected]
    assert shown[-2].startswith("a\nb")
    assert shown[-1].startswith(" /the")
    assert result.stderr.splitlines() == [
        "Using adapter noir.",
        "/help lists the commands; an empty line quits.",
        "Error: There is no prompt to generate for again: enter one first.",
        "Seed 3.",
        "Seed 5. The last text had 3.",
        "Seed 6.",
        "Seed 7.",
        "Seed 5. The last text had 7.",
        "Using adapter verse.",
        "Temperature 0: always the most likely token, whatever the seed.",
        "Error: The most likely tokens are the same again: set /temperature above 0 first.",
        "Error: The most likely tokens need no seed: set /temperature above 0 first.",
        "Temperature 0: always the most likely token, whatever the seed.",
        "Temperature 0.5.",
        "Seed random.",
        "Error: temperature: input should be a valid number (got 'hot')",
        "Error: seed: input should be greater than or equal to 0 (got '-1')",
        "Error: /adapter needs a name. Adapters: noir, verse.",
        "Seed random.",
        "Using the base without an adapter.",
        f"Error: Unknown command /what. Commands: {', '.join(COMMANDS)}; an empty line quits. {SPACE}",
        f"Error: Unknown command /help me. Commands: {', '.join(COMMANDS)}; an empty line quits. {SPACE}",
    ]


def test_help_and_adapters_are_listed(two, tmp_path):
    (tmp_path / "adapters" / "torn").mkdir()
    listed = run("generate", "--adapter", "verse", *SHORT, "--n", "2", stdin="/adapters\n/help\nthe\n")
    lines = listed.stderr.splitlines()
    assert lines[2:6] == ["(base)", "noir", "torn  broken", "verse  in use"]
    assert [line.split("  ")[0] for line in lines[6 : 6 + len(COMMANDS)]] == list(COMMANDS)
    assert "Ctrl-D quits" in lines[-1]
    assert max(map(len, lines)) <= 80
    (texts,) = (part for part in listed.stdout.split(PROMPT) if part.startswith(ANSWER))
    assert re.fullmatch(rf"{ANSWER}\n--- output 1 of 2\nthe.*\n\n--- output 2 of 2\nthe.*\n\n", texts, re.DOTALL)


@pytest.fixture
def typing(monkeypatch, tmp_path):
    """Return what the editor of the prompt makes of keys that are pressed."""
    monkeypatch.setenv("LORA_TUNER_CACHE", str(tmp_path / "cache"))

    def press(keys, completions=()):
        with create_pipe_input() as pressed, create_app_session(input=pressed, output=DummyOutput()):
            read = line_editor._open_editor(lambda: list(completions))
            pressed.send_bytes(keys.encode("utf-8", "surrogateescape"))
            texts = []
            while True:
                try:
                    texts.append(read())
                except EOFError:
                    return texts

    return press


END, ALT_ENTER, CTRL_C, CTRL_D = "\r", "\x1b\r", "\x03", "\x04"


def test_input_on_terminal_has_several_lines(typing):
    pasted = "\x1b[200~a poem\rof\r\nthree lines\n\x1b[201~"
    keys = [f"one\\{END}two{END}", f"one{ALT_ENTER}two{END}", f"{pasted}{END}", f"a\\b{END}"]
    assert typing("".join(keys) + CTRL_D) == ["one\ntwo", "one\ntwo", "a poem\nof\nthree lines\n", "a\\b"]


def test_ctrl_c_clears_input_on_terminal(typing):
    assert typing(f"wrong\\{END}lines{CTRL_C}right{END}{CTRL_C}{CTRL_D}") == ["right"]


def test_history_is_private_and_kept(typing):
    assert typing(f"first{END}sec\xe9{ALT_ENTER}ond\udcff{END}{CTRL_D}") == ["first", "sec\xe9\nond\udcff"]
    file = cache_dir() / line_editor.HISTORY_FILE
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.chmod(0o644)
    assert list(line_editor._open_history().load_history_strings()) == ["sec\xe9\nond?", "first"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_history_that_cannot_be_written_is_dropped(typing, tmp_path):
    assert typing(f"first{END}{CTRL_D}") == ["first"]
    history = line_editor._open_history()
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("a file in its place")
    history.append_string("second")  # no error
    assert typing(f"first{END}{CTRL_D}") == ["first"]
    assert (tmp_path / "cache").read_text() == "a file in its place"


def test_tab_completes_commands_and_names(typing, two):
    session = interactive._Session(
        SimpleNamespace(library=SimpleNamespace(names=lambda: ["noir"]), loaded_adapters=["verse"]), {}, None, []
    )
    assert typing(f"/adapter v\t{END}/ret\t{END}{CTRL_D}", session.completions()) == ["/adapter verse", "/retry"]


def read_until(terminal, text, seconds=60):
    """Read what a terminal shows until it has a text."""
    shown = ""
    while text not in shown:
        assert select.select([terminal], [], [], seconds)[0], shown
        shown += os.read(terminal, 10_000).decode(errors="replace")
    return shown


@pytest.mark.slow
def test_ctrl_c_in_terminal_stops_text_alone(two):
    """SIGTERM ends the command."""
    program = "from lora_tuner.cli.app import app; app()"
    options = ["generate", "--adapter", "noir", "--device", "cpu", "--n", "256"]
    environment = os.environ | {"TERM": "xterm", "PYTHONPATH": os.pathsep.join(sys.path)}
    process, terminal = pty.fork()
    if not process:
        os.execve(sys.executable, [sys.executable, "-c", program, *options], environment)
    read_until(terminal, PROMPT)
    os.write(terminal, b"the\r")
    read_until(terminal, ANSWER)
    os.write(terminal, b"\x03")
    shown = read_until(terminal, "Stopped.")
    assert PROMPT in shown or read_until(terminal, PROMPT)
    os.write(terminal, b"half\x03/seed\r")
    read_until(terminal, "Seed random.")
    os.kill(process, signal.SIGTERM)
    read_until(terminal, "Interrupted.")
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 130
    os.close(terminal)
