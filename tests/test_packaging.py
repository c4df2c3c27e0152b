import os
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
