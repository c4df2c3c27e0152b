"""Types of the public API as a user's programs see them: outside of the repository, by py.typed."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lora_tuner

from .test_notebook import CODE

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "tests" / "typed_program.py"
# In the program no expression has the type Any; the notebook calls IPython, which is not typed.
MYPY = """[mypy]
strict = True
[mypy-program]
disallow_any_expr = True
[mypy-notebook]
disallow_untyped_calls = False
"""
PYRIGHT = {"typeCheckingMode": "strict"}


def test_program_uses_every_public_name():
    used = {node.id for node in ast.walk(ast.parse(PROGRAM.read_text())) if isinstance(node, ast.Name)}
    assert {*lora_tuner.__all__} <= used


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Programs outside of the repository, with the package as installed: found on the path, with py.typed."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    shutil.copy(PROGRAM, tmp_path / "program.py")
    (example,) = re.findall(
        r"```python\n(from lora_tuner .*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )
    (tmp_path / "readme.py").write_text(
        example.replace("print(adapter.manifest.result.gain)", "print(adapter.name)")
    )
    cells = "\n".join("".join(cell["source"]) for cell in CODE)
    (tmp_path / "notebook.py").write_text(f"# pyright: basic, reportUnusedExpression=false\n{cells}\n")
    (tmp_path / "mypy.ini").write_text(MYPY)
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(PYRIGHT))
    return tmp_path


def call(folder, *command):
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.mark.slow
def test_mypy_accepts_programs(programs):
    done = call(programs, sys.executable, "-m", "mypy", "program.py", "readme.py", "notebook.py")
    assert done.stdout == "Success: no issues found in 3 source files\n", done.stdout + done.stderr


@pytest.fixture
def pyright(programs):
    """Run pyright, which is installed from npm when it runs for the first time."""
    command = (sys.executable, "-m", "pyright", "--pythonpath", sys.executable)
    try:
        version = call(programs, *command, "--version")
    except OSError as error:
        pytest.skip(f"pyright cannot run: {error}")
    if version.returncode:
        pytest.skip(
            f"pyright cannot be had: {(version.stderr.strip() or version.stdout.strip()).splitlines()[-1]}"
        )
    return lambda *arguments: call(programs, *command, *arguments)


@pytest.mark.slow
def test_pyright_accepts_programs(pyright):
    done = pyright()
    assert done.stdout.splitlines()[-1].startswith("0 errors"), done.stdout + done.stderr


@pytest.mark.slow
def test_public_types_are_known(pyright):
    """All of what `import lora_tuner` offers, but for types of transformers, which pyright finds unknown here."""
    report = json.loads(pyright("--verifytypes", "lora_tuner", "--ignoreexternal", "--outputjson").stdout)
    completeness = report["typeCompleteness"]
    homes = [f"lora_tuner.{home}.{name}" for name, home in lora_tuner._HOMES.items()]
    found, unknown = set[str](), list[str]()
    for symbol in completeness["symbols"]:
        home = next((home for home in homes if f"{symbol['name']}.".startswith(f"{home}.")), None)
        if home is not None:
            found.add(home)
            if not symbol["isTypeKnown"] or symbol["isTypeAmbiguous"]:
                unknown.append(symbol["name"])
    generator = lora_tuner.Generator.__module__ + ".Generator"
    external = {generator, "lora_tuner.inference.classification.classify"}  # takes one
    external |= {
        f"{generator}.{name}" for name in ("base", "engine", "encode_prompt", "get_loaded", "tokenizer_of")
    }
    assert found == {*homes}
    assert {*unknown} <= external
