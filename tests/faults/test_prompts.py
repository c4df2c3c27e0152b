"""Prompts that are not what a prompt should be: on the command line, in files, and typed one after another."""

import json
import sys

import pytest

from lora_tuner.cli.generate import ANSWER, PROMPT
from lora_tuner.data import tokenization
from lora_tuner.models.loading import load_tokenizer
from lora_tuner.models.resolve import find_base

from .. import tiny_models
from .process import unchanged

GREEDY = ("--greedy", "--repetition-penalty", "1")
TOO_LONG = "the actor never works. " * 60
END = tiny_models.END


@pytest.fixture
def write_on(run, gpt2):
    """`generate` over the plain base, greedily, with 8 tokens unless said."""

    def call(*arguments, base=gpt2, status=0, **more):
        room = () if "--max-new-tokens" in arguments else ("--max-new-tokens", 8)
        ended = run("generate", "--base", base, *GREEDY, *room, *arguments, **more)
        assert ended.status == status, ended.err
        return ended

    return call


def length(base, prompt):
    """Tokens of a prompt; of one without any, that of the beginning."""
    (row,) = tokenization.encode_texts(load_tokenizer(find_base(str(base))), [prompt], add_eos=False)
    return max(len(row), 1)


ODD = ["", " ", "   \n\t ", END, f"the {END} actor", "\U0001f600" * 5, "\u202e\u200b", "a\x07b\x1b[31m", "e\u0301" * 9]


@pytest.mark.parametrize("kind", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_output_ends_at_context_limit(write_on, request, kind):
    """Which also shows that what spells a special token is read as the text that it is."""
    base = request.getfixturevalue(kind)
    for prompt in ODD[::2] if kind == "gpt2" else ODD:
        ended = write_on("--max-new-tokens", 10_000, "--json", "--", prompt, base=base)
        (answer,) = json.loads(ended.out)
        assert answer["prompt"] == prompt
        if not answer["finished"]:
            assert answer["tokens"] == tiny_models.CONTEXT - length(base, prompt)
        assert answer["tokens"] <= tiny_models.CONTEXT - length(base, prompt)
    assert length(base, END) > 5


def test_odd_prompts_are_shown_unchanged(write_on):
    for prompt in ODD[4::2]:
        assert write_on("--", prompt).out.startswith(prompt)


@pytest.mark.parametrize("more", [0, 1, 1000])
def test_prompt_filling_context_is_rejected(write_on, gpt2, more):
    fits = "a" * (tiny_models.CONTEXT - 1)
    assert length(gpt2, fits) == tiny_models.CONTEXT - 1
    assert json.loads(write_on("--json", fits).out)[0]["tokens"] <= 1
    if more:
        ended = write_on("--json", fits + "a" * more, status=1)
        assert ended.out == ""
        assert f"The prompt has {tiny_models.CONTEXT - 1 + more:,} tokens, but " in ended.line
        assert ended.line.endswith(f"has a context of {tiny_models.CONTEXT}: shorten it.")


def test_non_utf8_prompt_is_rejected(write_on, run, tmp_path):
    with unchanged(tmp_path / "."):
        for command in (("generate", *GREEDY), ("compare", "--adapter", "x")):
            ended = run(*command, "caf\udce9", cache=tmp_path.parent / f"{tmp_path.name}-cache")
            assert (ended.status, ended.out) == (2, "")
            assert ended.line.startswith("Error: Invalid value for 'prompt': it is no text in UTF-8.")


MANY = [f"{number}: the actor" for number in range(10_000)]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (TOO_LONG.encode(), "Prompt 7,000 of 10,000: The prompt has "),
        (b"caf\xe9", "is not UTF-8 in line 7,000: save it as UTF-8."),
        (b"a\0b", "holds null bytes in line 7,000, as UTF-16 does: save it as UTF-8."),
        pytest.param(b"x" * 1_000_000, "Prompt 7,000 of 10,000: The prompt has ", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("command", ["generate", pytest.param("compare", marks=pytest.mark.slow)])
def test_bad_prompt_stops_before_any_output(run, gpt2, adapter, tmp_path, line, why, command):
    lines = [text.encode() for text in MANY]
    lines[6999] = line
    (tmp_path / "prompts.txt").write_bytes(b"\n".join(lines))
    given = ("--adapter", "reviews") if command == "compare" else ("--base", gpt2, "--json")
    ended = run(command, *given, "--file", "prompts.txt")
    assert (ended.status, ended.out) == (1, "")
    assert why in ended.line


@pytest.mark.parametrize(
    "content",
    [
        b"the actor\nthis film\n",
        b"the actor\r\nthis film",
        b"\xef\xbb\xbfthe actor\r\n\r\n  \r\nthis film\r\n",
        b"the actor\rthis film\r",
    ],
)
def test_prompt_file_accepts_all_line_endings(write_on, tmp_path, content):
    (tmp_path / "prompts.txt").write_bytes(content)
    answers = json.loads(write_on("--file", "prompts.txt", "--json").out)
    assert [answer["prompt"] for answer in answers] == ["the actor", "this film"]
    piped = write_on("-", "--json", before=_stdin(content))
    assert json.loads(piped.out) == answers


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "Standard input holds no prompt: one a line is expected."),
        (b"\xef\xbb\xbf\n \r\n", "Standard input holds no prompt"),
        (b"the actor\ncaf\xe9\n", "Standard input is not UTF-8 in line 2: save it as UTF-8."),
        ("the actor\n".encode("utf-16-le"), "Standard input holds null bytes in line 1, as UTF-16 does"),
        (f"the actor\n\n{TOO_LONG}\n".encode(), "Prompt 2 of 2: The prompt has "),
    ],
)
def test_bad_standard_input_is_rejected(write_on, content, why):
    ended = write_on("-", before=_stdin(content), status=1)
    assert ended.out == ""
    assert why in ended.line


@pytest.mark.parametrize("count", [("--greedy",), ("--n", "2")])
def test_command_tokenizes_each_prompt_once(run, gpt2, tmp_path, count):
    counts = tmp_path / "counts"
    ended = run(*("generate", "--base", gpt2, "--max-new-tokens", 2, *count, "-"), before=_CountTokenizer(counts))
    assert ended.status == 0, ended.err
    assert counts.read_text().splitlines() == ["the actor", "this film"]


class _CountTokenizer:
    """Write each text that is tokenized to a file, and put two prompts on standard input."""

    def __init__(self, path):
        self.path = path

    def __call__(self):
        from transformers import PreTrainedTokenizerBase

        tokenize = PreTrainedTokenizerBase.__call__

        def counted(tokenizer, text, **options):
            with self.path.open("a") as file:
                file.write("".join(f"{each}\n" for each in text))
            return tokenize(tokenizer, text, **options)

        PreTrainedTokenizerBase.__call__ = counted
        _stdin(b"the actor\nthis film\n")()


class _stdin:
    """Other bytes on standard input; None closes it."""

    def __init__(self, content):
        self.content = content

    def __call__(self):
        import io

        if self.content is None:
            sys.stdin = None
        else:
            sys.stdin = io.TextIOWrapper(io.BytesIO(self.content), encoding="utf-8")


def test_closed_standard_input_is_empty(write_on):
    assert "Standard input holds no prompt" in write_on("-", before=_stdin(None), status=1).line
    assert write_on(before=_stdin(None)).out == PROMPT + "\n" * 0


def test_interactive_mode_survives_bad_lines(write_on):
    good = write_on("the actor").out
    bad = {
        b"caf\xe9": "Error: What was typed is no text in UTF-8: type it anew.",
        b"a\0b": "Error: What was typed is no text in UTF-8: type it anew.",
        TOO_LONG.encode(): "Error: The prompt has ",
        b"/adapter ../x": "Error: There is no adapter '../x'",
        b"/adapter caf\xe9": "Error: What was typed is no text in UTF-8: type it anew.",
        b"/nonsense": "Error: There is no /nonsense: ",
    }
    typed = (
        b"\xef\xbb\xbfthe actor\r\n" + b"".join(line + b"\r\nthe actor\r\n" for line in bad) + b" \t\r\nnever asked\n"
    )
    ended = write_on(before=_stdin(typed))
    said = [line for line in ended.err.splitlines() if line.startswith("Error: ")]
    assert len(said) == len(bad)
    assert all(line.startswith(why) for line, why in zip(said, bad.values(), strict=True)), said
    answers = [part for part in ended.out.split(PROMPT) if part]
    assert answers == [ANSWER + good] * (len(bad) + 1)


def test_odd_stop_strings_match_literally(write_on):
    (whole,) = json.loads(write_on("--max-new-tokens", 40, "--json", "the actor").out)
    text = whole["text"]
    assert len(text) > 20
    for stop in (text[7:9], text):
        (answer,) = json.loads(write_on("--max-new-tokens", 40, "--json", "--stop", stop, "the actor").out)
        assert answer["text"] == text[: text.index(stop)]
        assert answer["finished"]
        shown = write_on("--max-new-tokens", 40, "--stop", stop, "the actor").out
        assert shown == f"the actor{answer['text']}\n"
    odd = [it for it in (".*", "\\", "the actor", END, "\u202e", "\U0001f600", "x" * 5000) if it not in text]
    stops = sum((("--stop", it) for it in odd), ())
    assert json.loads(write_on("--max-new-tokens", 40, "--json", *stops, "the actor").out) == [whole]


@pytest.mark.parametrize("stop", ["", "\udcff"])
def test_invalid_stop_string_is_rejected(write_on, stop):
    ended = write_on("--stop", stop, "x", status=2)
    assert ended.line.startswith("Error: Invalid value for '--stop': it is ")
    assert ended.out == ""
