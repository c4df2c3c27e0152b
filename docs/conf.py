"""Site of this project, built by Sphinx from the Markdown that is read on GitHub too: `make docs`.

The pages stay where they are, so the folder of sources is that of the repository. Added here is
only what a site needs beside them: contents, a start page, and fields of records in the API.
"""

import dataclasses
import inspect
import re
import shutil

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from sphinx.application import Sphinx
from sphinx.ext.napoleon import Config, GoogleDocstring
from sphinx.pycode import ModuleAnalyzer

import lora_tuner

CONTENTS = {  # caption in the margin -> its pages
    "Use": ["docs/tour", "recipes/README", "docs/chat", "docs/objectives", "docs/measuring", "docs/serving"],
    "Reference": ["docs/commands", "docs/api", "docs/methods", "docs/models", "docs/other-tools"],
    "Cost": ["docs/growth", "docs/scale", "benchmarks/RESULTS"],
    "Trust": ["docs/reliability", "SECURITY", "docs/upstream-issues"],
    "Project": ["ARCHITECTURE", "CONTRIBUTING", "CHANGELOG"],
}

project = html_title = "lora_tuner"
version = release = lora_tuner.__version__
root_doc = "README"
include_patterns = ["*.md", "docs/*.md", "benchmarks/*.md", "recipes/*.md"]
exclude_patterns = [".*", "adapters", "build", "dist", "lora_tuner", "merged", "runs", "tests"]
extensions = ["myst_parser", "sphinx.ext.autodoc"]

myst_heading_anchors = 4  # links to headings, as on GitHub
myst_enable_extensions = ["html_image"]
myst_url_schemes = ["https", "http"]  # all else is a file or a heading here
highlight_language = "none"
default_role = "py:obj"  # of `names` in docstrings
suppress_warnings = ["ref.python"]  # records have fields named `bytes`, as the type
smartquotes = False  # `--option` is no dash

autodoc_default_options = {
    "members": True,
    "undoc-members": True,
    "exclude-members": "model_config",
    "member-order": "bysource",
}
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 90

html_theme = "furo"
html_copy_source = False
html_show_copyright = html_show_sphinx = False

_ARGUMENT = re.compile(r"^    (\w+): (.+(?:\n {8}.+)*)", re.MULTILINE)


def is_record(value: object) -> bool:
    """Return whether a value is a class of fields, which are listed one by one."""
    return inspect.isclass(value) and (dataclasses.is_dataclass(value) or issubclass(value, BaseModel))


def describe_setting(field: FieldInfo) -> str:
    """Return description and default of a field of pydantic, without markup."""
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    default = extra.get("shown") or field.default
    text = field.description or ""
    if text and default is not False and default not in (None, [], {}):
        text += f" Default: {default}."
    return re.sub(r"([\\*|]|_\b)", r"\\\1", text)


def field_texts(record: type) -> dict[str, str]:
    """Return what is known of each field: pydantic's description, or that in `Args`."""
    if issubclass(record, BaseModel):
        return {name: describe_setting(field) for name, field in record.model_fields.items()}
    return dict(_ARGUMENT.findall(inspect.getdoc(record) or ""))


def add_contents(app: Sphinx, page: str, source: list[str]) -> None:
    """Add the contents of the margin to the start page, where GitHub would show them as code."""
    if page == root_doc:
        for caption, pages in CONTENTS.items():
            source[0] += "\n".join(["\n```{toctree}", f":caption: {caption}", ":hidden:", *pages, "```\n"])


def comment_fields(app: Sphinx) -> None:
    """Let autodoc take the text of a field for a comment at it: it shows no other."""
    for record in filter(is_record, (getattr(lora_tuner, name) for name in lora_tuner.__all__)):
        analyzer = ModuleAnalyzer.for_module(record.__module__)
        analyzer.analyze()
        for name, text in field_texts(record).items():
            if text:
                analyzer.attr_docs[record.__name__, name] = [*text.split("\n"), ""]


def omit_signature(app: Sphinx, what: str, name: str, value: object, *_: object) -> tuple[str, None] | None:
    """Leave out the arguments of a record, which are its fields."""
    return ("", None) if is_record(value) else None


def read_docstring(app: Sphinx, what: str, name: str, value: object, options: object, lines: list[str]) -> None:
    """Read Args, Returns and Raises; those of a record are its fields. Of a property all is text."""
    if is_record(value) and "Args:" in lines:
        start = lines.index("Args:")
        end = next((n for n in range(start + 1, len(lines)) if re.match(r"\S", lines[n])), len(lines))
        del lines[start:end]
    if what not in ("attribute", "property"):
        lines[:] = GoogleDocstring(lines, Config(), app, what, name, value, options).lines()


def add_index(app: Sphinx, error: Exception | None) -> None:
    """Give the start page the name that servers look for."""
    if error is None and app.builder.name == "html":
        shutil.copyfile(app.outdir / f"{root_doc}.html", app.outdir / "index.html")


def setup(app: Sphinx) -> None:
    app.connect("builder-inited", comment_fields)
    app.connect("source-read", add_contents)
    app.connect("autodoc-process-signature", omit_signature)
    app.connect("autodoc-process-docstring", read_docstring)
    app.connect("build-finished", add_index)
