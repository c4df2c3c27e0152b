"""Execute docs/notebook.ipynb in an empty folder: `make notebook` stores its outputs. Takes some minutes."""

import os
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

PAGE = Path(__file__).parents[1] / "docs" / "notebook.ipynb"
SETTINGS = "parameters"  # tag of the cell with the sizes of the runs


def execute(folder: Path, settings: str | None = None) -> nbformat.NotebookNode:
    """Run all cells in a folder and return the notebook with their outputs.

    Args:
        settings: source in place of the cell of settings.

    Raises:
        CellExecutionError: a cell has failed.
    """
    notebook = nbformat.read(PAGE, as_version=nbformat.NO_CONVERT)
    for cell in notebook.cells:
        if settings is not None and SETTINGS in cell.metadata.get("tags", []):
            cell.source = settings
    NotebookClient(
        notebook,
        timeout=1800,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    ).execute()
    notebook.metadata.language_info = {"name": "python"}  # without the version of this machine
    return notebook


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.environ["IPYTHONDIR"] = f"{folder}/ipython"
        nbformat.write(execute(Path(folder)), PAGE)
