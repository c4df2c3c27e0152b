"""Export a whole model, base and adapter or a base alone, as one GGUF file, quantized on request.

The merge is compared with base and adapter, the unquantized file in llama.cpp with the merged model
in transformers, and the quantized file with the unquantized one, all on held-out rows. Costs disk
space for two copies in float32 while it runs.
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .. import atomic_io
from ..adapters import compatibility
from ..adapters.adapter import Adapter
from ..adapters.compatibility import Tool
from ..adapters.gains import HeldOutLoss, paired_gain
from ..adapters.manifest import EvalResult
from ..config import ModelOptions
from ..data.chat import CHAT_MARK
from ..data.chat_template import turn_end_ids
from ..data.eval_sets import EvalSet
from ..data.tokenization import TokenIds
from ..errors import AdapterError, ConfigError, EventHandler, Notice, ignore_events
from ..models import loading, lora
from ..models.base_files import BaseModelFiles, quiet_transformers
from ..models.stored_weights import read_stored_tensors, weight_files
from ..models.tokenizer import TokenizedBase, load_adapter_tokenizer, load_tokenizer
from . import model_check, verify
from .common import (
    check_keeps_base,
    check_output_path,
    distinct_eval_sets,
    encode_eval_sets,
    is_gguf,
    open_shared_base,
)
from .gguf_model import write_model_gguf
from .llama_runtime import LlamaModel, load_library
from .merge import merge
from .quantize_gguf import Quantization, quantize


@dataclass(frozen=True)
class ModelExport:
    """An exported model.

    Args:
        path: the GGUF file.
        bytes: its size.
        precision: dtype or quantization of its matrices.
        result: held-out loss in llama.cpp of the unquantized model, `base_loss`, and of the file,
            `loss`; None without held-out rows.
        other_texts: number of texts that llama.cpp reads as other tokens than this tool.
    """

    path: Path
    bytes: int
    precision: str
    result: EvalResult | None
    other_texts: int


@dataclass(frozen=True)
class SourceModel:
    """A model folder in float32, with the outputs that its GGUF file must have.

    Args:
        folder: the model folder.
        name: name of the model.
        tokenizer: its tokenizer, with the chat template that counts.
        rows: encoded rows.
        losses: loss of the model on them.
        texts: the held-out texts; without any, the rows are probe sequences.
    """

    folder: Path
    name: str
    tokenizer: PreTrainedTokenizerBase
    rows: list[TokenIds]
    losses: HeldOutLoss
    texts: list[str]

    def end_ids(self) -> list[int]:
        """Token ids that end an answer or a text."""
        return sorted(turn_end_ids(self.tokenizer) | {int(self.tokenizer.eos_token_id)})


def export_model(
    adapter: Adapter | None,
    out: Path,
    *,
    quantization: Quantization | None = None,
    dtype: str = "float16",
    sets: Sequence[EvalSet] | None = None,
    eval_rows: int | None = 50,
    overwrite: bool = False,
    options: ModelOptions = ModelOptions(),
) -> ModelExport:
    """Write base and adapter as one GGUF file with tokenizer, chat template and end tokens.

    Args:
        adapter: the adapter; None exports the base of `options` alone.
        out: the file to write.
        quantization: quantize to this type, in place of `dtype`.
        dtype: dtype of the matrices: float32, float16 or bfloat16.
        sets: held-out sets for the comparison; None means those of the adapter.
        eval_rows: largest number of rows per set.
        overwrite: replace an existing GGUF file.
        options: the base model; the device is always the CPU.

    Raises:
        AdapterError: the file exists; the adapter does not fit the base; the outputs differ.
        BaseModelError: llama.cpp does not compute such a model.
        ConfigError: an option is invalid, or llama.cpp's library is missing.
    """
    check_output_path(out, "GGUF file", valid=is_gguf(out), overwrite=overwrite)
    tool: Tool = "gguf-merged"
    with prepare_model(adapter, out, tool, sets=sets, eval_rows=eval_rows, options=options) as source:
        return write_verified(source, out, quantization, dtype, options.notify)


@contextmanager
def prepare_model(
    adapter: Adapter | None,
    out: Path,
    tool: Tool,
    *,
    sets: Sequence[EvalSet] | None,
    eval_rows: int | None,
    options: ModelOptions,
) -> Iterator[SourceModel]:
    """Yield the merged model, or the base alone, as a model folder in a temporary folder beside
    `out`. What the tool would refuse is refused before anything is merged."""
    options.require_default("device", "dtype", "load_in", why="the model is exported on the CPU, from float32")
    if adapter is None and options.base is None:
        raise ConfigError("Name an adapter, or a base with --base.")
    if adapter is not None and options.base is None:  # before anything is downloaded
        compatibility.require_compatible(adapter, tool)
    load_library()
    files = loading.base_for_adapter(adapter, options)
    check_keeps_base(out, files, [adapter] if adapter else [])
    if adapter is not None:
        _require_exportable(adapter, tool, files, replace(options, notify=ignore_events))
    with atomic_io.temporary_folder(out.parent) as work:
        if adapter is None:
            yield _base_alone(sets or [], out, options)
            return
        merged = merge(
            adapter, work / adapter.name, shard_size="100GB", sets=sets, eval_rows=eval_rows, options=options
        )
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(merged.path, trust_remote_code=False)
        yield SourceModel(
            merged.path,
            adapter.name,
            tokenizer,
            merged.rows,
            merged.row_losses,
            [text for eval_set in merged.sets for text in eval_set.texts],
        )


def _require_exportable(adapter: Adapter, tool: Tool, files: BaseModelFiles, options: ModelOptions) -> None:
    base = TokenizedBase(files, load_tokenizer(files))
    lora.check_base(adapter, base, options)
    tokenizer = load_adapter_tokenizer(adapter, base, options) or base.tokenizer
    model_check.require_exportable(adapter, tool, files, tokenizer)


def _base_alone(sets: Sequence[EvalSet], out: Path, options: ModelOptions) -> SourceModel:
    base = open_shared_base([], replace(options, device="cpu"), out, is_adapter=False)
    sets = distinct_eval_sets([], sets, None, options.notify)
    rows = encode_eval_sets(base, sets)
    outputs = verify.forward_outputs(base.model, rows, options.notify, "running the base")
    name = base.files.name.rstrip("/").rpartition("/")[2]
    texts = [text for eval_set in sets for text in eval_set.texts]
    return SourceModel(base.files.folder, name, base.tokenizer, rows, outputs.losses, texts)


def write_verified(
    source: SourceModel, out: Path, quantization: Quantization | None, dtype: str, notify: EventHandler
) -> ModelExport:
    """Write the GGUF file, and compare it with the model in llama.cpp.

    Raises AdapterError if there is no space for it, if the unquantized file computes something else than transformers, or does
    not end at an end token of the model.
    """
    precision = quantization or dtype
    check_space(source, out, 4 if precision == "float32" else 6)
    context = max(len(row) for row in source.rows)
    with atomic_io.temporary_folder(out.parent) as work:
        exact = work / f"{out.stem}.gguf"
        write_model_gguf(source.folder, exact, "float32", name=source.name, notify=notify)
        with LlamaModel(exact, context) as model:
            exact_losses = model.loss(source.rows, notify, "running the unquantized file")
            other_texts = compare_tokens(model, source, notify)
            check_ends(model, source)
        check_loss(out, source, exact_losses)
        losses = exact_losses
        if quantization is not None:
            quantize(exact, work / "written.gguf", quantization, notify)
        elif dtype != "float32":
            write_model_gguf(source.folder, work / "written.gguf", dtype, name=source.name)
        written = exact if precision == "float32" else work / "written.gguf"
        if written != exact:
            with LlamaModel(written, context) as model:
                losses = model.loss(source.rows, notify, f"running the {precision} file")
        os.replace(written, out)
        atomic_io.fsync_path(out.parent)
    result = paired_gain(exact_losses, losses) if source.texts else None
    return ModelExport(out, out.stat().st_size, precision, result, other_texts)


def check_space(source: SourceModel, out: Path, bytes_per_weight: int) -> None:
    """Raise AdapterError without space for so many bytes for each weight of the model."""
    shapes = read_stored_tensors(weight_files(source.folder)).shapes.values()
    needed = bytes_per_weight * sum(map(math.prod, shapes))
    if (free := atomic_io.free_space(out.parent)) < needed:
        raise AdapterError(
            f"{out} needs {needed / 1e9:.1f} GB while it is written, and {free / 1e9:.1f} GB are free: free some space, "
            "or choose another --out."
        )


def check_loss(out: Path, source: SourceModel, losses: HeldOutLoss) -> None:
    """Raise AdapterError if a file computes another loss than the model in transformers."""
    if not abs(losses.loss - source.losses.loss) <= verify.LOSS_TOLERANCE:  # NaN fails too
        raise AdapterError(
            f"{out} is not kept: llama.cpp computes a loss of {losses.loss:.3f} with it, and "
            f"transformers {source.losses.loss:.3f}."
        )


def check_ends(model: LlamaModel, source: SourceModel) -> None:
    """Raise AdapterError if llama.cpp would not stop at a token that ends an answer."""
    for number in source.end_ids():
        if not model.is_end(number):
            token = source.tokenizer.convert_ids_to_tokens(number)
            raise AdapterError(f"{source.name} is not exported: llama.cpp would not stop at {token}.")


def compare_tokens(model: LlamaModel, source: SourceModel, notify: EventHandler) -> int:
    """Number of texts that llama.cpp reads as other tokens; a notice says so."""
    texts = [text for text in source.texts if not text.startswith(CHAT_MARK)]
    other = [text for text in texts if model.tokenize(text) != source.tokenizer(text)["input_ids"]]
    if other:
        notify(
            Notice(
                f"llama.cpp reads {len(other)} of {len(texts)} held-out texts as other tokens "
                f"than this tool, such as {other[0][:60]!r}."
            )
        )
    return len(other)
