"""The documents are executed, parsed, or compared with the code."""

import ast
import doctest
import inspect
import re
import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import typer
import yaml

import lora_tuner
from lora_tuner.cli.app import app
from lora_tuner.config import TrainConfig
from lora_tuner.settings_files import config_to_yaml

from . import api_server, method_table, tiny_models
from .command_reference import reference
from .faults.process import Command
from .hub_server import Hub
from .test_hub import repos  # noqa: F401 - a fixture
from .training import preferences

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lora_tuner"
GENERATED = "docs/commands.md"
PAGES = sorted(
    str(path.relative_to(ROOT))
    for folder in (".", "docs", "adapters", "benchmarks", "recipes")
    for path in (ROOT / folder).glob("*.md")
    if path != ROOT / GENERATED
)
RECIPES = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "recipes").glob("*.yaml"))]
BUILD_SITE = re.search(r"-m (sphinx .*) build/docs$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]


def read_page(page):
    return (ROOT / page).read_text(encoding="utf-8")


def commands(page):
    """Each `python cli.py ...` of a page or recipe, in code blocks, comments and back-ticks."""
    text = read_page(page)
    blocks = re.findall(r"^(?:#     )?python cli\.py (.*)$", text, re.MULTILINE)
    inline = re.findall(r"`python cli\.py ([^`]+)`", text)
    return [line.split("  #")[0].strip() for line in [*blocks, *inline]]


def heading_anchors(path):
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def architecture_tree():
    """The modules in the tree of ARCHITECTURE.md, as paths relative to the package."""
    paths, room = set(), ""
    for line in read_page("ARCHITECTURE.md").splitlines():
        if folder := re.match(r"lora_tuner/(\w*)", line):
            room = folder[1]
        elif modules := re.match(r"  ((?:[\w/]+\.py ?)+) ", line):
            paths |= {f"{room}/{name}".strip("/") for name in modules[1].split()}
    return paths


def test_command_reference_is_current():
    assert read_page(GENERATED) == reference(), "run `make docs`"


@pytest.mark.slow  # each method is tested by itself too
def test_method_table_is_current(tmp_path):
    assert method_table.PAGE.read_text(encoding="utf-8") == method_table.page(method_table.table(tmp_path)), (
        "run `make docs`"
    )


@pytest.mark.parametrize("line", sorted({line for page in [*PAGES, *RECIPES] for line in commands(page)}))
def test_documented_command_parses(line):
    command, arguments = typer.main.get_command(app), shlex.split(line)
    while hasattr(command, "commands"):
        command = command.commands[arguments.pop(0)]
    command.make_context("cli.py", arguments)  # raises for an unknown option or argument


def test_readme_lists_every_command():
    table = re.findall(r"^\| (`.*?`) \|", read_page("README.md"), re.MULTILINE)
    listed = {name for cell in table for name in re.findall(r"`([a-z]+)`", cell)}
    assert listed == set(typer.main.get_command(app).commands)


def test_named_tests_exist():
    named = [name for page in PAGES for name in re.findall(r"`(test_\w+)`", read_page(page))]
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(named) > 30
    assert [name for name in named if f"def {name}(" not in tests] == []


@pytest.mark.parametrize("page", ["README.md", "docs/tour.md"])
def test_page_has_commands(page):
    assert len(commands(page)) > 12


def test_readme_python_example_runs(repos, tmp_path):  # noqa: F811
    (example,) = re.findall(r"```python\n(from lora_tuner .*?)```", read_page("README.md"), re.DOTALL)
    (tmp_path / "reviews.csv").write_text("text\n" + "\n".join(tiny_models.reviews(60)))
    with Hub(repos) as hub:
        use = f"from tests.faults.test_hub_faults import use_hub\nuse_hub({hub.url!r}, {str(tmp_path / 'home')!r}, {{}})\n"
        done = Command("--version", cwd=tmp_path, cache=tmp_path, before=partial(exec, use + example, {})).end()
    gain, *_, names, _ = done.out.splitlines()  # the version is last
    assert names == "['noir']", done.err
    assert float(gain) > 0


def test_openai_example_runs(gpt2, tmp_path, capsys):
    (example,) = re.findall(r"```python\n(from openai .*?)```", read_page("docs/tour.md"), re.DOTALL)
    api_server.write_adapter(tmp_path / "adapters", "praise", gpt2, 0)
    with api_server.serving(gpt2, tmp_path / "adapters") as served:
        exec(example.replace("http://localhost:8000", served.url))
    assert (
        capsys.readouterr().out
        == api_server.greedy(gpt2, tmp_path / "adapters", "praise", "This film", 40).text + "\n"
    )


def test_preference_example_runs(gpt2, capsys):
    (example,) = re.findall(
        r"```python\n(from lora_tuner .*?preference.*?)```", read_page("docs/objectives.md"), re.DOTALL
    )
    preferences.write_rows(preferences.pairs(60))
    exec(example.replace("minutes=10", f"max_steps=2, max_length=64, device='cpu', base={str(gpt2)!r}"))
    before, _, after, _, error = capsys.readouterr().out.split()
    assert 0 <= float(before) <= 1
    assert 0 <= float(after) <= 1
    assert 0 <= float(error) < 0.5


def test_label_example_runs(gpt2, tmp_path, capsys):
    (example,) = re.findall(
        r"```python\n(from lora_tuner import Generator.*?)```", read_page("docs/objectives.md"), re.DOTALL
    )
    rows = [f"{text},{('billing', 'repairs')[number % 2]}" for number, text in enumerate(tiny_models.reviews(60))]
    (tmp_path / "tickets.csv").write_text("text,team\n" + "\n".join(rows))
    exec(example.replace("minutes=10", f"max_steps=2, max_length=64, device='cpu', base={str(gpt2)!r}"))
    told = ast.literal_eval(capsys.readouterr().out)
    assert {label for label, _ in told} <= {"billing", "repairs"}
    assert all(0.5 <= probability <= 1 for _, probability in told)


# In an order in which each finds what the ones before have made.
EXAMPLES = (
    "TrainConfig",
    "SamplingParams",
    "plan",
    "train",
    "Library",
    "Generator",
    "evaluate",
    "blend",
    "compress",
)
EXAMPLES += ("merge", "run_sweep", "classify")


@pytest.mark.slow
def test_docstring_examples_run(gpt2, tmp_path):
    reviews = tiny_models.reviews(60)
    tickets = [f"{text},{('billing', 'repairs')[number % 2]}" for number, text in enumerate(reviews)]
    (tmp_path / "reviews.csv").write_text("text\n" + "\n".join(reviews))
    (tmp_path / "tickets.csv").write_text("text,team\n" + "\n".join(tickets))
    api_server.write_adapter(tmp_path / "adapters", "verse", gpt2, 0)
    tiny = partial(TrainConfig, base=str(gpt2), max_length=64, device="cpu", eval_rows=8)
    names = {name: getattr(lora_tuner, name) for name in lora_tuner.__all__}
    shared = names | {"TrainConfig": tiny, "Path": Path}
    for name in EXAMPLES:
        (test,) = doctest.DocTestFinder(recurse=False).find(names[name], name, module=False)
        test.globs, report = shared, list[str]()
        assert doctest.DocTestRunner().run(test, out=report.append, clear_globs=False).failed == 0, "".join(
            report
        )
        assert test.examples, name


def test_docstring_examples_are_all_run():
    """And begin a section, of which the API reference makes a block."""
    documents = {name: getattr(lora_tuner, name).__doc__ or "" for name in lora_tuner.__all__}
    assert {name for name, text in documents.items() if ">>>" in text} == {*EXAMPLES}
    assert all("\nExamples:\n    >>> " in inspect.cleandoc(documents[name]) for name in EXAMPLES)


@pytest.mark.parametrize("page", PAGES)
def test_page_has_no_placeholders(page):
    assert not re.search(r"^[A-Z]{4,}$|TODO|TBD|XXX", read_page(page), re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_links_and_make_targets_exist(page):
    for target, anchor in re.findall(r"\]\((https://[^)]+|[^)#]*)#?([^)]*)\)", read_page(page)):
        linked = (ROOT / page).parent / target if target else ROOT / page
        is_external = re.fullmatch(r"https://([\w-]+\.)+[a-z]+(/[^\s<>\"]*)?", target)
        assert is_external or linked.exists(), target
        assert not anchor or anchor in heading_anchors(linked), anchor
    targets = set(re.findall(r"^([a-z-]+):", read_page("Makefile"), re.MULTILINE))
    for target in re.findall(r"\bmake ([a-z-]+)\b(?=[`\s]*(?:#|`|$))", read_page(page), re.MULTILINE):
        assert target in targets, target


def test_site_lists_every_page():
    (contents,) = re.findall(r"^CONTENTS = (\{.*?^\})", read_page("docs/conf.py"), re.MULTILINE | re.DOTALL)
    listed = [f"{page}.md" for pages in ast.literal_eval(contents).values() for page in pages]
    assert sorted([*listed, "README.md", "adapters/README.md"]) == sorted([*PAGES, GENERATED])


def test_api_page_has_public_names():
    named = re.findall(r"^\.\. auto\w+:: (\w+)$", read_page("docs/api.md"), re.MULTILINE)
    assert sorted(named) == lora_tuner.__all__


@pytest.mark.slow
def test_site_names_broken_links(tmp_path):
    """It is built without the network and without warnings; then two links lead nowhere."""
    pytest.importorskip("sphinx", reason="the site needs pip install -e '.[docs]'")
    source, site = tmp_path / "source", tmp_path / "site"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "__pycache__", "build", "*.safetensors"))

    def build():
        line = [sys.executable, "-m", *shlex.split(BUILD_SITE), site]
        return subprocess.run(line, cwd=source, capture_output=True, text=True, check=False)

    done = build()
    assert (done.returncode, done.stderr) == (0, "")
    assert (site / "index.html").read_text() == (site / "README.html").read_text()
    html = (site / "docs" / "api.html").read_text()
    assert [name for name in lora_tuner.__all__ if f'id="lora_tuner.{name}"' not in html] == []
    assert TrainConfig.model_fields["max_rows"].description.partition(":")[0] in html
    assert ">Type<" not in html  # a colon in the text of a property
    for page in site.rglob("*.html"):
        assert not re.search(r"<(link|script|img)[^>]* (href|src)=.https?:", page.read_text()), page

    with (source / "docs" / "growth.md").open("a") as page:
        page.write("\n[one](tour.md#nowhere) [two](nowhere.md)\n")
    done = build()
    assert done.returncode
    assert "local id not found in doc 'docs/tour': 'nowhere'" in done.stderr
    assert "cross-reference target not found: 'nowhere.md'" in done.stderr


def test_architecture_names_every_module():
    modules = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"}
    assert architecture_tree() == modules


def test_flows_name_existing_functions():
    flows = read_page("ARCHITECTURE.md").partition("## Flows")[2].partition("## ")[0]
    sources = {
        f"/{path.relative_to(PACKAGE).with_suffix('')}": path.read_text() for path in PACKAGE.rglob("*.py")
    }
    names = re.findall(r"\b(?:\w+\.)+(?!yaml)\w+", flows)
    assert len(names) > 20
    for name in names:
        *_, owner, last = name.split(".")
        if any(module.endswith("/" + name.replace(".", "/")) for module in sources):
            continue
        homes = [
            text for module, text in sources.items() if module.endswith(f"/{owner}") or f"\nclass {owner}" in text
        ]
        assert any(re.search(rf"(def|class) {last}\b", text) for text in homes), name


@pytest.mark.parametrize("page", ["docs/upstream-issues.md", "ARCHITECTURE.md"])
def test_named_files_exist(page):
    for name in re.findall(r"`([\w/]+\.py)`", read_page(page)):
        assert any((root / name).is_file() for root in (ROOT, PACKAGE, ROOT / "tests")), name


def test_run_yaml_keeps_every_set_value():
    config = TrainConfig(base="distilgpt2", max_steps=3, name="a")
    assert TrainConfig.model_validate(yaml.safe_load(config_to_yaml(config))) == config
