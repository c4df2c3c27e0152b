"""Check beforehand whether base and adapter can be exported as one model.

`adapters check` and the exports ask this, so they agree. It adds the tokenizer and the chat
template to the checks of `adapters/compatibility.py`, by running the code of the export without a
file. Never imports torch: without a tokenizer from transformers' AutoTokenizer, it reads the one
whose class tokenizer_config.json names.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..adapters import compatibility
from ..adapters.adapter import Adapter
from ..adapters.base_config import find_base_folder, text_settings
from ..adapters.compatibility import CompatibilityReport, Tool
from ..adapters.safetensors_header import read_json
from ..errors import AdapterError, BaseModelError, Notice, Progress, first_line
from ..models.base_files import LOCAL_FOLDER, BaseModelFiles, quiet_transformers

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase

WHOLE_MODELS = ("gguf-merged", "ollama")  # tools that get base and adapter as one model


def check_export(adapter: Adapter, tool: Tool) -> CompatibilityReport:
    """`check_compatibility`, and for a whole model its tokenizer and chat template too."""
    report = compatibility.check_compatibility(adapter, tool)
    if tool in WHOLE_MODELS:
        folder = find_base_folder(adapter)
        if report.base_examined and folder is not None:
            _check_tokenizer(adapter, folder, report)
        if report.accepted:
            option, out = ("--merged", ".gguf") if tool == "gguf-merged" else ("--to ollama", "-ollama")
            name = adapter.name
            report.notes.append(
                f"`python cli.py export {name} {option} --quantize q4_k_m --out {name}{out}` writes it"
            )
    return report


def _check_tokenizer(adapter: Adapter, folder: Path, report: CompatibilityReport) -> None:
    from ..models.tokenizer import TokenizedBase, load_adapter_tokenizer  # imports transformers

    files = BaseModelFiles(adapter.base, adapter.base, folder, None, LOCAL_FOLDER)
    try:
        with quiet_transformers():
            base = TokenizedBase(files, _read_tokenizer(folder))
            tokenizer = load_adapter_tokenizer(adapter, base, load=_read_tokenizer) or base.tokenizer
    except AdapterError as error:
        report.errors.append(_clause(error))
    except Exception as error:  # of the tokenizers library too, whose errors have no common type
        report.notes.append(
            f"the tokenizer of the base cannot be read without the model, so it was not checked: {first_line(error)}"
        )
    else:
        add_model_problems(adapter, files, tokenizer, report)


def require_exportable(
    adapter: Adapter, tool: Tool, files: BaseModelFiles, tokenizer: "PreTrainedTokenizerBase"
) -> None:
    """Raise AdapterError, with all reasons, if base and adapter cannot be exported as one model.

    Args:
        adapter: the adapter.
        tool: the tool.
        files: its base.
        tokenizer: the tokenizer of the merged model.
    """
    report = compatibility.check_compatibility(adapter, tool, base_config=files.config())
    add_model_problems(adapter, files, tokenizer, report)
    compatibility.raise_errors(adapter, report)


def add_model_problems(
    adapter: Adapter, files: BaseModelFiles, tokenizer: "PreTrainedTokenizerBase", report: CompatibilityReport
) -> None:
    """Add what a GGUF file cannot have of a tokenizer, and Ollama not of its chat template."""
    from .gguf_tokenizer import add_tokenizer, tokenizer_spec
    from .go_template import derive_chat_format

    def note(event: Notice | Progress) -> None:
        if isinstance(event, Notice):
            report.notes.append(event.text.rstrip("."))

    rows = adapter.replaced.vocab_size(text_settings(files.config()).get("vocab_size") or len(tokenizer))
    try:
        writer = cast("GGUFWriter", _NoFile())
        add_tokenizer(writer, tokenizer, tokenizer_spec(tokenizer, files.folder), rows, files.folder, note)
    except BaseModelError as error:
        report.errors.append(_clause(error))
    if report.tool == "ollama" and tokenizer.chat_template:
        try:
            derive_chat_format(tokenizer, adapter.name, note)
        except AdapterError as error:
            report.errors.append(_clause(error))


class _NoFile:
    """A writer that writes nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *values: None


def _clause(error: Exception) -> str:
    """The message of an error, as a part of a longer one."""
    return str(error).rstrip(".")


def _read_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a folder, of the class that it names, as AutoTokenizer in transformers 5
    chooses it but for model types with a class of their own."""
    import transformers

    settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    name = str(settings.get("tokenizer_class") if isinstance(settings, dict) else "").removesuffix("Fast")
    backend = transformers.PreTrainedTokenizerFast
    named = getattr(transformers, name, backend) if name.endswith("Tokenizer") else backend
    if name == "LlamaTokenizer" and '"ByteLevel"' in _read_text(folder / "tokenizer.json"):
        named = backend
    tokenizer: PreTrainedTokenizerBase = named.from_pretrained(folder, trust_remote_code=False)
    return tokenizer


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""
