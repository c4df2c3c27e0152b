import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_a_wheel_gives_the_command_and_the_types(tmp_path):
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("lora_tuner-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "lora_tuner/py.typed" in names
    assert not [name for name in names if name.startswith(("tests", "adapters", "cli.py"))]
    subprocess.run([*pip, "install", "--no-deps", "--target", tmp_path / "site", wheel], check=True)
    env = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    script = [sys.executable, tmp_path / "site" / "bin" / "lora-tuner"]
    done = subprocess.run([*script, "--version"], env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert done.stdout == f"lora_tuner {version}\n"


def test_what_is_claimed_was_tested():
    """Ranges begin at the versions that the tests run with, and Python is the one that they run on."""
    from packaging.requirements import Requirement
    from packaging.version import Version

    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    pins = {name.lower().replace("_", "-"): Version(version) for name, version in pins.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [line for extra in project["optional-dependencies"].values() for line in extra]
    for line in wanted:
        requirement = Requirement(line)
        tested = pins[requirement.name.lower().replace("_", "-")]
        (bound,) = requirement.specifier
        assert bound.operator == ">=", line
        least = Version(bound.version).release
        assert tested.release[: len(least)] == least, line
    pythons = [
        it.rpartition(":: ")[2] for it in project["classifiers"] if it.startswith("Programming Language :: Python")
    ]
    assert pythons == ["3.11"]
    assert project["requires-python"] == ">=3.11"
