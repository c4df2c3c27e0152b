"""The command line, in this process or, where necessary, in a separate one."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from lora_tuner import Library
from lora_tuner.adapters.adapter import CONFIG_FILE, MANIFEST_FILE
from lora_tuner.cli.app import app
from lora_tuner.cli.help import help_parts
from lora_tuner.config import SamplingParams, TrainConfig

from .. import adapter_files, tiny_models

ROOT = Path(__file__).parents[2]


def run(*arguments, stdin=None, exit_code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == exit_code, result.output
    return result


@pytest.fixture
def quick(gpt2, reviews_csv):
    """Options for a run of about a second."""
    return [
        *("--base", gpt2, "--dataset", reviews_csv, "--max-steps", 3, "--max-length", 64, "--eval-rows", 5),
        *("--device", "cpu", "--learning-rate", 0.01),
    ]


GREEDY = ["--greedy", "--max-new-tokens", "8", "--repetition-penalty", "1"]


def test_train_generate_list_show_merge(quick, tmp_path):
    trained = run("train", *quick, "--rank", 4)
    assert trained.stdout.splitlines()[0].startswith("adapters/reviews  ")
    assert "held-out loss" in trained.stdout
    assert "training 3/3  loss " in trained.stderr
    text = run("generate", "--adapter", "adapters/reviews", *GREEDY, "the actor").stdout
    assert text.startswith("the actor")
    assert run("generate", "--adapter", "reviews", *GREEDY, "the actor").stdout == text
    listed = run("adapters", "list").stdout
    assert listed.splitlines()[0].split() == [
        "adapter",
        "base",
        "rank",
        "data",
        "size",
        "gain",
        "created",
    ]
    assert listed.splitlines()[1].startswith("reviews  ")
    assert json.loads(run("adapters", "list", "--json").stdout)[0]["rank"] == 4
    shown = run("adapters", "show", "reviews").stdout
    assert trained.stdout.splitlines()[1] in " ".join(shown.split()).replace(" (gain", "  (gain")
    assert "fingerprint" in shown
    assert json.loads(run("adapters", "show", "reviews", "--json").stdout)["targets"] == [
        "c_attn",
        "c_fc",
        "c_proj",
    ]
    assert run("merge", "reviews", "--out", "merged/reviews").stdout.startswith(
        "merged/reviews\nverified against "
    )
    assert (tmp_path / "merged" / "reviews" / "model.safetensors").is_file()


def test_generate_prompt_sources(adapter, tmp_path):
    (tmp_path / "prompts.txt").write_text("the actor\n\nthis film\n")
    both = run("generate", "--adapter", "reviews", *GREEDY, "--file", "prompts.txt").stdout
    first, second = (
        run("generate", "--adapter", "reviews", *GREEDY, prompt).stdout for prompt in ("the actor", "this film")
    )
    assert both == f"--- prompt 1 of 2\n{first}\n--- prompt 2 of 2\n{second}\n"
    piped = run("generate", "--adapter", "reviews", *GREEDY, "-", stdin="the actor\nthis film\n").stdout
    assert piped == both
    run("generate", "--file", "prompts.txt", "too", exit_code=1)
    (tmp_path / "empty.txt").write_text("\n")
    assert "has no prompts" in run("generate", "--file", "empty.txt", exit_code=1).stderr


def test_interactive_prompt_switches_adapters(adapter, gpt2):
    answer = run("generate", "--adapter", "reviews", *GREEDY, "the actor").stdout
    plain = run("generate", "--base", gpt2, *GREEDY, "the actor").stdout
    assert answer != plain
    typed = "the actor\n/base\nthe actor\n/adapter nothing\n/what\n/adapter reviews\nthe actor\n\nnever asked\n"
    result = run("generate", "--adapter", "reviews", *GREEDY, stdin=typed)
    asked = "Enter a prompt for text generation: "
    said = [part for part in result.stdout.split(asked) if part]
    assert said == [f"Generated text: {text}" for text in (answer, plain, answer)]
    assert result.stdout.count(asked) == 8
    assert "Using the base without an adapter." in result.stderr
    assert "Using adapter reviews." in result.stderr
    assert "Error: There is no adapter 'nothing'" in result.stderr
    assert "Error: Unknown command /what. Commands: /help, /adapters, /adapter NAME, /base, " in result.stderr


def test_generate_json(adapter):
    answers = json.loads(run("generate", "--adapter", "reviews", "--n", 3, "--seed", 5, "--json", "the").stdout)
    assert [answer["prompt"] for answer in answers] == ["the"] * 3
    assert [answer["seed"] for answer in answers] == [5, 6, 7]
    assert [answer["finish_reason"] for answer in answers] == ["length"] * 3
    text = answers[0]["text"]
    stop = ("--seed", 5, "--stop", text[2])
    (ended,) = json.loads(run("generate", "--adapter", "reviews", *stop, "--json", "the").stdout)
    assert (ended["text"], ended["finish_reason"]) == (text.partition(text[2])[0], "stop")


def test_plan_and_preview_train_nothing(quick):
    assert "seconds per step" in run("train", *quick, "--plan").stdout
    assert json.loads(run("train", *quick, "--plan", "--json").stdout)["steps"] == 3
    shown = run("train", *quick, "--preview", 2).stdout
    assert shown.count("trained on (others in brackets)") == 2
    assert len(json.loads(run("train", *quick, "--preview", 2, "--json").stdout)["rows"]) == 2
    assert Library().names() == []


def test_train_options_override_config_file(quick, tmp_path, gpt2, reviews_csv):
    (tmp_path / "run.yaml").write_text(
        f"base: {gpt2}\ndataset: {reviews_csv}\nrank: 2\nmax_length: 64\nepochs: 2\n"
    )
    facts = json.loads(run("train", "--config", "run.yaml", "--rank", 3, "--max-steps", 1, "--json").stdout)
    assert (facts["rank"], facts["run"]["steps"]) == (3, 1)
    assert (facts["picture"], Path(facts["picture"]).is_file()) == ("adapters/reviews/loss.png", True)
    (tmp_path / "bad.yaml").write_text("rnak: 8\nrank: 0\n")
    error = run("train", "--config", "bad.yaml", exit_code=1).stderr
    assert "rnak: unknown setting" in error
    assert "rank: input should be greater than or equal to 1 (got 0)" in error


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["train", "--rank", "0"], 1, "Error: rank: input should be greater than or equal to 1 (got 0)"),
        (["train", "--rank", "eight"], 2, "Invalid value for '--rank'"),
        (["train", "--ranks", "8"], 2, "No such option"),
        (
            ["evaluate", "--adapter", "x"],
            2,
            "No such option: --adapter. Give adapters without it: root evaluate ADAPTERS.",
        ),
        (
            ["generate", "This", "film"],
            2,
            "Error: Unexpected argument film: put a prompt of several words in quotes. See root generate --help.",
        ),
        (
            ["train", "reviews.csv"],
            2,
            "Error: Unexpected argument reviews.csv: give data with --dataset. See root train --help.",
        ),
        (
            ["train", "--epochs", "1", "--minutes", "1"],
            1,
            "Error: epochs and minutes contradict each other: give one of them",
        ),
        (
            ["train", "--resume", "imdb", "--rank", "8"],
            1,
            "Error: --resume reuses the run's saved settings",
        ),
        (["train", "--resume", "imdb"], 1, "Error: There is no unfinished run runs/imdb"),
        (["train", "--plan", "--preview", "1"], 1, "Error: --plan and --preview exclude each other"),
        (
            ["train", "--name", "../up"],
            1,
            "Error: '../up' is not a valid adapter name: use a letter, then up to 63 letters, digits, '-' or '_'; ",
        ),
        (["train", "--dataset", "nothing.csv"], 1, "Error: "),
        (
            ["generate", "--adapter", "nothing", "x"],
            1,
            "Error: There is no adapter 'nothing', neither in adapters (none yet)",
        ),
        (["generate", "--base", "distilgpt2", "x"], 1, "Error: distilbert/distilgpt2 is not cached"),
        (
            ["generate", "--dtype", "fp16", "x"],
            2,
            "Error: Invalid value for '--dtype': 'fp16' is not one of 'auto', ",
        ),
        (["train", "--preview", "0"], 2, "Invalid value for '--preview'"),
        (["train", "--config", "nothing.yaml"], 1, "Error: There is no file nothing.yaml."),
        (["generate", "--file", "nothing.txt"], 1, "Error: There is no file nothing.txt."),
        (
            ["generate", "--greedy", "--temperature", "0.5", "x"],
            1,
            "Error: greedy does not sample: leave temperature, top_p",
        ),
        (["generate", "--force", "x"], 1, "Error: --force needs an adapter"),
        (["generate", "--json"], 1, "Error: --json needs prompts"),
        (
            ["adapters", "show", "nothing"],
            1,
            "Error: There is no adapter 'nothing', neither in adapters (none yet) nor as a path.",
        ),
        (
            ["merge", "nothing", "--out", "x"],
            1,
            "Error: There is no adapter 'nothing', neither in adapters (none yet) nor as a path.",
        ),
        (["merge", "nothing"], 2, "Missing option '--out'"),
        (
            ["merge", "a", "--out", "x", "--eval-dataset", "b.csv", "--group-by", "c"],
            2,
            "No such option: --group-by",
        ),
        (["nonsense"], 2, "No such command 'nonsense'"),
    ],
)
def test_bad_input_error_and_status(arguments, exit_code, message):
    result = run(*arguments, exit_code=exit_code)
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert result.stdout == ""


def test_settings_become_options():
    commands = typer.main.get_command(app).commands
    for kind, name in ((TrainConfig, "train"), (SamplingParams, "generate")):
        options = {option.name: option for option in commands[name].params}
        settings = {field: facts for field, facts in kind.model_fields.items() if facts.json_schema_extra}
        for field, facts in settings.items():
            assert options[field].help == facts.description
            assert options[field].default is None  # else it would override a config file
            if facts.default not in (None, [], True, False):
                assert options[field].show_default == str(facts.default)


GROUPS = {
    "Train and write": "demo doctor data train methods generate classify",
    "Compare and measure": "compare evaluate report",
    "Combine and convert": "merge blend compress export",
    "Library": "push pull adapters runs",
    "Serve": "serve",
}


def walk_commands(group, path=()):
    for name, command in group.commands.items():
        yield [*path, name], command
        if hasattr(command, "commands"):
            yield from walk_commands(command, [*path, name])


@pytest.mark.parametrize("width", ["80", "120"])
def test_root_help_groups_all_commands(monkeypatch, width):
    monkeypatch.setenv("COLUMNS", width)
    panels = dict(re.findall(r"^(\S.*)\n((?:  .*\n)+)", run("--help").stdout, flags=re.MULTILINE))
    for title, names in GROUPS.items():
        assert re.findall(r"^  ([a-z]+)", panels[title], flags=re.MULTILINE) == names.split()
    assert list(panels) == [*GROUPS, "Options"]


@pytest.mark.parametrize("width", [80, 120])
def test_every_help_fits_width(monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    root = typer.main.get_command(app)
    for path, command in [([], root), *walk_commands(root)]:
        shown = run(*path, "--help").stdout
        assert max(map(len, shown.splitlines())) <= width, path
        assert not re.search("INTEGER|PATH|TEXT|<int|<str|<float|<path>.*-dir|list\\[|\\(None\\)", shown), path
        assert not re.search("\\[default: \\(|Default:", shown), path
        choices = [param for param in command.params if param.type_descriptor.is_choice]
        for param in choices:
            names = "|".join(param.type_descriptor.choices)
            assert re.search(rf"^  {param.opts[0]} {re.escape(names)}$", shown, re.MULTILINE) or (
                f"  {param.opts[0]} {names}  " in shown
            ), (path, param.name)


def test_every_example_parses():
    root = typer.main.get_command(app)
    for path, command in walk_commands(root):
        if hasattr(command, "commands"):
            continue
        _, examples, documents = help_parts(command)
        assert examples or path == ["methods"]
        for example in examples:
            name, *given = shlex.split(example.removeprefix("python cli.py "))[len(path) - 1 :]
            assert name == path[-1]
            command.make_context(name, given)
        files = documents.removeprefix("Docs: ").split(", ")
        assert all((ROOT / file).is_file() for file in files)


def test_train_help_begins_with_basics(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = run("train", "--help").stdout
    example, most_used, others = re.split("\n\n(?:Example|Most used|Options)\n", shown)[1:]
    assert example.startswith("  python cli.py train --dataset ")
    options = re.findall("^  (--[a-z]+)", most_used, re.MULTILINE)
    assert options == ["--dataset", "--name", "--minutes", "--base", "--preview"]
    assert others.splitlines()[-1].startswith("Docs: docs/tour.md")


@pytest.mark.parametrize("options", [(), ("--rank", "2,4"), ("--from", "parent")])
def test_existing_name_is_refused_before_loading(tmp_path, options):
    names = ("noir-r2", "noir-r4") if "--rank" in options else ("noir",)
    for name in names:
        (tmp_path / "adapters" / name).mkdir(parents=True)
        (tmp_path / "adapters" / name / CONFIG_FILE).write_text("{}")
    given = ("train", "--name", "noir", "--base", "no-base", "--dataset", "no.csv", "--eval-dataset", "none.csv")
    text = error(*given, *options)
    assert text.startswith(f"Error: adapters/{names[0]} exists: choose another --name, or replace it")


def test_unfinished_run_is_refused_before_loading(tmp_path):
    (tmp_path / "runs" / "noir").mkdir(parents=True)
    (tmp_path / "runs" / "noir" / "run.yaml").write_text("name: noir\n")
    text = error("train", "--name", "noir", "--base", "no-base", "--dataset", "no.csv")
    assert text.startswith("Error: runs/noir holds an unfinished run: resume it with --resume noir")


LIGHT = """
import sys
from lora_tuner.cli.app import app
from lora_tuner.cli.help import help_parts
for line in sys.stdin:
    try:
        app(line.split())
    except SystemExit as end:
        assert not end.code, line
    assert not {"torch", "transformers", "datasets", "peft"} & set(sys.modules), line
"""


def test_light_commands_never_import_torch(adapter, tmp_path):
    shutil.copytree(adapter.path, tmp_path / "foreign")
    (tmp_path / "foreign" / MANIFEST_FILE).unlink()
    (tmp_path / "foreign").rename(tmp_path / "adapters" / "guest")
    shutil.copytree(tmp_path / "adapters" / "guest", tmp_path / "foreign")
    lines = [
        "--help",
        "train --help",
        "--version",
        "adapters list",
        "adapters list --json",
        "adapters show reviews",
    ]
    lines += ["evaluate --help", "compare --help", "adapters adopt foreign --name mine", "adapters adopt guest"]
    lines += ["adapters verify", "adapters verify reviews", "adapters rename mine yours", "adapters show yours"]
    lines += ["adapters remove yours --yes", "adapters list", "runs", "runs --json", "runs remove reviews --yes"]
    (tmp_path / "runs" / "reviews").mkdir(parents=True)
    shutil.copy(adapter.path / "run.yaml", tmp_path / "runs" / "reviews")
    done = subprocess.run(
        [sys.executable, "-c", LIGHT], input="\n".join(lines), capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert Library().names() == ["guest", "reviews"]
    assert Library().get("guest").manifest.base.fingerprint == adapter.manifest.base.fingerprint


def test_doctor_reports_environment(gpt2):
    facts = json.loads(run("doctor", "--json").stdout)
    assert facts["hub"] == "unreachable: HF_HUB_OFFLINE is set"
    assert facts["versions"]["torch"] != "not installed"
    assert any("The Hub is unreachable" in line for line in facts["advice"])
    for name in ("cpu", "instructions", "device", "memory", "cache", "adapters", "base", "extras"):
        assert facts[name]
    assert re.fullmatch(r"[\d.]+ .B free of [\d.]+ .B", facts["memory"])
    assert facts["adapters"].endswith("B free")
    assert re.match("smollm2-135m( from the package index)?, as distilgpt2 is not cached", facts["base"])
    shown = run("doctor").stdout
    assert "threads" in shown
    assert shown.splitlines()[-1].startswith("next ")


def test_doctor_names_next_command(tmp_path, monkeypatch):
    from lora_tuner.cli.doctor import _next_command

    def next_command(datasets=()):
        return _next_command(TrainConfig(), [*datasets], "offline")

    assert next_command() == "python cli.py train --minutes 5 --dataset FILE"
    assert next_command(datasets=["imdb"]).startswith("python cli.py train --minutes 5 (or")
    adapter_files.write(tmp_path / "adapters" / "poems")
    assert next_command() == "python cli.py generate --adapter poems"
    (tmp_path / "runs" / "noir").mkdir(parents=True)
    (tmp_path / "runs" / "noir" / "run.yaml").write_text("name: noir\nmax_steps: 3\n")
    assert next_command() == "python cli.py train --resume noir"


# Several adapters


def error(*arguments, **options):
    """The error line of a command that fails."""
    result = run(*arguments, exit_code=1, **options)
    assert result.stdout == ""
    return result.stderr.splitlines()[-1]


def other_base(tmp_path):
    return tiny_models.save_model(tmp_path / "stranger", "gpt2", seed=7)


# Origin and lineage


def listed():
    """Rows of `adapters list`: name -> column -> value."""
    head, *lines = run("adapters", "list").stdout.splitlines()
    starts = [match.start() for match in re.finditer(r"\S+", head)]
    ends = [*starts[1:], None]
    rows = [[line[start:end].strip() for start, end in zip(starts, ends, strict=True)] for line in lines]
    return {row[0]: dict(zip(head.split(), row, strict=True)) for row in rows}


def test_train_from_errors(two, tmp_path, gpt2):
    assert error("train", "--force") == "Error: force needs an adapter to continue from: give --from"
    assert error("train", "--resume", "noir", "--from", "verse").startswith(
        "Error: --resume reuses the run's saved settings"
    )
    assert error("train", "--eval-split", "test") == ("Error: eval_split needs eval_dataset")
    given = ["--from", "noir", "--dataset", "verse.json", "--name", "child"]
    assert error("train", *given, "--rank", 8, "--alpha", 9) == (
        "Error: rank is 8, but noir has 4; alpha is 9, but noir has 8: with --from these come from the parent, so leave "
        "them out."
    )
    stranger = other_base(tmp_path)
    assert error("train", *given, "--base", stranger).startswith(
        f"Error: noir was trained on {gpt2} (fingerprint "
    )
    assert error("train", "--from", "nobody", *given[2:]) == (
        "Error: There is no adapter 'nobody', neither in adapters (noir, verse) nor as a path."
    )
    assert len(json.loads(run("train", *given, "--preview", 2, "--json").stdout)["rows"]) == 2
    assert Library().names() == ["noir", "verse"]


# The shell


def completed(line, shell="bash"):
    """Completions that the shell offers for the last word of a line."""
    words = line.split(" ")
    env = os.environ | {
        "_LORA_TUNER_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
    }
    env |= {"_TYPER_COMPLETE_ARGS": line}
    done = subprocess.run(
        [Path(sys.executable).with_name("lora-tuner")], env=env, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        pytest.param("lora-tuner tr", ["train"], marks=pytest.mark.slow),
        ("lora-tuner adapters re", ["rename", "remove"]),
        pytest.param("lora-tuner train --meth", ["--method"], marks=pytest.mark.slow),
        ("lora-tuner train --method l", ["lora", "lora+"]),
        ("lora-tuner generate --adapter no", ["noir", "notes"]),
        ("lora-tuner compare --adapter noir --adapter not", ["notes"]),
        ("lora-tuner train --from ve", ["verse"]),
        *(
            pytest.param(f"lora-tuner {command} n", ["noir", "notes"], marks=pytest.mark.slow)
            for command in ("evaluate", "compress", "blend", "adapters show")
        ),
        ("lora-tuner adapters show --adapters-dir elsewhere n", []),
    ],
)
def test_shell_completion(tmp_path, line, offered):
    for name in ("noir", "notes", "verse"):
        (tmp_path / "adapters" / name).mkdir(parents=True)
        (tmp_path / "adapters" / name / CONFIG_FILE).write_text("{}")
    assert completed(line) == offered


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion_scripts(shell):
    env = os.environ | {"_LORA_TUNER_COMPLETE": f"source_{shell}"}
    done = subprocess.run(
        [Path(sys.executable).with_name("lora-tuner")], env=env, capture_output=True, text=True, check=False
    )
    assert "lora-tuner" in done.stdout
    assert done.returncode == 0
