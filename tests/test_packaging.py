import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_wheel_has_command_and_types(tmp_path):
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("lora_tuner-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"lora_tuner/py.typed", "lora_tuner/models/native.c", "lora_tuner/data/general_text.jsonl"} <= set(
        names
    )
    assert not [name for name in names if name.startswith(("tests", "adapters", "cli.py"))]
    subprocess.run([*pip, "install", "--no-deps", "--target", tmp_path / "site", wheel], check=True)
    env = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    script = [sys.executable, tmp_path / "site" / "bin" / "lora-tuner"]
    done = subprocess.run(
        [*script, "--version"], env=env, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert done.stdout == f"lora_tuner {version}\n"


def test_version_ranges_match_tested_versions():
    """Version ranges begin at the tested versions, and only the tested Python is claimed."""
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
    assert pythons == ["3.11"]
    assert project["requires-python"] == ">=3.11"


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
