"""Invalid and odd prompts: on the command line, in files, and in interactive mode."""

import json
import sys

import pytest

from lora_tuner.cli.interactive import ANSWER
from lora_tuner.cli.line_editor import PROMPT
from lora_tuner.data import tokenization
from lora_tuner.models.resolve import find_base
from lora_tuner.models.tokenizer import load_tokenizer

from .. import tiny_models
from ..parameters import sampled
from .process import unchanged

GREEDY = ("--greedy", "--repetition-penalty", "1")
TOO_LONG = "the actor never works. " * 60
END = tiny_models.END


@pytest.fixture
def generate(run, gpt2):
    """Run `generate` with the plain base, greedily, by default for 8 tokens."""

    def call(*arguments, base=gpt2, status=0, **options):
        limit = () if "--max-new-tokens" in arguments else ("--max-new-tokens", 8)
        result = run("generate", "--base", base, *GREEDY, *limit, *arguments, **options)
        assert result.status == status, result.err
        return result

    return call


def count_tokens(base, prompt):
    """Number of tokens of a prompt; an empty one gets a start token."""
    (row,) = tokenization.encode_texts(load_tokenizer(find_base(str(base))), [prompt], add_eos=False)
    return max(len(row), 1)


ODD = [
    "",
    " ",
    "   \n\t ",
    END,
    f"the {END} actor",
    "\U0001f600" * 5,
    "\u202e\u200b",
    "a\x07b\x1b[31m",
    "e\u0301" * 9,
]


@pytest.mark.parametrize("kind", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_output_ends_at_context_limit(generate, request, kind):
    """Also with a prompt that spells a special token, which counts as ordinary text."""
    base = request.getfixturevalue(kind)
    for prompt in ODD[::2] if kind == "gpt2" else ODD:
        result = generate("--max-new-tokens", 10_000, "--json", "--", prompt, base=base)
        (answer,) = json.loads(result.out)
        assert answer["prompt"] == prompt
        if not answer["finished"]:
            assert answer["tokens"] == tiny_models.CONTEXT - count_tokens(base, prompt)
        assert answer["tokens"] <= tiny_models.CONTEXT - count_tokens(base, prompt)
    assert count_tokens(base, END) > 5


def test_odd_prompts_are_shown_unchanged(generate):
    for prompt in ODD[4::2]:
        assert generate("--", prompt).out.startswith(prompt)


@pytest.mark.parametrize("excess", sampled([0, 1, 1000], 3))
def test_prompt_filling_context_is_rejected(generate, gpt2, excess):
    fits = "a" * (tiny_models.CONTEXT - 1)
    assert count_tokens(gpt2, fits) == tiny_models.CONTEXT - 1
    assert json.loads(generate("--json", fits).out)[0]["tokens"] <= 1
    if excess:
        result = generate("--json", fits + "a" * excess, status=1)
        assert result.out == ""
        assert f"The prompt has {tiny_models.CONTEXT - 1 + excess:,} tokens, but " in result.line
        assert result.line.endswith(f"has a context of {tiny_models.CONTEXT}: shorten it.")


def test_non_utf8_prompt_is_rejected(generate, run, tmp_path):
    with unchanged(tmp_path / "."):
        for command in (("generate", *GREEDY), ("compare", "--adapter", "x")):
            result = run(*command, "caf\udce9", cache=tmp_path.parent / f"{tmp_path.name}-cache")
            assert (result.status, result.out) == (2, "")
            assert result.line.startswith("Error: Invalid value for 'prompt': it is not valid UTF-8 text.")


MANY = [f"{number}: the actor" for number in range(10_000)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (TOO_LONG.encode(), "Prompt 7,000 of 10,000: The prompt has "),
        (b"caf\xe9", "is not valid UTF-8 in line 7,000: save it as UTF-8."),
        (b"a\0b", "has null bytes in line 7,000, as in UTF-16: save it as UTF-8."),
        pytest.param(b"x" * 1_000_000, "Prompt 7,000 of 10,000: The prompt has ", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("command", ["generate", pytest.param("compare", marks=pytest.mark.slow)])
def test_bad_prompt_stops_before_any_output(run, gpt2, adapter, tmp_path, line, message, command):
    lines = [text.encode() for text in MANY]
    lines[6999] = line
    (tmp_path / "prompts.txt").write_bytes(b"\n".join(lines))
    options = ("--adapter", "reviews") if command == "compare" else ("--base", gpt2, "--json")
    result = run(command, *options, "--file", "prompts.txt")
    assert (result.status, result.out) == (1, "")
    assert message in result.line


@pytest.mark.parametrize(
    "content",
    sampled(
        [
            b"the actor\nthis film\n",
            b"the actor\r\nthis film",
            b"\xef\xbb\xbfthe actor\r\n\r\n  \r\nthis film\r\n",
            b"the actor\rthis film\r",
        ],
        2,
    ),
)
def test_prompt_file_accepts_all_line_endings(generate, tmp_path, content):
    (tmp_path / "prompts.txt").write_bytes(content)
    answers = json.loads(generate("--file", "prompts.txt", "--json").out)
    assert [answer["prompt"] for answer in answers] == ["the actor", "this film"]
    piped = generate("-", "--json", before=_StandardInput(content))
    assert json.loads(piped.out) == answers


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "stdin has no prompts: write one per line."),
        (b"\xef\xbb\xbf\n \r\n", "stdin has no prompts"),
        (b"the actor\ncaf\xe9\n", "stdin is not valid UTF-8 in line 2: save it as UTF-8."),
        ("the actor\n".encode("utf-16-le"), "stdin has null bytes in line 1, as in UTF-16"),
        (f"the actor\n\n{TOO_LONG}\n".encode(), "Prompt 2 of 2: The prompt has "),
    ],
)
def test_bad_standard_input_is_rejected(generate, content, message):
    result = generate("-", before=_StandardInput(content), status=1)
    assert result.out == ""
    assert message in result.line


@pytest.mark.parametrize("options", [("--greedy",), ("--n", "2")])
def test_command_tokenizes_each_prompt_once(run, gpt2, tmp_path, options):
    counts = tmp_path / "counts"
    result = run(
        *("generate", "--base", gpt2, "--max-new-tokens", 2, *options, "-"), before=_CountTokenizer(counts)
    )
    assert result.status == 0, result.err
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
        _StandardInput(b"the actor\nthis film\n")()


class _StandardInput:
    """Replace standard input by bytes; None closes it."""

    def __init__(self, content):
        self.content = content

    def __call__(self):
        import io

        if self.content is None:
            sys.stdin = None
        else:
            sys.stdin = io.TextIOWrapper(io.BytesIO(self.content), encoding="utf-8")


def test_closed_standard_input_is_empty(generate):
    assert "stdin has no prompts" in generate("-", before=_StandardInput(None), status=1).line
    assert generate(before=_StandardInput(None)).out == PROMPT + "\n" * 0


def test_interactive_mode_survives_bad_lines(generate):
    good = generate("the actor").out
    bad = {
        b"caf\xe9": "Error: The input is not valid UTF-8 text: type it again.",
        b"a\0b": "Error: The input is not valid UTF-8 text: type it again.",
        TOO_LONG.encode(): "Error: The prompt has ",
        b"/adapter ../x": "Error: There is no adapter '../x'",
        b"/adapter caf\xe9": "Error: The input is not valid UTF-8 text: type it again.",
        b"/nonsense": "Error: Unknown command /nonsense. ",
    }
    typed = (
        b"\xef\xbb\xbfthe actor\r\n"
        + b"".join(line + b"\r\nthe actor\r\n" for line in bad)
        + b" \t\r\nnever asked\n"
    )
    result = generate(before=_StandardInput(typed))
    errors = [line for line in result.err.splitlines() if line.startswith("Error: ")]
    assert len(errors) == len(bad)
    assert all(line.startswith(message) for line, message in zip(errors, bad.values(), strict=True)), errors
    answers = [part for part in result.out.split(PROMPT) if part]
    assert answers == [ANSWER + good] * (len(bad) + 1)


def test_odd_stop_strings_match_literally(generate):
    (full,) = json.loads(generate("--max-new-tokens", 40, "--json", "the actor").out)
    text = full["text"]
    assert len(text) > 20
    for stop in (text[7:9], text):
        (answer,) = json.loads(generate("--max-new-tokens", 40, "--json", "--stop", stop, "the actor").out)
        assert answer["text"] == text[: text.index(stop)]
        assert answer["finished"]
        shown = generate("--max-new-tokens", 40, "--stop", stop, "the actor").out
        assert shown == f"the actor{answer['text']}\n"
    odd = [
        string
        for string in (".*", "\\", "the actor", END, "\u202e", "\U0001f600", "x" * 5000)
        if string not in text
    ]
    stops = sum((("--stop", string) for string in odd), ())
    assert json.loads(generate("--max-new-tokens", 40, "--json", *stops, "the actor").out) == [full]


@pytest.mark.parametrize("stop", ["", "\udcff"])
def test_invalid_stop_string_is_rejected(generate, stop):
    result = generate("--stop", stop, "x", status=2)
    assert result.line.startswith("Error: Invalid value for '--stop': it is ")
    assert result.out == ""
