"""Export a model for Ollama: a folder with GGUF files and a Modelfile.

The Modelfile has the chat template as a Go template, the texts that end an answer, the sampling
parameters of generation_config.json and the context length. Its syntax is that of ollama/ollama,
parser/parser.go, August 2026: quotation marks are taken off, nothing is unescaped, and characters
that are not printable are dropped.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from .. import atomic_io
from ..adapters.adapter import Adapter
from ..adapters.compatibility_gguf import two_file_errors
from ..adapters.gains import paired_gain
from ..config import ModelOptions
from ..data.chat_template import turn_end_ids
from ..data.eval_sets import EvalSet
from ..errors import AdapterError, ConfigError, EventHandler, Notice
from ..models import loading
from ..models.base_files import link_or_copy
from ..models.tokenizer import load_adapter_tokenizer
from . import verify
from .common import check_output_path, distinct_eval_sets, encode_eval_sets, open_shared_base
from .export_gguf import stop_instruction, to_gguf
from .export_model import (
    ModelExport,
    SourceModel,
    check_ends,
    check_loss,
    check_space,
    compare_tokens,
    prepare_model,
    write_verified,
)
from .gguf_model import write_model_gguf
from .gguf_tokenizer import generation_ends
from .go_template import PLAIN, ChatFormat, derive_chat_format, example_conversations
from .llama_runtime import LlamaModel, load_library
from .quantize_gguf import Quantization

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODELFILE = "Modelfile"
_MAX_CONTEXT = 8192  # a KV cache for the whole context of large models would fill the memory
# Keys of generation_config.json -> parameters of Ollama (docs/modelfile.mdx).
_PARAMETERS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}


@dataclass(frozen=True)
class OllamaExport:
    """The exported folder.

    Args:
        path: the folder.
        model: the GGUF file in it, with its held-out loss.
        template: the Go template.
        stops: texts that end an answer.
        parameters: parameters of the Modelfile.
    """

    path: Path
    model: ModelExport
    template: str
    stops: list[str]
    parameters: dict[str, float]


def export_ollama(
    adapter: Adapter | None,
    out: Path,
    *,
    merged: bool = True,
    quantization: Quantization | None = None,
    dtype: str = "float16",
    sets: Sequence[EvalSet] | None = None,
    eval_rows: int | None = 50,
    overwrite: bool = False,
    options: ModelOptions = ModelOptions(),
) -> OllamaExport:
    """Write a folder from which `ollama create` makes a model: GGUF files and a Modelfile.

    The arguments and errors are those of `export_model`, and these.

    Args:
        merged: write base and adapter as one model; otherwise as two files, which Ollama takes up to
            version 0.34.0.

    Raises:
        AdapterError: the folder exists; the chat template cannot be written as a Go template.
        ConfigError: a quantization is given for two files.
    """
    valid = (out / MODELFILE).is_file()
    check_output_path(out, "folder with a Modelfile", valid=valid, overwrite=overwrite)
    if merged or adapter is None:
        prepared = prepare_model(adapter, out, "ollama", sets=sets, eval_rows=eval_rows, options=options)
    elif quantization is not None:
        raise ConfigError("quantization is only for a whole model: leave it out, or merge the adapter.")
    else:
        prepared = _prepare_base(adapter, out, sets=sets, eval_rows=eval_rows, options=options)
    with prepared as source:
        chat_format = None
        if source.tokenizer.chat_template:
            chat_format = derive_chat_format(source.tokenizer, source.name, options.notify)
        with atomic_io.atomic_folder(out, overwrite=overwrite) as folder:
            if merged or adapter is None:
                path, sources = folder / "model.gguf", ["FROM ./model.gguf"]
                written = write_verified(source, path, quantization, dtype, options.notify)
            else:
                path, sources = folder / "base.gguf", ["FROM ./base.gguf", "ADAPTER ./adapter.gguf"]
                written = _write_base_and_adapter(source, adapter, path, dtype, options)
            modelfile = _Modelfile(source, chat_format, path, options.notify)
            _prepare_prompts(path, source, chat_format, options.notify)
            (folder / MODELFILE).write_text(modelfile.text(sources), encoding="utf-8")
    model = replace(written, path=out / path.name)
    return OllamaExport(out, model, modelfile.template, modelfile.stops, modelfile.parameters)


@contextmanager
def _prepare_base(
    adapter: Adapter,
    out: Path,
    *,
    sets: Sequence[EvalSet] | None,
    eval_rows: int | None,
    options: ModelOptions,
) -> Iterator[SourceModel]:
    """Yield the base with the adapter's tokenizer, and the losses of base and adapter."""
    options.require_default("device", "dtype", "load_in", why="the model is exported on the CPU, from float32")
    load_library()
    options.notify(
        Notice(
            "Ollama takes adapters up to version 0.34.0, and refuses a Modelfile with ADAPTER "
            "since (ollama/ollama#14969): without --no-merged, all versions take the result."
        )
    )
    config = loading.base_for_adapter(adapter, options).config()
    if errors := two_file_errors(adapter, adapter.name, config):
        raise AdapterError(f"{adapter.path}: {'; '.join(errors)}.")
    source, own_tokenizer = _measure_base_and_adapter(adapter, out, sets, eval_rows, options)
    with atomic_io.temporary_folder(out.parent) as work:
        if own_tokenizer is not None:
            folder = work / "base"
            folder.mkdir()
            for file in [*source.folder.glob("*config.json"), *source.folder.glob("*.safetensors*")]:
                if not file.name.startswith("tokenizer"):
                    link_or_copy(file, folder / file.name)
            own_tokenizer.save_pretrained(folder)
            source = replace(source, folder=folder)
        yield source


def _measure_base_and_adapter(
    adapter: Adapter, out: Path, sets: Sequence[EvalSet] | None, eval_rows: int | None, options: ModelOptions
) -> "tuple[SourceModel, PreTrainedTokenizerBase | None]":
    """The base, with the losses of base and adapter, and the adapter's own tokenizer, if it has one."""
    base = open_shared_base([adapter], replace(options, device="cpu"), out, is_adapter=False)
    own_tokenizer = load_adapter_tokenizer(adapter, base, options)
    tokenizer = own_tokenizer or base.tokenizer
    sets = distinct_eval_sets([adapter], sets, eval_rows, options.notify)
    rows = encode_eval_sets(replace(base, tokenizer=tokenizer), sets)
    losses = verify.forward_with_adapter(base, adapter, rows, options.notify).losses
    texts = [text for eval_set in sets for text in eval_set.texts]
    return SourceModel(base.files.folder, adapter.name, tokenizer, rows, losses, texts), own_tokenizer


def _write_base_and_adapter(
    source: SourceModel, adapter: Adapter, path: Path, dtype: str, options: ModelOptions
) -> ModelExport:
    """Write both, and compare them in llama.cpp with base and adapter in transformers.

    Raises AdapterError if there is no space for them, or if their loss differs.
    """
    check_space(source, path, 4 if dtype == "float32" else 2)
    adapter_path = path.with_name("adapter.gguf")
    to_gguf(adapter, adapter_path, dtype=dtype, options=options)
    write_model_gguf(source.folder, path, dtype, notify=options.notify)
    with LlamaModel(path, max(len(row) for row in source.rows), adapter_path) as model:
        losses = model.loss(source.rows, options.notify, "running the files")
        other_texts = compare_tokens(model, source, options.notify)
        check_ends(model, source)
    check_loss(path, source, losses)
    result = paired_gain(source.losses, losses) if source.texts else None
    size = path.stat().st_size + adapter_path.stat().st_size
    return ModelExport(path, size, dtype, result, other_texts)


class _Modelfile:
    """The parts of a Modelfile."""

    def __init__(
        self, source: SourceModel, chat_format: ChatFormat | None, path: Path, notify: EventHandler
    ) -> None:
        path_of_settings = source.folder / "generation_config.json"
        settings = json.loads(path_of_settings.read_text("utf-8")) if path_of_settings.is_file() else {}
        self.template = chat_format.go_template() if chat_format else PLAIN
        self.parameters: dict[str, float] = {"num_ctx": min(_MAX_CONTEXT, _context_length(path))}
        for key, name in _PARAMETERS.items():
            if isinstance(value := settings.get(key), int | float):
                self.parameters[name] = value
        if settings.get("do_sample") is False:
            self.parameters["temperature"] = 0
        self.stops = _stops(source, chat_format, notify)

    def text(self, sources: list[str]) -> str:
        lines = [*sources, f'TEMPLATE """{self.template}"""']
        lines += [f"PARAMETER {name} {value}" for name, value in self.parameters.items()]
        lines += map(stop_instruction, self.stops)
        return "\n".join(lines) + "\n"


def _context_length(path: Path) -> int:
    import gguf

    fields = gguf.GGUFReader(path).fields
    return int(fields[f"{fields['general.architecture'].contents()}.context_length"].contents())


def _stops(source: SourceModel, chat_format: ChatFormat | None, notify: EventHandler) -> list[str]:
    """Texts that end an answer: the end tokens, and where an answer ends with none, the first line
    before the next user message."""
    ends = source.end_ids()
    others = [number for number in generation_ends(source.folder) if number not in ends]
    texts, other_texts = ([str(source.tokenizer.decode([end])) for end in ids] for ids in (ends, others))
    stops = [*texts, *other_texts]
    if chat_format and not turn_end_ids(source.tokenizer):
        stops += chat_format.before_user[False, False, True][0].strip().splitlines()[:1]
    stops = [stop for stop in dict.fromkeys(stops) if stop.isprintable() and stop.strip() and '"""' not in stop]
    for text in other_texts:  # llama.cpp stops at the ends of the tokenizer without a text
        if text not in stops:
            notify(Notice(f"Text does not end at {text!r} in Ollama: a Modelfile cannot hold it as a stop."))
    return stops


def _prepare_prompts(
    path: Path, source: SourceModel, chat_format: ChatFormat | None, notify: EventHandler
) -> None:
    """Let llama.cpp begin prompts as the chat template does, and compare their tokens.

    Ollama has every prompt rendered by the template, and llama.cpp puts the beginning-of-text token
    before it if the file says so.
    """
    import gguf

    if chat_format is None:
        return
    reader = gguf.GGUFReader(path, "r+")
    field = reader.fields.get("tokenizer.ggml.add_bos_token")
    if field is not None:
        field.parts[field.data[0]][0] = chat_format.adds_bos
    reader.data.flush()
    del reader, field
    bos = source.tokenizer.bos_token if chat_format.adds_bos else ""
    with LlamaModel(path, 256) as model:
        for messages in example_conversations(takes_system=True):
            prompt = chat_format.render(messages)
            expected = source.tokenizer(f"{bos}{prompt}", add_special_tokens=False)["input_ids"]
            if model.tokenize(prompt) != expected:
                notify(
                    Notice(f"llama.cpp reads conversations as other tokens than this tool, such as {prompt!r}.")
                )
                return
