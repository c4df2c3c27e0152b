"""The command line as people type it: in this process where that is enough, in one of its own where it is not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from lora_tuner import Library, train
from lora_tuner.cli import app
from lora_tuner.config import Sampling, TrainConfig

ROOT = Path(__file__).parents[1]


def run(*arguments, stdin=None, exit_code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == exit_code, result.output
    return result


def process(*arguments, **options):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, timeout=120, **options
    )


@pytest.fixture
def quick(gpt2, reviews_csv):
    """Options for a run of a second."""
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
        *("name", "base", "rank", "targets", "data", "size", "gain", "age", "parent")
    ]
    assert listed.splitlines()[1].startswith("reviews  ")
    assert json.loads(run("adapters", "list", "--json").stdout)[0]["rank"] == 4
    shown = run("adapters", "show", "reviews").stdout
    assert trained.stdout.splitlines()[1] in " ".join(shown.split()).replace(" (gain", "  (gain")
    assert "fingerprint" in shown
    assert json.loads(run("adapters", "show", "reviews", "--json").stdout)["targets"] == ["c_attn", "c_fc", "c_proj"]
    assert run("merge", "reviews", "--out", "merged/reviews").stdout == "merged/reviews\n"
    assert (tmp_path / "merged" / "reviews" / "model.safetensors").is_file()


def test_verify_rename_and_remove(adapter, tmp_path):
    assert run("adapters", "verify").stdout == "reviews: whole\n"
    assert json.loads(run("adapters", "verify", "reviews", "--json").stdout) == [{"name": "reviews", "problems": []}]
    assert run("adapters", "rename", "reviews", "old").stdout == "adapters/old\n"
    (tmp_path / "adapters" / "old" / "run.yaml").unlink()
    assert run("adapters", "verify", "old", exit_code=1).stdout == "old: run.yaml is missing\n"
    assert "There is no adapter 'reviews'" in run("adapters", "verify", "reviews", exit_code=1).stdout
    run("adapters", "remove", "old", stdin="n\n", exit_code=1)
    assert Library().names() == ["old"]
    run("adapters", "remove", "old", "--yes")
    assert Library().names() == []


def test_every_way_to_give_a_prompt(adapter, tmp_path):
    (tmp_path / "prompts.txt").write_text("the actor\n\nthis film\n")
    both = run("generate", "--adapter", "reviews", *GREEDY, "--file", "prompts.txt").stdout.splitlines()
    assert [line[:9] for line in both] == ["the actor", "this film"]
    piped = run("generate", "--adapter", "reviews", *GREEDY, "-", stdin="the actor\nthis film\n").stdout.splitlines()
    assert piped == both
    alone = run("generate", "--adapter", "reviews", *GREEDY, "this film").stdout.splitlines()
    assert alone == both[1:]
    run("generate", "--file", "prompts.txt", "too", exit_code=1)
    (tmp_path / "empty.txt").write_text("\n")
    assert "holds no prompt" in run("generate", "--file", "empty.txt", exit_code=1).stderr


def test_the_asking_mode_answers_swaps_and_ends(adapter, gpt2):
    answer = run("generate", "--adapter", "reviews", *GREEDY, "the actor").stdout
    plain = run("generate", "--base", gpt2, *GREEDY, "the actor").stdout
    assert answer != plain
    typed = "the actor\n/base\nthe actor\n/adapter nothing\n/what\n/adapter reviews\nthe actor\n\nnever asked\n"
    result = run("generate", "--adapter", "reviews", *GREEDY, stdin=typed)
    asked = "Enter a prompt for text generation: "
    said = [part for part in result.stdout.split(asked) if part]
    assert said == [f"Generated text: {text}" for text in (answer, plain, answer)]
    assert result.stdout.count(asked) == 8
    assert "The plain base answers now." in result.stderr
    assert "reviews answers now." in result.stderr
    assert "Error: There is no adapter 'nothing'" in result.stderr
    assert "Error: There is no /what: /adapter NAME (reviews), /base, or an empty line to end." in result.stderr


def test_answers_as_json(adapter):
    answers = json.loads(run("generate", "--adapter", "reviews", "--answers", 3, "--seed", 5, "--json", "the").stdout)
    assert [answer["prompt"] for answer in answers] == ["the"] * 3
    assert [answer["seed"] for answer in answers] == [5, 6, 7]


def test_plan_and_preview_show_and_train_nothing(quick):
    assert "seconds a step" in run("train", *quick, "--plan").stdout
    assert json.loads(run("train", *quick, "--plan", "--json").stdout)["steps"] == 3
    shown = run("train", *quick, "--preview", 2).stdout
    assert shown.count("of them learnt") == 2
    assert len(json.loads(run("train", *quick, "--preview", 2, "--json").stdout)) == 2
    assert Library().names() == []


def test_a_file_of_settings_with_options_over_it(quick, tmp_path, gpt2, reviews_csv):
    (tmp_path / "run.yaml").write_text(f"base: {gpt2}\ndataset: {reviews_csv}\nrank: 2\nmax_length: 64\nepochs: 2\n")
    facts = json.loads(run("train", "--config", "run.yaml", "--rank", 3, "--max-steps", 1, "--json").stdout)
    assert (facts["rank"], facts["run"]["steps"]) == (3, 1)
    (tmp_path / "bad.yaml").write_text("rnak: 8\nrank: 0\n")
    error = run("train", "--config", "bad.yaml", exit_code=1).stderr
    assert "rnak: there is no such setting" in error
    assert "rank: input should be greater than or equal to 1 (got 0)" in error


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["train", "--rank", "0"], 1, "Error: rank: input should be greater than or equal to 1 (got 0)"),
        (["train", "--rank", "eight"], 2, "Invalid value for '--rank'"),
        (["train", "--ranks", "8"], 2, "No such option"),
        (
            ["train", "--epochs", "1", "--minutes", "1"],
            1,
            "Error: epochs and minutes contradict each other: give one of them",
        ),
        (
            ["train", "--resume", "imdb", "--rank", "8"],
            1,
            "Error: --resume takes its settings from the run it goes on with",
        ),
        (["train", "--resume", "imdb"], 1, "Error: There is no unfinished run runs/imdb"),
        (["train", "--plan", "--preview", "1"], 1, "Error: --plan and --preview are two questions"),
        (["train", "--name", "../up"], 1, "Error: '../up' is no adapter name: a letter, then up to 63 letters"),
        (["train", "--dataset", "nothing.csv"], 1, "Error: "),
        (
            ["generate", "--adapter", "nothing", "x"],
            1,
            "Error: There is no adapter 'nothing', neither in adapters (none yet)",
        ),
        (["generate", "--base", "distilgpt2", "x"], 1, "Error: distilbert/distilgpt2 is not cached"),
        (["generate", "--dtype", "fp16", "x"], 2, "Invalid value for '--dtype'"),
        (["train", "--preview", "0"], 2, "Invalid value for '--preview'"),
        (["train", "--config", "nothing.yaml"], 1, "Error: There is no file nothing.yaml."),
        (["generate", "--file", "nothing.txt"], 1, "Error: There is no file nothing.txt."),
        (
            ["generate", "--greedy", "--temperature", "0.5", "x"],
            1,
            "Error: greedy draws nothing: leave temperature, top_p",
        ),
        (["generate", "--force", "x"], 1, "Error: --force is for an adapter on another base"),
        (["generate", "--json"], 1, "Error: --json needs its prompts at once"),
        (["adapters", "show", "nothing"], 1, "Error: There is no adapter 'nothing'"),
        (["merge", "nothing", "--out", "x"], 1, "Error: There is no adapter 'nothing'"),
        (["merge", "nothing"], 2, "Missing option '--out'"),
        (["nonsense"], 2, "No such command 'nonsense'"),
    ],
)
def test_bad_input_gets_a_line_and_a_status(arguments, exit_code, message):
    result = run(*arguments, exit_code=exit_code)
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert result.stdout == ""


def test_a_broken_adapter_does_not_hide_the_others(adapter):
    (adapter.path.parent / "broken").mkdir()
    result = run("adapters", "list")
    assert "reviews" in result.stdout
    assert "broken is broken: adapters/broken has no adapter_config.json" in result.stderr


def test_each_setting_is_an_option_with_its_help():
    commands = typer.main.get_command(app).commands
    for kind, name in ((TrainConfig, "train"), (Sampling, "generate")):
        options = {option.name: option for option in commands[name].params}
        for field, facts in kind.model_fields.items():
            assert options[field].help == facts.description
            assert options[field].default is None  # else a file of settings would be overruled
            if facts.default not in (None, [], True, False):
                assert options[field].show_default == str(facts.default)


def test_ctrl_c_saves_and_exits_130(quick, tmp_path):
    """A real process and a real signal."""
    arguments = [str(a) for a in quick if a != 3]
    arguments.remove("--max-steps")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "cli.py")]
    with subprocess.Popen(
        [*command, "train", *arguments, "--max-steps", "100000"],
        cwd=tmp_path,
        env=env,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        for line in running.stderr:
            if line.startswith("training "):
                running.send_signal(2)
                break
        rest = running.stderr.read()
    assert running.returncode == 130
    assert "saved. Go on with: python cli.py train --resume reviews" in rest
    assert "Traceback" not in rest
    assert list((tmp_path / "runs" / "reviews").glob("checkpoint-*/whole.json"))


def test_help_and_list_do_not_load_torch(adapter, tmp_path):
    calls = [["--help"], ["train", "--help"], ["adapters", "list"], ["adapters", "show", "reviews"], ["--version"]]
    for arguments in calls:
        code = f"from lora_tuner.cli import app\ntry: app({arguments})\nexcept SystemExit as end: assert not end.code"
        done = subprocess.run(
            [sys.executable, "-c", f"import sys\n{code}\nassert not {{'torch', 'transformers', 'datasets'}} & set(sys.modules)"],
            capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.stderr.strip() == "", (arguments, done.stderr)


def test_the_doctor_says_what_is_there_and_what_to_do(gpt2):
    facts = json.loads(run("doctor", "--json").stdout)
    assert facts["hub"] == "out of reach: HF_HUB_OFFLINE is set"
    assert facts["versions"]["torch"] != "not installed"
    assert any("The Hub is out of reach" in line for line in facts["advice"])
    assert "threads" in run("doctor").stdout


def test_the_adapters_folder_can_be_elsewhere(settings, tmp_path):
    train(settings(adapters_dir=tmp_path / "shelf", name="a"))
    assert run("adapters", "list", "--adapters-dir", "shelf").stdout.splitlines()[1].startswith("a ")
    assert run("generate", "--adapters-dir", "shelf", "--adapter", "a", *GREEDY, "the").stdout.startswith("the")
    assert Library().names() == []
