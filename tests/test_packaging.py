"""The wheel: what is in it, and its command in an environment of its own."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

from . import tiny_models

ROOT = Path(__file__).parents[1]


def build(folder, *targets, out):
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", out, *targets], cwd=folder, check=True)


@pytest.fixture(scope="session")
def distributions(tmp_path_factory):
    """Wheel and sdist."""
    folder = tmp_path_factory.mktemp("dist")
    build(ROOT, out=folder)
    (wheel,), (sdist,) = folder.glob("lora_tuner-*.whl"), folder.glob("lora_tuner-*.tar.gz")
    return wheel, sdist


def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_wheel_has_every_file(distributions):
    files = [path for path in (ROOT / "lora_tuner").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    names = {str(path.relative_to(ROOT)) for path in files}
    assert {"lora_tuner/py.typed", "lora_tuner/models/native.c", "lora_tuner/data/general_text.jsonl"} <= names
    assert {name for name in contents(distributions[0]) if ".dist-info/" not in name} == names


def test_sdist_builds_the_same_wheel(distributions, tmp_path):
    wheel, sdist = distributions
    shutil.unpack_archive(sdist, tmp_path, filter="data")
    build(tmp_path / sdist.name.removesuffix(".tar.gz"), "-t", "wheel", out=tmp_path)
    assert contents(tmp_path / wheel.name) == contents(wheel)


@pytest.fixture(scope="session")
def program(distributions, tmp_path_factory):
    """The command of the wheel, in an environment that finds the dependencies among those of the tests."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python, site = folder / "bin" / "python", sysconfig.get_path("purelib")
    install = [sys.executable, "-m", "pip", "--quiet", "--python", python, "install", "--no-index", "--no-deps"]
    subprocess.run([*install, distributions[0]], check=True)
    (own,) = folder.glob("lib/python*/site-packages")
    (own / "dependencies.pth").write_text(f"{site}\n")
    return folder / "bin" / "lora-tuner"


@pytest.fixture
def run(program, tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def call(*arguments):
        done = subprocess.run(
            [program, *arguments], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done

    return call


def test_wheel_installs_its_command(run):
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert run("--version").stdout == f"lora_tuner {version}\n"
    shown = run("train", "--help").stdout
    assert "  lora-tuner train --dataset " in shown
    assert "python cli.py" not in shown


@pytest.mark.slow
@pytest.mark.real
def test_wheel_trains_and_runs_demo(run, program, tmp_path):
    where = [program.with_name("python"), "-c", "import lora_tuner; print(lora_tuner.__file__)"]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    assert str(program.parents[1]) in subprocess.check_output(where, cwd=tmp_path, env=env, text=True)
    assert json.loads(run("doctor", "--json").stdout)["next"].startswith("lora-tuner train ")
    (tmp_path / "mine.csv").write_text("text\n" + "\n".join(tiny_models.reviews(80)))
    quick = "--max-steps 2 --max-length 64 --batch-size 2 --eval-rows 4"
    trained = run("train", "--base", "smollm2-135m", "--dataset", "mine.csv", *quick.split())
    assert "  lora-tuner generate --adapter mine\n" in trained.stderr
    assert "python cli.py" not in trained.stderr + trained.stdout
    first, second = run("demo"), run("demo")
    assert (first.stderr.count("$ lora-tuner train"), second.stderr.count("$ lora-tuner train")) == (1, 0)
    for done in (first, second):
        *_, shown = done.stdout.rpartition("(base)")
        assert shown.count("Acting") == 2
    gain = json.loads(run("adapters", "show", "imdb", "--json").stdout)["result"]["gain"]
    assert gain > 0


def test_version_ranges_match_tested_versions():
    """Version ranges begin at the tested versions, and the Pythons of the workflow are claimed."""
    from packaging.requirements import Requirement
    from packaging.version import Version

    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    pins = {name.lower().replace("_", "-"): Version(version) for name, version in pins.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = project["dependencies"] + [
        line for extra in project["optional-dependencies"].values() for line in extra
    ]
    for line in requirements:
        requirement = Requirement(line)
        tested = pins[requirement.name.lower().replace("_", "-")]
        (bound,) = requirement.specifier
        assert bound.operator == ">=", line
        lowest = Version(bound.version).release
        assert tested.release[: len(lowest)] == lowest, line
    pythons = [
        name.rpartition(":: ")[2]
        for name in project["classifiers"]
        if name.startswith("Programming Language :: Python")
    ]
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())
    assert pythons == workflow["jobs"]["linux"]["strategy"]["matrix"]["python"]
    assert project["requires-python"] == f">={pythons[0]}"


def test_docker_image_copies_what_exists():
    """The build copies files that are there and not ignored, installs extras that exist, and runs without rights."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    ignore = (ROOT / ".dockerignore").read_text().split()
    assert ignore[0] == "*"
    copied = {
        name for line in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE) for name in line.split()
    }
    assert copied == {name[1:] for name in ignore if name[0] == "!"}
    assert all((ROOT / name).exists() for name in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (extras,) = re.findall(r"/src\[(.*?)\]", text)
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    assert text.index("\nUSER ") < text.index("\nENTRYPOINT ")


def test_documented_docker_commands_parse():
    """What the image runs by itself, and what docs/serving.md tells it to run, are commands of `lora-tuner`."""
    import typer

    from lora_tuner.cli.app import app

    (default,) = re.findall(r"^CMD (\[.*\])$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    documented = re.findall(
        r"^docker run .* lora_tuner(?::cuda)?(?: (.*))?$", (ROOT / "docs/serving.md").read_text(), re.M
    )
    assert len(documented) == 3
    for arguments in [json.loads(default), *map(shlex.split, filter(None, documented))]:
        name, *options = arguments
        typer.main.get_command(app).commands[name].make_context(name, options)
