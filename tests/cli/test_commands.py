"""The command line, in this process or, where necessary, in a separate one."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from lora_tuner import Library, ModelOptions, atomic_io, evaluate, evaluation, train
from lora_tuner.adapters import plots
from lora_tuner.adapters.adapter import CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE
from lora_tuner.cli.app import app
from lora_tuner.config import SamplingParams, TrainConfig
from lora_tuner.models.resolve import find_base

from .. import adapter_files, tiny_models
from ..test_evaluation import train_in

ROOT = Path(__file__).parents[2]


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
        *("name", "base", "rank", "targets", "data", "size", "gain", "age", "parent")
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


def test_verify_rename_remove(adapter, tmp_path):
    assert run("adapters", "verify").stdout == "reviews: OK\n"
    assert json.loads(run("adapters", "verify", "reviews", "--json").stdout) == [
        {"name": "reviews", "problems": []}
    ]
    assert run("adapters", "rename", "reviews", "old").stdout == "adapters/old\n"
    (tmp_path / "adapters" / "old" / "run.yaml").unlink()
    assert run("adapters", "verify", "old", exit_code=1).stdout == "old: run.yaml is missing\n"
    assert "There is no adapter 'reviews'" in run("adapters", "verify", "reviews", exit_code=1).stdout
    run("adapters", "remove", "old", stdin="n\n", exit_code=1)
    assert Library().names() == ["old"]
    run("adapters", "remove", "old", "--yes")
    assert Library().names() == []


def test_generate_prompt_sources(adapter, tmp_path):
    (tmp_path / "prompts.txt").write_text("the actor\n\nthis film\n")
    both = run("generate", "--adapter", "reviews", *GREEDY, "--file", "prompts.txt").stdout.splitlines()
    assert [line[:9] for line in both] == ["the actor", "this film"]
    piped = run(
        "generate", "--adapter", "reviews", *GREEDY, "-", stdin="the actor\nthis film\n"
    ).stdout.splitlines()
    assert piped == both
    alone = run("generate", "--adapter", "reviews", *GREEDY, "this film").stdout.splitlines()
    assert alone == both[1:]
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
    assert (
        "Error: Unknown command /what. Commands: /adapter NAME, /base; an empty line quits. Adapters: reviews."
        in result.stderr
    )


def test_generate_json(adapter):
    answers = json.loads(run("generate", "--adapter", "reviews", "--n", 3, "--seed", 5, "--json", "the").stdout)
    assert [answer["prompt"] for answer in answers] == ["the"] * 3
    assert [answer["seed"] for answer in answers] == [5, 6, 7]


def test_plan_and_preview_train_nothing(quick):
    assert "seconds per step" in run("train", *quick, "--plan").stdout
    assert json.loads(run("train", *quick, "--plan", "--json").stdout)["steps"] == 3
    shown = run("train", *quick, "--preview", 2).stdout
    assert shown.count("trained on (others in brackets)") == 2
    assert len(json.loads(run("train", *quick, "--preview", 2, "--json").stdout)) == 2
    assert Library().names() == []


def test_train_options_override_config_file(quick, tmp_path, gpt2, reviews_csv):
    (tmp_path / "run.yaml").write_text(
        f"base: {gpt2}\ndataset: {reviews_csv}\nrank: 2\nmax_length: 64\nepochs: 2\n"
    )
    facts = json.loads(run("train", "--config", "run.yaml", "--rank", 3, "--max-steps", 1, "--json").stdout)
    assert (facts["rank"], facts["run"]["steps"]) == (3, 1)
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
        (["generate", "--dtype", "fp16", "x"], 2, "Invalid value for '--dtype'"),
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
        (["nonsense"], 2, "No such command 'nonsense'"),
    ],
)
def test_bad_input_error_and_status(arguments, exit_code, message):
    result = run(*arguments, exit_code=exit_code)
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert result.stdout == ""


def test_list_shows_broken_adapters(adapter):
    (adapter.path.parent / "broken").mkdir()
    result = run("adapters", "list")
    assert "reviews" in result.stdout
    assert "broken is broken: adapters/broken has no adapter_config.json" in result.stderr


def test_settings_become_options():
    commands = typer.main.get_command(app).commands
    for kind, name in ((TrainConfig, "train"), (SamplingParams, "generate")):
        options = {option.name: option for option in commands[name].params}
        for field, facts in kind.model_fields.items():
            assert options[field].help == facts.description
            assert options[field].default is None  # else it would override a config file
            if facts.default not in (None, [], True, False):
                assert options[field].show_default == str(facts.default)


LIGHT = """
import sys
from lora_tuner.cli.app import app
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
    lines += ["adapters remove yours --yes", "adapters list"]
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
    assert "threads" in run("doctor").stdout


def test_adapters_dir_option(settings, tmp_path):
    train(settings(adapters_dir=tmp_path / "shelf", name="a"))
    assert run("adapters", "list", "--adapters-dir", "shelf").stdout.splitlines()[1].startswith("a ")
    assert run("generate", "--adapters-dir", "shelf", "--adapter", "a", *GREEDY, "the").stdout.startswith("the")
    assert Library().names() == []


# Several adapters


@pytest.fixture(scope="module")
def trained(gpt2, tmp_path_factory):
    return train_in(tmp_path_factory.mktemp("trained"), gpt2, ["noir", "verse"])


@pytest.fixture
def two(trained, tmp_path, monkeypatch):
    """Two adapters of one base, noir and verse, with a cache for this test."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("LORA_TUNER_CACHE", str(tmp_path / "cache"))
    return [Library().get("noir"), Library().get("verse")]


@pytest.fixture
def columns(monkeypatch):
    return lambda width: monkeypatch.setenv("COLUMNS", str(width))


def error(*arguments, **options):
    """The error line of a command that fails."""
    result = run(*arguments, exit_code=1, **options)
    assert result.stdout == ""
    return result.stderr.splitlines()[-1]


def flat(text):
    return " ".join(text.split())


BOTH = ["--adapter", "noir", "--adapter", "verse", "--device", "cpu", "--max-new-tokens", "6"]
MODELS = ["(base)", "noir", "verse"]


def test_compare_in_columns(two, columns):
    answers = json.loads(run("compare", *BOTH, "--greedy", "--json", "the actor").stdout)
    assert [answer["adapter"] for answer in answers] == [None, "noir", "verse"]
    assert len({answer["text"] for answer in answers}) == 3
    for width in (36 * 3, 300):
        columns(width)
        head, *lines = run("compare", *BOTH, "--greedy", "the actor").stdout.splitlines()
        assert head.split() == MODELS
        assert max(len(line) for line in lines) <= width
        assert sum(line.count("the actor") for line in lines) == 3
    shown = flat("\n".join(lines))
    places = [shown.find(flat(f"the actor{answer['text']}")) for answer in answers]
    assert places == sorted(places)
    assert places[0] == 0


def test_compare_on_narrow_terminal(two, columns):
    answers = json.loads(run("compare", *BOTH, "--greedy", "--json", "the actor").stdout)
    expected = [
        f"--- {model}\nthe actor{answer['text']}\n\n" for model, answer in zip(MODELS, answers, strict=True)
    ]
    for width in (36 * 3 - 1, 30):
        columns(width)
        assert run("compare", *BOTH, "--greedy", "the actor").stdout == "".join(expected)


def test_compare_equals_single_generation(two, gpt2):
    drawn = ["--seed", "4", "--n", "2", "--json", "the actor"]
    answers = json.loads(run("compare", *BOTH, *drawn).stdout)
    assert [(answer["adapter"], answer["seed"]) for answer in answers] == [
        (who, seed) for who in (None, "noir", "verse") for seed in (4, 5)
    ]
    alone = [["--base", gpt2], ["--adapter", "noir"], ["--adapter", "adapters/verse"]]
    for number, who in enumerate(alone):
        one = run("generate", *who, "--max-new-tokens", "6", *drawn)
        assert json.loads(one.stdout) == answers[2 * number : 2 * number + 2]


def test_compare_several_prompts_and_samples(two, tmp_path, columns):
    (tmp_path / "prompts.txt").write_text("the actor\n\nthis film\n")
    columns(50)
    how = [*BOTH, "--seed", "1", "--n", "2"]
    shown = run("compare", *how, "--file", "prompts.txt").stdout
    heads = [line.removeprefix("--- ") for line in shown.splitlines() if line.startswith("--- ")]
    assert heads == [who for _ in range(2) for who in MODELS for _ in range(2)]
    assert shown == run("compare", *how, "-", stdin="the actor\nthis film\n").stdout
    assert shown == "".join(run("compare", *how, prompt).stdout for prompt in ("the actor", "this film"))
    columns(150)
    wide = run("compare", *how, "the actor").stdout
    assert wide.splitlines()[0].split() == MODELS
    assert wide.count("the actor") == 6
    answers = json.loads(run("compare", *how, "--file", "prompts.txt", "--json").stdout)
    assert [answer["prompt"] for answer in answers] == ["the actor"] * 6 + ["this film"] * 6


def test_compare_uses_same_seed(two):
    answers = json.loads(run("compare", *BOTH, "--n", "2", "--json", "the").stdout)
    seeds = [answer["seed"] for answer in answers]
    assert seeds == seeds[:2] * 3
    assert seeds[1] == seeds[0] + 1


def other_base(tmp_path):
    return tiny_models.save_model(tmp_path / "stranger", "gpt2", seed=7)


def test_compare_errors(two, gpt2, tmp_path):
    stranger = other_base(tmp_path)
    assert error("compare", *BOTH) == (
        "Error: There is no prompt: give one as an argument, --file, or - for stdin."
    )
    assert (
        error("compare", *BOTH, "x", "--file", "y") == "Error: A prompt and --file exclude each other: give one."
    )
    assert error("compare", *BOTH, "--adapter", "noir", "x") == (
        "Error: Two of these adapters have the name noir: list each once, or rename one."
    )
    assert error("compare", *BOTH, "--adapter", "adapters/noir", "x") == (
        "Error: Two of these adapters have the name noir: list each once, or rename one."
    )
    assert error("compare", *BOTH, "--adapter", "nobody", "x") == (
        "Error: There is no adapter 'nobody', neither in adapters (noir, verse) nor as a path."
    )
    assert error("compare", *BOTH, "--n", "2", "--greedy", "x") == (
        "Error: n above 1 needs sampling: greedy outputs are all the same"
    )
    prints = [find_base(str(folder)).fingerprint[:12] for folder in (gpt2, stranger)]
    assert error("compare", *BOTH, "--base", stranger, "x") == (
        f"Error: noir was trained on {gpt2} (fingerprint {prints[0]}, a local folder), not on {stranger} (fingerprint "
        f"{prints[1]}, a local folder). Name the right base with --base, or use --force to try it anyway."
    )
    forced = run("compare", *BOTH, "--base", stranger, "--force", "--json", "x")
    assert len(json.loads(forced.stdout)) == 3
    assert forced.stderr.count("FORCED: ") == 2
    assert "Missing option '--adapter'" in flat(run("compare", "x", exit_code=2).stderr.replace("│", " "))


# The gain matrix


def loss(cell):
    return f"{cell['loss']:.4f} ({cell['perplexity']:.2f})"


def gain(cell):
    return f"{cell['gain']:+.4f} ± {cell['standard_error']:.4f}"


def test_evaluate_output(two, gpt2, columns):
    columns(150)
    facts = json.loads(run("evaluate", "noir", "verse", "--json").stdout)
    assert facts == json.loads(json.dumps(evaluate(two, options=ModelOptions(device="cpu")).to_dict()))
    (first, second), (third, fourth) = (row["results"] for row in facts["adapters"])
    base = [
        f"{cell['base_loss']:.4f} ({evaluation.EvalResult(**_figures(cell)).perplexities[0]:.2f})"
        for cell in (first, second)
    ]
    shown = [line.rstrip() for line in run("evaluate", "noir", "verse").stdout.splitlines()]
    assert [re.split(r" {2,}", line) for line in shown] == [
        ["held-out loss in nats per token (perplexity) on each held-out set"],
        ["", "noir", "verse"],
        ["", "6 rows", "7 rows"],
        ["(base)", *base],
        ["noir", loss(first), loss(second)],
        ["verse", loss(third), loss(fourth)],
        [""],
        [f"improvement over {gpt2} (loss, ± standard error); negative: worse than the base"],
        ["", "noir", "verse"],
        ["", "6 rows", "7 rows"],
        ["noir", gain(first), gain(second)],
        ["verse", gain(third), gain(fourth)],
    ]


def _figures(cell):
    return {name: value for name, value in cell.items() if name != "perplexity"}


def test_evaluate_on_narrow_terminal(two, columns):
    columns(38)
    facts = json.loads(run("evaluate", "noir", "verse", "--json").stdout)
    (first, second), (third, fourth) = (row["results"] for row in facts["adapters"])
    shown = [re.split(r" {2,}", line.rstrip()) for line in run("evaluate", "noir", "verse").stdout.splitlines()]
    assert shown[1][:2] == ["(base)", "on noir"]
    assert shown[3:7] == [
        ["noir", "on noir", loss(first)],
        ["noir", "on verse", loss(second)],
        ["verse", "on noir", loss(third)],
        ["verse", "on verse", loss(fourth)],
    ]
    assert shown[9:] == [
        ["noir", "on noir", gain(first)],
        ["noir", "on verse", gain(second)],
        ["verse", "on noir", gain(third)],
        ["verse", "on verse", gain(fourth)],
    ]


def test_evaluate_writes_plot(two, tmp_path):
    shown = run("evaluate", "noir", "verse", "--plot", "gains.png").stdout
    assert shown.startswith("held-out loss in nats per token")
    drawn = (tmp_path / "gains.png").read_bytes()
    matrix = evaluate(two, options=ModelOptions(device="cpu"))
    names = [rows.name for rows in matrix.sets]
    plots.plot_gains(matrix.base, matrix.adapters, names, matrix.cells, tmp_path / "again.png")
    assert drawn == (tmp_path / "again.png").read_bytes()
    json.loads(run("evaluate", "noir", "verse", "--plot", "other.PNG", "--json").stdout)
    assert (tmp_path / "other.PNG").read_bytes() == drawn


def test_evaluate_reports_missing_rows(two, tmp_path, columns):
    columns(100)
    lost = tmp_path / "cache" / "held-out" / f"{two[1].manifest.data.held_out_hash}.json"
    lost.unlink()
    why = "its held-out rows are not in the cache: it was trained elsewhere, or the cache was emptied"
    result = run("evaluate", "noir", "verse", "--plot", "gains.png")
    assert result.stderr.splitlines()[-1] == f"verse has no column: {why}."
    shown = [line.split() for line in result.stdout.splitlines()]
    assert shown[1:3] == [["noir"], ["6", "rows"]]
    assert [line[0] for line in shown[3:6]] == ["(base)", "noir", "verse"]
    assert (tmp_path / "gains.png").is_file()
    facts = json.loads(run("evaluate", "noir", "verse", "--json").stdout)
    assert facts["sets"][1] == {"name": "verse", "rows": 0, "missing": why}
    assert error("evaluate", "verse") == (
        f"Error: There are no rows to evaluate on. verse: {why}. Name a dataset with --eval-dataset."
    )


def test_evaluate_with_eval_dataset(two, tmp_path, columns):
    columns(100)
    lines = [f"{text},{number % 2}" for number, text in enumerate(tiny_models.reviews(30, seed=9))]
    (tmp_path / "films.csv").write_text("\n".join(["body,label", *lines]))
    given = ["--eval-dataset", "films.csv", "--text-column", "body", "--where", "label=1"]
    result = run("evaluate", "noir", "verse", *given)
    assert "Evaluation on films.csv: 15 usable rows of 30." in result.stderr.splitlines()
    assert [line.split() for line in result.stdout.splitlines()[1:3]] == [["films.csv"], ["15", "rows"]]
    some = json.loads(run("evaluate", "verse", *given, "--eval-rows", 4, "--json").stdout)
    assert some["sets"] == [{"name": "films.csv", "rows": 4, "missing": None}]
    assert [row["results"][0]["rows"] for row in some["adapters"]] == [4]
    fewer = json.loads(run("evaluate", "noir", "verse", "--eval-rows", 3, "--json").stdout)
    assert [eval_set["rows"] for eval_set in fewer["sets"]] == [3, 3]


def test_evaluate_errors(two, tmp_path, gpt2):
    stranger = other_base(tmp_path)
    for option, name in (
        (["--where", "label=1"], "where"),
        (["--eval-split", "test"], "eval_split"),
        (["--clean", "lines"], "clean"),
    ):
        assert error("evaluate", "noir", *option) == f"Error: {name}: only valid with --eval-dataset."
    assert error("evaluate", "noir", "--where", "a=1", "--text-column", "b") == (
        "Error: text_column, where: only valid with --eval-dataset."
    )
    for name in ("gains.jpg", "gains"):
        assert (
            error("evaluate", "noir", "--plot", name) == f"Error: --plot {name}: choose a name that ends in .png."
        )
    assert error("evaluate", "noir", "--plot", "none/gains.png") == (
        "Error: --plot none/gains.png: there is no folder none."
    )
    Path("folder.png").mkdir()
    assert error("evaluate", "noir", "--plot", "folder.png") == (
        "Error: --plot folder.png: folder.png is a folder."
    )
    assert error("evaluate", "noir", "nobody") == (
        "Error: There is no adapter 'nobody', neither in adapters (noir, verse) nor as a path."
    )
    assert error("evaluate", "noir", "verse", "adapters/noir") == (
        "Error: Two of these adapters have the name noir: list each once, or rename one."
    )
    assert error("evaluate", "noir", "--eval-dataset", "none.csv") == (
        "Error: There is no dataset 'none.csv': give imdb, an existing file or folder, or a Hub id (owner/name)."
    )
    assert error("evaluate", "noir", "--base", stranger).startswith(
        f"Error: noir was trained on {gpt2} (fingerprint "
    )
    assert "FORCED: noir was trained on" in run("evaluate", "noir", "--base", stranger, "--force").stderr
    assert "Missing argument" in flat(run("evaluate", exit_code=2).stderr)
    run("evaluate", "noir", "--eval-rows", 1, exit_code=2)
    assert not list(tmp_path.glob("*gains*"))


# Origin and lineage


def test_adopt_command(two, tmp_path, gpt2, columns):
    columns(200)
    shutil.copytree(two[0].path, tmp_path / "elsewhere" / "guest")
    (tmp_path / "elsewhere" / "guest" / MANIFEST_FILE).unlink()
    before = (tmp_path / "elsewhere" / "guest" / WEIGHTS_FILE).read_bytes()
    shown = run("adapters", "show", "elsewhere/guest").stdout
    assert "by another tool, without a manifest (run `adapters adopt` to write one)" in shown
    adopted = run("adapters", "adopt", "elsewhere/guest")
    assert adopted.stdout == "adapters/guest\n"
    assert (
        adopted.stderr
        == f"guest fits {gpt2} by its layer sizes; it cannot be verified that it was trained on it.\n"
    )
    assert run("adapters", "adopt", "elsewhere/guest", "--name", "b", "--base", gpt2).stdout == "adapters/b\n"
    assert (tmp_path / "adapters" / "guest" / WEIGHTS_FILE).read_bytes() == before
    assert not (tmp_path / "elsewhere" / "guest" / MANIFEST_FILE).exists()
    lines = dict(
        re.split(r" {2,}", line.strip(), maxsplit=1)
        for line in run("adapters", "show", "guest").stdout.splitlines()
    )
    assert lines["evaluation"] == "not evaluated"
    assert lines["fingerprint"] == find_base(str(gpt2)).fingerprint
    assert lines["created"].startswith("by another tool, adopted 20")
    assert "lineage" not in lines
    assert run("adapters", "verify", "guest", "b").stdout == "guest: OK\nb: OK\n"
    assert (
        error("adapters", "adopt", "guest") == "Error: adapters/guest has a manifest: there is nothing to adopt."
    )
    assert error("adapters", "adopt", "elsewhere/guest").startswith(
        "Error: adapters/guest exists: choose another --name"
    )
    stranger = other_base(tmp_path)
    assert error("generate", "--adapter", "guest", "--base", stranger, "x").startswith(
        "Error: guest was trained on "
    )
    wider = tiny_models.save_model(tmp_path / "wider", "gpt2", width=48)
    assert error("adapters", "adopt", "elsewhere/guest", "--name", "c", "--base", wider).startswith(
        "Error: elsewhere/guest does not fit the base: transformer.h.0.attn.c_attn is "
    )
    assert Library().names() == ["b", "guest", "noir", "verse"]


def listed():
    """Rows of `adapters list`: name -> column -> value."""
    head, *lines = run("adapters", "list").stdout.splitlines()
    starts = [match.start() for match in re.finditer(r"\S+", head)]
    ends = [*starts[1:], None]
    rows = [[line[start:end].strip() for start, end in zip(starts, ends, strict=True)] for line in lines]
    return {row[0]: dict(zip(head.split(), row, strict=True)) for row in rows}


def test_list_and_show_lineage(two, columns):
    columns(250)
    how = ["--max-steps", 1, "--max-length", 64, "--eval-rows", 2, "--device", "cpu"]
    trained = run("train", "--from", "noir", "--dataset", "verse.json", "--name", "child", *how)
    assert trained.stdout.startswith("adapters/child  ")
    run("train", "--from", "child", "--dataset", "noir.json", "--name", "grandchild", *how)
    prints = {name: Library().get(name).sha256[:12] for name in ("noir", "child")}

    def lineage():
        lines = run("adapters", "show", "grandchild").stdout.splitlines()
        start = next(number for number, line in enumerate(lines) if line.startswith("lineage"))
        return [line[len("fingerprint  ") :].rstrip() for line in lines[start : start + 2]]

    assert lineage() == [f"from child ({prints['child']})", f"  from noir ({prints['noir']})"]
    rows = listed()
    assert {name: row["parent"] for name, row in rows.items()} == {
        "child": "noir",
        "grandchild": "child",
        "noir": "",
        "verse": "",
    }
    assert all(re.fullmatch(r"\d+ s|[\d.]+ min", row["age"]) for row in rows.values())
    assert (rows["child"]["rank"], rows["child"]["data"]) == ("4", "verse.json")
    run("adapters", "rename", "child", "old")
    run("adapters", "remove", "noir", "--yes")
    assert lineage() == [
        f"from child ({prints['child']}, now named old)",
        f"  from noir ({prints['noir']}, not in this library)",
    ]
    facts = json.loads(run("adapters", "show", "grandchild", "--json").stdout)
    assert [(parent["name"], parent["generation"], parent["here"]) for parent in facts["ancestors"]] == [
        ("child", 1, "old"),
        ("noir", 2, None),
    ]
    assert facts["parents"][0]["parents"][0]["name"] == "noir"


def test_list_shows_age(two, columns):
    columns(250)
    days = two[0].manifest.model_copy(update={"created": "2020-01-01T00:00:00+00:00"})
    (two[0].path / MANIFEST_FILE).write_text(days.to_json())
    soon = two[1].manifest.model_copy(update={"created": "2999-01-01T00:00:00+00:00"})
    (two[1].path / MANIFEST_FILE).write_text(soon.to_json())
    rows = listed()
    assert re.fullmatch(r"[\d,]+ d", rows["noir"]["age"])
    assert int(rows["noir"]["age"][:-2].replace(",", "")) > 2000
    assert rows["verse"]["age"] == "0 s"
    (two[1].path / MANIFEST_FILE).unlink()
    assert (listed()["verse"]["age"], listed()["verse"]["parent"], listed()["verse"]["gain"]) == ("?", "?", "?")


def test_verify_explains_ok(two):
    result = run("adapters", "verify")
    assert result.stdout == "noir: OK\nverse: OK\n"
    assert result.stderr == (
        "OK: files are valid, values finite, hashes as in the manifest if there is one. Use `evaluate` to measure "
        "quality.\n"
    )
    assert run("adapters", "verify", "--json").stderr == ""


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
    assert len(json.loads(run("train", *given, "--preview", 2, "--json").stdout)) == 2
    assert Library().names() == ["noir", "verse"]


@pytest.mark.parametrize("config", [{"base_model_name_or_path": "\ud800"}, {"\ud800": 1}, {"x\ngood: OK\ny": 1}])
def test_hostile_config_prints_one_line(tmp_path, config):
    adapter_files.write(tmp_path / "adapters" / "evil", config)
    for command in ("list", "verify"):
        done = process("cli.py", "adapters", command, "--adapters-dir", tmp_path / "adapters")
        assert "Traceback" not in done.stderr
        assert "good: OK" not in done.stdout.splitlines() + done.stderr.splitlines()


def test_brackets_are_not_markup(adapter, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    adapter.path.rename(tmp_path / "[b]x[")
    assert "[b]x[" in run("compare", "--adapter", "[b]x[", "--max-new-tokens", 2, "x").stdout
    (tmp_path / "d[").mkdir()
    for name in ("d[red].csv", "d[/y].csv"):
        (tmp_path / name).write_text("text\n" + "\n".join(tiny_models.reviews(5)))
        assert name in run("evaluate", "[b]x[", "--eval-dataset", name).stdout


def test_verify_problem_hides_explanation(adapter):
    (adapter.path / "run.yaml").unlink()
    assert "OK: " not in run("adapters", "verify", "reviews", exit_code=1).stderr


def test_adapters_commands_json(adapter, tmp_path):
    assert json.loads(run("adapters", "rename", "reviews", "old", "--json").stdout)["name"] == "old"
    (tmp_path / "adapters" / "old" / MANIFEST_FILE).unlink()
    adopted = json.loads(run("adapters", "adopt", "old", "--json").stdout)
    assert adopted["weights"]["config"] == atomic_io.sha256_file(tmp_path / "adapters" / "old" / CONFIG_FILE)
    assert json.loads(run("adapters", "remove", "old", "--yes", "--json").stdout) == {"removed": "old"}
    assert run("adapters", "verify").stderr == "No adapters in adapters yet: train one.\n"


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
        ("lora-tuner tr", ["train"]),
        ("lora-tuner adapters re", ["rename", "remove"]),
        ("lora-tuner train --meth", ["--method"]),
        ("lora-tuner train --method l", ["lora", "lora+"]),
        ("lora-tuner generate --adapter no", ["noir", "notes"]),
        ("lora-tuner compare --adapter noir --adapter not", ["notes"]),
        ("lora-tuner train --from ve", ["verse"]),
        *(
            (f"lora-tuner {command} n", ["noir", "notes"])
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
