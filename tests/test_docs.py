"""What the documents say is run, parsed or looked up."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from lora_tuner.cli.app import app
from lora_tuner.config import TrainConfig, config_to_yaml

from . import api_server, method_table, tiny_models
from .command_reference import reference
from .hub_server import Hub
from .test_hub import repos  # noqa: F401 - a fixture

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "adapters/README.md"]
PAGES += [
    "docs/chat.md",
    "docs/growth.md",
    "docs/measuring.md",
    "docs/methods.md",
    "docs/other-tools.md",
    "docs/reliability.md",
    "docs/scale.md",
    "docs/serving.md",
    "SECURITY.md",
    "benchmarks/RESULTS.md",
]


def text(page):
    return (ROOT / page).read_text(encoding="utf-8")


def commands(page):
    """Each `python cli.py ...` of a page: in code blocks, and in back-ticks within a line."""
    lines = re.findall(r"^python cli\.py (.*)$", text(page), re.MULTILINE) + re.findall(
        r"`python cli\.py ([^`]+)`", text(page)
    )
    return [line.split("  #")[0].strip() for line in lines]


def test_the_reference_is_made_from_the_commands():
    assert text("docs/commands.md") == reference(), "run `make docs`"


def test_the_table_of_methods_is_what_happens(tmp_path):
    assert method_table.PAGE.read_text(encoding="utf-8") == method_table.page(method_table.table(tmp_path)), (
        "run `make docs`"
    )


@pytest.mark.parametrize("line", [line for page in PAGES for line in commands(page)])
def test_each_command_of_the_readme_can_be_typed(line):
    command, arguments = typer.main.get_command(app), shlex.split(line)
    while hasattr(command, "commands"):
        command = command.commands[arguments.pop(0)]
    command.make_context("cli.py", arguments)  # raises for an option or argument that is not there


def test_each_test_that_a_promise_names_is_there():
    named = re.findall(r"`(test_\w+)`", text("docs/reliability.md"))
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(named) > 30
    assert [name for name in named if f"def {name}(" not in tests] == []


def test_the_readme_has_commands():
    assert len(commands("README.md")) > 12


def test_the_python_example_of_the_readme_runs(repos, tmp_path):  # noqa: F811
    (example,) = re.findall(r"```python\n(from lora_tuner .*?)```", text("README.md"), re.DOTALL)
    (tmp_path / "reviews.csv").write_text("text\n" + "\n".join(tiny_models.reviews(60)))
    with Hub(repos) as hub:
        env = hub.env(tmp_path / "home") | {"LORA_TUNER_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", example], env=env, capture_output=True, text=True, timeout=120, check=False
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "['noir']"
    assert float(done.stdout.splitlines()[0]) > 0


def test_the_openai_example_of_the_readme_runs(gpt2, tmp_path, capsys):
    (example,) = re.findall(r"```python\n(from openai .*?)```", text("README.md"), re.DOTALL)
    api_server.write_adapter(tmp_path / "adapters", "praise", gpt2, 0)
    with api_server.serving(gpt2, tmp_path / "adapters") as served:
        exec(example.replace("http://localhost:8000", served.url))
    assert (
        capsys.readouterr().out == api_server.greedy(gpt2, tmp_path / "adapters", "praise", "This film", 40).text + "\n"
    )


@pytest.mark.parametrize("page", PAGES)
def test_nothing_is_left_to_be_filled_in(page):
    assert not re.search(r"^[A-Z]{4,}$|TODO|TBD|XXX", text(page), re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_links_and_make_targets_exist(page):
    for target in re.findall(r"\]\(([^)#]+)\)", text(page)):
        assert target.startswith("https://") or (ROOT / page).parent.joinpath(target).exists(), target
    targets = set(re.findall(r"^([a-z]+):", text("Makefile"), re.MULTILINE))
    for target in re.findall(r"\bmake ([a-z]+)\b(?=[`\s]*(?:#|`|$))", text(page), re.MULTILINE):
        assert target in targets, target


@pytest.mark.parametrize("folder", ["lora_tuner", "lora_tuner/server"])
def test_the_tree_in_architecture_is_the_tree(folder):
    tree = re.search(rf"^{folder}/ *.*\n((?:  \w+\.py .*\n)+)", text("ARCHITECTURE.md"), re.MULTILINE)[1]
    named = {line.split()[0] for line in tree.splitlines()}
    assert named == {path.name for path in (ROOT / folder).glob("*.py")} - {"__init__.py"}


def test_run_yaml_holds_every_setting_that_has_a_value():
    config = TrainConfig(base="distilgpt2", max_steps=3, name="a")
    assert TrainConfig.model_validate(yaml.safe_load(config_to_yaml(config))) == config
