"""The notebook in docs: executed in order without errors, free of machine paths, and runs anew."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lora_tuner

from .hub_server import Hub
from .test_hub import repos  # noqa: F401 - a fixture

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "notebook.ipynb"
CELLS: list[dict[str, Any]] = json.loads(PAGE.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
SETTINGS = "STEPS, MAX_LENGTH, EVAL_ROWS = 4, 64, 4"


def texts(cell) -> Iterator[str]:
    """Texts of the outputs of a cell; pictures are left out."""
    for output in cell["outputs"]:
        yield "".join(output.get("text", []))
        for kind, content in output.get("data", {}).items():
            if not kind.startswith("image/"):
                yield "".join(content)


def test_stored_notebook_is_executed():
    assert [cell["execution_count"] for cell in CODE] == [*range(1, len(CODE) + 1)]
    for cell in CODE:
        for output in cell["outputs"]:
            assert output["output_type"] != "error"
            assert output.get("name") != "stderr", output["text"]
    assert PAGE.stat().st_size < 500_000


def test_stored_outputs_are_plain():
    """Without paths of the machine, bars, colours and their control characters."""
    for text in (text for cell in CODE for text in texts(cell)):
        assert not re.search(r"(?<![\w.])(/(home|root|tmp|work|usr|Users|var)/|[A-Z]:\\)", text), text
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]|\d%\|", text), text
        assert str(Path.home()) not in text


def test_stored_outputs_show_results():
    kinds = [{kind for output in cell["outputs"] for kind in output.get("data", {})} for cell in CODE]
    assert sum("text/html" in each for each in kinds) >= 7
    assert sum("image/png" in each for each in kinds) == 3
    html = "".join(text for cell in CODE for text in texts(cell))
    for shown in ("seconds per step", "Held-out loss", "gain over", "recommended: ", "(base)"):
        assert shown in html, shown


def test_notebook_uses_public_names():
    """tests/test_types.py checks the rest of the code."""
    trees = [ast.parse("".join(cell["source"])) for cell in CODE]
    imports = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules = {node.module: {alias.name for alias in node.names} for node in imports}
    assert modules.keys() == {"pathlib", "IPython.display", "lora_tuner"}
    assert modules["lora_tuner"] <= {*lora_tuner.__all__}


@pytest.mark.slow
@pytest.mark.parametrize("base", ["hub", pytest.param("embedded", marks=pytest.mark.real)])
def test_notebook_runs(repos, tmp_path, monkeypatch, base):  # noqa: F811
    """With the defaults from a Hub, and with the embedded base and reviews where there is none."""
    notebook = pytest.importorskip("tests.notebook", reason="nbclient and ipykernel are in the extra dev")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with Hub(repos) as hub:
        if base == "hub":
            monkeypatch.delenv("HF_HUB_OFFLINE")
            for name, value in hub.env(tmp_path / "home").items():
                monkeypatch.setenv(name, value)
        executed = notebook.execute(tmp_path, SETTINGS)
    code = [cell for cell in executed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(CODE) + 1)]
    errors = "".join(output.text for cell in code for output in cell.outputs if output.get("name") == "stderr")
    assert re.sub(r"Fetching \d+ files: .*\n", "", errors) == ""  # the bars of a download from the Hub
    for cell, stored in zip(code, CODE, strict=True):
        assert [output.output_type for output in cell.outputs if output.output_type != "stream"] == [
            output["output_type"] for output in stored["outputs"] if output["output_type"] != "stream"
        ]
    assert lora_tuner.Library(tmp_path / "adapters").names() == ["both", "pan", "praise", "ranks-r16", "ranks-r2"]
