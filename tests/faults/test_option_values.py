"""Invalid values for every option of every command, and invalid config files: one error line, and nothing written."""

import contextlib
import io
import json
import sys

import pytest
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_tuner.cli.app import app

from .. import adapter_files
from ..parameters import sampled
from .process import contents
from .test_broken_data import drop_root_access, table

ROOT = typer.main.get_command(app)
HUGE = "9" * 30
INVALID = ["", " ", "nonsense", "-1", "0", "nan", "inf", "1e999", "-0.5", HUGE, "x" * 5000]
INVALID += ["a\0b", "\u202e\u00fc\n", "\udcff", "some.txt", "folder", "folder/up"]
NO_BASE = ("--base", "nowhere/base")  # accepted values get as far as this error
ARGUMENTS = {
    "train": ("--dataset", "x.csv", *NO_BASE),
    "data": ("x.csv", "--json", *NO_BASE),
    "generate": ("x", *NO_BASE),
    "classify": ("x", "--adapter", "told", *NO_BASE),
    "compare": ("x", "--adapter", "a", *NO_BASE),
    "evaluate": ("a", "--eval-dataset", "x.csv", *NO_BASE),
    "report": ("a", "--json", *NO_BASE),
    "merge": ("a", "--out", "out", *NO_BASE),
    "blend": ("a=1", "b=2", "--name", "new", *NO_BASE),
    "compress": ("a", "--name", "new", *NO_BASE),
    "export": ("a", "--out", "a.gguf", *NO_BASE),
    "push": ("a", "owner/name"),
    "pull": ("owner/name", "--name", "new"),
    "serve": ("--port", "0", *NO_BASE),
    "doctor": (),
    "methods": (),
    "runs list": (),
    "runs remove": ("nothing", "--yes"),
    "adapters list": (),
    "adapters show": ("a",),
    "adapters verify": ("other",),
    "adapters check": ("a", "--for", "vllm"),
    "adapters rename": ("nothing", "new"),
    "adapters remove": ("nothing", "--yes"),
    "adapters adopt": ("other", *NO_BASE),
}
NAMES = {"nonsense", "nan", "inf", "folder"}  # valid adapter names
TEXTS = {*INVALID} - {"", "a\0b", "\udcff"}
PATHS = TEXTS - {"x" * 5000, "some.txt"}
ACCEPTED = {  # all others are rejected
    **dict.fromkeys(["--split-salt", "--stop"], TEXTS),
    **dict.fromkeys(
        ["--target-modules", "--device", "--revision", "--add-tokens", "--sample-prompt"], TEXTS
    ),  # checked against the base
    **dict.fromkeys(["--adapters-dir", "--runs-dir"], PATHS),  # created if they are missing
    **dict.fromkeys(["--name", "new"], NAMES),
    **{
        option: {HUGE}
        for option in [
            "--preview",
            "--max-rows",
            "--max-length",
            "--eval-rows",
            "--max-new-tokens",
            "--max-bytes",
        ]
    },
    **{option: {HUGE} for option in ["--learning-rate", "--max-grad-norm"]},
    **{option: {"0"} for option in ["--dropout", "--warmup", "--seed", "--temperature", "--energy", "--min-p"]},
    **{option: {"0", HUGE} for option in ["--top-k", "--weight-decay"]},
    **{option: {"0", "-1", "-0.5"} for option in ["--presence-penalty", "--frequency-penalty"]},
    "--port": {"0"},
    "--max-resident": {HUGE},
    "--api-key": {"nonsense", "some.txt", "folder/up", HUGE, "x" * 5000},
    "--dataset": {"some.txt"},
    "--eval-dataset": {"some.txt"},
    "--guard": {"some.txt"},
    "--max-invalid": {"0"},
    "--out": PATHS - {"folder"},
    "--html": PATHS - {"folder"},
    "--redact": PATHS,  # a name without an extension gets one
    "--loss-rows": {HUGE},
    "datasets": {"some.txt"},
    "prompt": TEXTS | {""},
    "repo": TEXTS,  # checked by the Hub
}


def commands(command=ROOT, path=()):
    for name, subcommand in getattr(command, "commands", {}).items():
        yield from commands(subcommand, (*path, name))
    if any(param.name != "help" for param in command.params) and not hasattr(command, "commands"):
        yield " ".join(path), command  # the demo takes no value


COMMANDS = dict(commands())


@pytest.fixture
def workspace(tmp_path):
    """The files and adapters that ARGUMENTS name."""
    (tmp_path / "x.csv").write_text(table())
    (tmp_path / "some.txt").write_text("one\ntwo\n")
    (tmp_path / "folder").mkdir()
    for name in "ab":
        adapter_files.write(tmp_path / "adapters" / name, facts=adapter_files.manifest())
    adapter_files.write(tmp_path / "other")
    adapter_files.write(tmp_path / "told", facts=adapter_files.manifest(labels=adapter_files.labels()))
    return tmp_path


def invoke(*arguments):
    """Run a command in this process; return status, stdout and stderr."""
    out, err, status, before = io.StringIO(), io.StringIO(), 0, sys.stdin
    sys.stdin = io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            ROOT.main(args=[*arguments], prog_name="cli.py")
    except SystemExit as error:
        status = error.code
    finally:
        sys.stdin = before
    return status, out.getvalue(), err.getvalue()


def with_value(arguments, param, value, command):
    """The arguments with another value for one parameter."""
    arguments = list(arguments)
    if param.param_type_name == "option":
        if param.opts[0] in arguments:
            position = arguments.index(param.opts[0])
            del arguments[position : position + 2]
        return [*arguments, param.opts[0], value]
    names = [other.name for other in command.params if other.param_type_name == "argument"]
    arguments[names.index(param.name)] = value
    return arguments


def is_flag(param):
    return param.param_type_name == "option" and param.is_flag


def files_of(folder):
    return {name: content for name, content in contents(folder).items() if content is not None}


@pytest.mark.parametrize("name", sampled(COMMANDS, 3))
def test_invalid_value_error_names_option(workspace, name):
    command, arguments = COMMANDS[name], ARGUMENTS[name]
    usual = invoke(*name.split(), *arguments)
    before, wrong = files_of(workspace), []
    for param in command.params:
        if is_flag(param):
            continue
        option = param.opts[0] if param.param_type_name == "option" else param.name
        for value in INVALID:
            status, out, err = result = invoke(*name.split(), *with_value(arguments, param, value, command))
            accepted = status == 0 or (status, out, last(err)) == (usual[0], usual[1], last(usual[2]))
            lines = [line for line in err.splitlines() if line.startswith("Error: ")]
            if name == "adapters verify" and status == 1:
                lines = lines or out.splitlines()  # it prints the problems of each adapter
            if accepted:
                fine = value in ACCEPTED.get(option, ())
            else:
                fine = status in (1, 2) and len(lines) == 1 and (not out or lines == out.splitlines())
                fine = fine and any(
                    text and text in lines[0] for text in (option, param.name, param.metavar, shown(value))
                )
            if not fine:
                wrong.append((option, value[:20], result))
    assert not wrong, "\n".join(map(str, wrong))
    assert files_of(workspace) == before


def last(text):
    return text.splitlines()[-1:]


def shown(value):
    """A value as shown in an error; click reads -0.5 as several short options."""
    return "-0" if value == "-0.5" else value.replace("\n", " ")


@pytest.mark.parametrize("name", COMMANDS)
def test_repeated_option_is_rejected(workspace, name):
    for param in COMMANDS[name].params:
        if param.param_type_name == "argument" or param.multiple or "--help" in param.opts:
            continue
        twice = [*param.opts] * 2 if is_flag(param) else [param.opts[0], "1", param.opts[0], "2"]
        status, _, err = invoke(
            *name.split(), *with_value(ARGUMENTS[name], param, "", COMMANDS[name])[:-2], *twice
        )
        assert (status, err.count("\n")) == (2, 1)
        assert err.startswith(f"Error: Invalid value for '{param.opts[0]}'"), err
        if is_flag(param):
            status, _, err = invoke(*name.split(), *ARGUMENTS[name], f"{param.opts[0]}=1")
            assert (status, err.count("\n")) == (2, 1)
            assert param.opts[0] in err


@pytest.mark.slow
@settings(max_examples=2000, derandomize=True, deadline=None, suppress_health_check=[*HealthCheck])
@given(
    data=st.data(),
    name=st.sampled_from([command for command in COMMANDS if command not in ("doctor", "methods")]),
)  # which take no value
def test_random_option_values_fail_cleanly(workspace, data, name):
    command = COMMANDS[name]
    param = data.draw(st.sampled_from([option for option in command.params if not is_flag(option)]))
    value = data.draw(st.one_of(st.text(max_size=30), st.floats().map(str), st.integers().map(str)))
    if (name, param.name) in (("adapters list", "adapters_dir"), ("adapters verify", "names")):
        return  # these report problems per adapter
    status, _, err = invoke(*name.split(), *with_value(ARGUMENTS[name], param, value, command))
    assert status in (0, 1, 2)
    assert status == 0 or name == "adapters check" or err.count("Error: ") == 1 == last(err)[0].count("Error: ")
    assert sorted(path.name for path in workspace.iterdir() if path.is_file()) == ["some.txt", "x.csv"]


CONTRADICTIONS = [
    ("train --epochs 1 --max-steps 5", "epochs and max_steps contradict each other: give one of them"),
    ("train --minutes 1 --epochs 1 --max-steps 1", "epochs, max_steps and minutes contradict each other"),
    ("train --patience 2", "patience needs eval_every: it counts evaluations"),
    ("train --force", "force needs an adapter to continue from: give --from"),
    ("train --eval-split test", "eval_split needs eval_dataset"),
    ("train --beta 1", "beta needs objective dpo, orpo or kto: sft has no preferences"),
    ("train --objective dpo --streaming", "objective dpo is not possible with streaming"),
    (
        "train --objective kto --label-column label",
        "objective kto learns from preferences: leave label_column out",
    ),
    ("train --objective orpo --dataset x.csv", "x.csv: --objective orpo needs chosen and rejected"),
    ("data x.csv --objective kto --json", "x.csv: --objective kto needs chosen and rejected"),
    ("train --balance", "balance needs label_column"),
    ("train --from nothing", "There is no adapter 'nothing', neither in adapters (a, b) nor as a path."),
    ("train --dtype int4", "Invalid value for '--dtype'"),
    ("train --resume x --json --plan", "--resume reuses the run's saved settings"),
    ("generate x --greedy --seed 1", "greedy does not sample: leave seed out"),
    ("generate x --temperature 0 --seed 1", "greedy does not sample: leave seed out"),
    ("generate x --greedy --top-k 5", "greedy does not sample: leave temperature, top_p, top_k and min_p out"),
    (
        "generate x --top-p 0.95 --top-k 50 --greedy",
        "greedy does not sample: leave temperature, top_p, top_k and min_p out",
    ),
    ("generate x --adapters-dir adapters", "--adapters-dir needs an adapter: name one with --adapter."),
    ("train --shuffle-buffer 10000", "shuffle_buffer needs streaming: give both or none"),
    ("generate x --greedy --n 2", "n above 1 needs sampling: greedy outputs are all the same"),
    ("generate x --file some.txt", "A prompt and --file exclude each other: give one."),
    ("generate x --file folder", "Error: "),
    ("generate --file folder", "folder: Is a directory."),
    ("generate --file nowhere.txt", "There is no file nowhere.txt."),
    ("blend a=nan b=1 --name x", "a=nan: a weight must be a number other than 0."),
    ("blend a=0 b=inf --name x", "a=0, b=inf: a weight must be a number other than 0."),
    ("blend a=1 a=1e999 --name x", "a=inf: a weight must be a number other than 0."),
    ("blend a --name x", "'a' is one adapter alone"),
    ("compress a --energy 0.5 --max-bytes 9", "energy and max_bytes exclude each other: give one."),
    ("compress a --energy nan", "energy"),
    ("merge a --out folder", "folder exists: choose another --out, or replace it with --overwrite."),
    (
        "merge a --out folder --overwrite",
        "folder is not a model folder, so it is not replaced: choose another --out.",
    ),
    ("merge a --out folder/.. --overwrite", "folder/.. does not end in a name: choose another --out."),
    (
        "export a --out some.txt --overwrite",
        "some.txt is not a GGUF file, so it is not replaced: choose another --out.",
    ),
    ("evaluate a --plot x.jpg", "--plot x.jpg: choose a name that ends in .png."),
    (
        "train --text-column text --format messages",
        "format messages reads conversations and text_column a text: give one of the two, or format text",
    ),
    ("evaluate a --where label=1", "where: only valid with --eval-dataset."),
    ("merge a --out x --text-column body", "text_column: only valid with --eval-dataset."),
    ("adapters rename a b", "adapters/b exists: choose another name."),
    ("adapters list --adapters-dir some.txt", "Invalid value for '--adapters-dir'"),
    ("pull owner/name --name a", "adapters/a exists: choose another --name, or replace it with --overwrite."),
]


@pytest.mark.parametrize(("line", "why"), CONTRADICTIONS)
def test_contradicting_options_are_rejected(workspace, line, why):
    before = files_of(workspace)
    status, out, err = invoke(*line.split())
    assert files_of(workspace) == before
    assert (status in (1, 2), out, err.count("\n")) == (True, "", 1)
    assert why in err


def test_errors_in_separate_process(run, workspace):
    for line, why in CONTRADICTIONS[::9]:
        ended = run(*line.split())
        assert (ended.status in (1, 2), ended.out, ended.err.count("\n")) == (True, "", 1)
        assert why in ended.line


WRONG_FOR_BASE = [  # detected once the base is loaded
    ("--device", "nonsense", "There is no device 'nonsense' here: choose auto, cpu"),
    ("--device", "cuda:99", "There is no device 'cuda:99' here"),
    ("--device", "cpu:7", "There is no device 'cpu:7' here"),
    ("--device", "meta", "There is no device 'meta' here"),
    ("--target-modules", "nonsense", "nonsense"),
    ("--target-modules", " , ", "target_modules"),
    ("--target-modules", "lm_head", "lm_head"),
    ("--max-length", "129", "max_length is 129, but "),
    ("--revision", "main", "revision"),
    ("--learning-rate", HUGE, "The loss is nan in step 2, so the run has stopped."),
    ("--weight-decay", HUGE, "The loss is nan in step 2, so the run has stopped."),
]


@pytest.mark.parametrize(
    ("option", "value", "why"),
    [*WRONG_FOR_BASE[:4], *(pytest.param(*case, marks=pytest.mark.slow) for case in WRONG_FOR_BASE[4:])],
)
def test_value_invalid_for_base_fails(run, workspace, gpt2, option, value, why):
    options = {"--max-length": "64"} | {option: value}
    with unchanged_files(workspace):
        ended = run("train", "--dataset", "x.csv", "--base", gpt2, "--max-steps", 3, *sum(options.items(), ()))
    assert (ended.status, ended.out) == (1, ""), ended.err
    assert why in ended.line


@contextlib.contextmanager
def unchanged_files(folder):
    skip = (".cache", "runs")  # a failed run keeps its folder
    before = {name: content for name, content in contents(folder, skip).items() if content is not None}
    yield
    assert {name: content for name, content in contents(folder, skip).items() if content is not None} == before


def test_large_numbers_are_accepted(run, workspace, gpt2):
    most = {"--batch-size", "--gradient-accumulation", "--save-every", "--eval-every"}
    options = sum(((option, 1_000_000_000) for option in sorted(most)), ())
    options += ("--max-rows", HUGE, "--eval-rows", HUGE, "--max-grad-norm", HUGE, "--alpha", 1_000_000)
    quick = ("--max-steps", 1, "--max-length", 64, "--learning-rate", 1e-9)
    ended = run("train", "--dataset", "x.csv", "--base", gpt2, *options, *quick, "--json")
    assert ended.status == 0, ended.err
    facts = json.loads(ended.out)
    assert (facts["run"]["steps"], facts["alpha"]) == (1, 1_000_000)
    assert facts["result"]["rows"] == facts["data"]["counts"]["held_out"]
    written = run("generate", "--adapter", "x", "--max-new-tokens", HUGE, "--top-k", HUGE, "--json", "x")
    assert written.status == 0, written.err


@pytest.mark.parametrize("option", ["--adapters-dir", "--runs-dir"])
@pytest.mark.parametrize(
    ("where", "status", "why"),
    sampled(
        [
            ("some.txt", 2, "'some.txt' is a file."),
            ("some.txt/below", 1, "some.txt is not a folder: choose another"),
            ("locked/below", 1, "locked is not writable: choose another"),
        ],
        3,
    ),
)
def test_unwritable_folder_fails(run, workspace, gpt2, option, where, status, why):
    (workspace / "locked").mkdir()
    (workspace / "locked").chmod(0o555)
    ended = run("train", "--dataset", "x.csv", "--base", gpt2, option, where, before=drop_root_access)
    assert (ended.status, ended.out) == (status, ""), ended.err
    assert why in ended.line
    assert not (workspace / "adapters" / "x").exists()


# Config files


DEEP_YAML = "where: " + "[" * 2000 + "]" * 2000
ALIAS_BOMB = "a: &a [x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [*{chr(97 + n)}, *{chr(97 + n)}]\n" for n in range(24)
)
CONFIG_FILES = [
    ("", "x.yaml holds no settings"),
    ("# nothing\n", "x.yaml holds no settings"),
    ("- rank: 4\n", "x.yaml holds no settings"),
    ("rank", "x.yaml holds no settings"),
    ("rank: eight\n", "rank: input should be a valid integer"),
    ("rank: [8]\n", "rank: input should be a valid integer"),
    ("rank: true\n", "rank: true and false are not valid here (got True)"),
    ("rank: .nan\n", "rank: input should be"),
    ("learning_rate: .inf\n", "learning_rate: input should be a finite number"),
    ("learning_rate: {peak: 1}\n", "learning_rate: input should be a valid number"),
    (f"alpha: {HUGE}\n", "alpha: input should be less than or equal to 1000000"),
    ("dataset: 5\n", "dataset: input should be a valid string (got 5)"),
    ("dataset: ''\n", "dataset: it is empty: give a value, or leave it out"),
    ("adapters_dir: ''\n", "adapters_dir: it is empty: give a value, or leave it out"),
    ('dataset: "a\\0b"\n', "dataset: null bytes and lone surrogates are not valid text"),
    ('where: ["a=\\ud800"]\n', "where: null bytes and lone surrogates are not valid text"),
    ("where: label=1\n", "where: input should be a valid list"),
    ("keep_lines: maybe\n", "clean: input should be"),
    ("packing: no\nrnak: 8\n", "rnak: unknown setting"),
    ("1: 2\n", "1: keys should be strings"),
    ("? [a, b]\n: 2\n", "found unhashable key"),
    ("rank: 4\nrank: 8\n", "rank is given twice"),
    ("rank: &r 4\nalpha: *r\n", "line 2: *r is an alias: write its value out"),
    ("<<: *x\n", "line 1: *x is an alias"),
    (ALIAS_BOMB, "line 2: *a is an alias"),
    ("rank: !!python/object/apply:os.system ['touch hacked']\n", "could not determine a constructor for the tag"),
    ("rank: !!python/name:os.system\n", "could not determine a constructor for the tag"),
    ("rank: !mine 4\n", "could not determine a constructor for the tag"),
    ("rank: 4\n---\nrank: 8\n", "expected a single document in the stream"),
    ("rank: {\n", "cannot be read as YAML"),
    ("\trank: 4\n", "cannot be read as YAML"),
    ("name: 2024-13-45\n", "not a valid adapter name"),
    (DEEP_YAML, "cannot be read as YAML"),
    (b"\xff\xfe\0rank", "cannot be read as YAML"),
    (b"\0" * 100, "cannot be read as YAML"),
    ("rank: 4\n".encode("utf-16"), "cannot be read as YAML"),
    (f"name: {'x' * 900_000}\n", "name: longer than 10,000 characters"),
    ("#" * 1_000_001, "longer than 1,000,000 characters"),
    ("".join(f"x{n}: 1\n" for n in range(5_000)), "x0: unknown setting"),
    ("epochs: 1\nmax_steps: 1\n", "epochs and max_steps contradict each other"),
]


@pytest.mark.parametrize(("content", "why"), CONFIG_FILES)
def test_invalid_config_file_fails(workspace, content, why):
    (workspace / "x.yaml").write_bytes(content.encode() if isinstance(content, str) else content)
    before = files_of(workspace)
    others = NO_BASE if b"dataset" in (workspace / "x.yaml").read_bytes() else ARGUMENTS["train"]
    status, out, err = invoke("train", *others, "--config", "x.yaml")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert why in err
    assert files_of(workspace) == before


@pytest.mark.parametrize(
    ("name", "why"), [("folder", "Is a directory"), ("/dev/zero", "longer than"), ("no", "no file")]
)
def test_config_not_a_file_fails(run, workspace, name, why):
    ended = run("train", "--config", name)
    assert (ended.status, ended.out) == (1, "")
    assert why in ended.line
    assert ended.peak < 3e9
