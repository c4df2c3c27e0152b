"""llama.cpp in this process: quantizes tensors, tokenizes texts, and gives the loss of rows.

The library is that of the package xllamacpp. Its Python API is a server, which gives probabilities
of generated tokens only and quantizes nothing, but the extension module exports llama.cpp's C API
(llama.h and ggml.h, xllamacpp 2026.10). Of its large structs only the first fields are set, and the
library is asked for what it read; the rest keeps its defaults, whatever the version. Limit: on
Windows nothing is exported.
"""

import ctypes
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from ..adapters.gains import HeldOutLoss
from ..data import tokenization
from ..errors import AdapterError, ConfigError, EventHandler, Progress

INSTALL = "pip install 'lora_tuner[gguf]' or xllamacpp"
_CHUNK = 1 << 20  # values that a thread quantizes at a time
_ERROR = 4  # level of the log
_log: list[str] = []  # errors that llama.cpp reports


class _Params(ctypes.Structure):
    """Parameters of a model or a context, passed by value: larger than any version's struct."""

    _fields_ = (("first", ctypes.c_uint32 * 4), ("rest", ctypes.c_uint64 * 126))


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


def _keep_errors(level: int, text: bytes | None, _: int | None) -> None:
    if level == _ERROR and text:
        _log.append(" ".join(text.decode("utf-8", "replace").split()))


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(_keep_errors)


_I32, _I64, _PTR, _TEXT = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p, ctypes.c_char_p
# Function -> type of its result, types of its arguments.
_FUNCTIONS: dict[str, tuple[type | None, list[type]]] = {
    "ggml_quantize_chunk": (ctypes.c_size_t, [ctypes.c_int, _PTR, _PTR, _I64, _I64, _I64, _PTR]),
    "ggml_validate_row_data": (ctypes.c_bool, [ctypes.c_int, _PTR, ctypes.c_size_t]),
    "llama_log_set": (None, [_PTR, _PTR]),
    "llama_backend_init": (None, []),
    "llama_model_default_params": (_Params, []),
    "llama_model_load_from_file": (_PTR, [_TEXT, _Params]),
    "llama_model_get_vocab": (_PTR, [_PTR]),
    "llama_model_free": (None, [_PTR]),
    "llama_context_default_params": (_Params, []),
    "llama_init_from_model": (_PTR, [_PTR, _Params]),
    "llama_n_ctx": (ctypes.c_uint32, [_PTR]),
    "llama_n_batch": (ctypes.c_uint32, [_PTR]),
    "llama_set_n_threads": (None, [_PTR, _I32, _I32]),
    "llama_free": (None, [_PTR]),
    "llama_adapter_lora_init": (_PTR, [_PTR, _TEXT]),
    "llama_set_adapters_lora": (_I32, [_PTR, _PTR, ctypes.c_size_t, _PTR]),
    "llama_get_memory": (_PTR, [_PTR]),
    "llama_memory_clear": (None, [_PTR, ctypes.c_bool]),
    "llama_batch_init": (_Batch, [_I32, _I32, _I32]),
    "llama_batch_free": (None, [_Batch]),
    "llama_decode": (_I32, [_PTR, _Batch]),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), [_PTR]),
    "llama_vocab_n_tokens": (_I32, [_PTR]),
    "llama_vocab_is_eog": (ctypes.c_bool, [_PTR, _I32]),
    "llama_tokenize": (_I32, [_PTR, _TEXT, _I32, _PTR, _I32, ctypes.c_bool, ctypes.c_bool]),
}


@cache
def load_library() -> ctypes.CDLL:
    """llama.cpp's library.

    Raises ConfigError if it is not installed, or does not export the C API.
    """
    try:
        from xllamacpp import xllamacpp
    except ImportError as error:
        raise ConfigError(f"A whole model as GGUF needs llama.cpp's library: {INSTALL}.") from error
    library = ctypes.CDLL(xllamacpp.__file__)
    for name, (result, arguments) in _FUNCTIONS.items():
        try:
            function = getattr(library, name)
        except AttributeError as error:
            raise ConfigError(
                f"This build of xllamacpp does not export {name} of llama.cpp (builds for Windows "
                "export nothing): export on Linux or macOS, or install another version of it."
            ) from error
        function.restype, function.argtypes = result, arguments
    library.llama_backend_init()
    return library


def quantize_rows(values: NDArray[np.float32], kind: int, row_bytes: int) -> NDArray[np.uint8] | None:
    """Quantize a matrix; None if values are out of the range of the type.

    Args:
        values: (rows, columns).
        kind: llama.cpp's number of the type.
        row_bytes: bytes of a row in that type.

    Returns:
        (rows, row_bytes).
    """
    library = load_library()
    rows, columns = values.shape
    values = np.ascontiguousarray(values)
    quantized = np.empty((rows, row_bytes), np.uint8)
    source, target = values.ctypes.data, quantized.ctypes.data

    def quantize(first: int) -> bool:
        count = min(step, rows - first)
        library.ggml_quantize_chunk(kind, source, target, first * columns, count, columns, None)
        return bool(library.ggml_validate_row_data(kind, target + first * row_bytes, count * row_bytes))

    step = max(1, _CHUNK // columns)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # ctypes lets other threads run
        return quantized if all(pool.map(quantize, range(0, rows, step))) else None


class LlamaModel:
    """A GGUF model in llama.cpp, with at most one adapter, as its users run it: with a KV cache in
    float16.

    Args:
        path: the model.
        context: longest row in tokens.
        adapter: a GGUF adapter.

    Raises:
        AdapterError: llama.cpp does not load it.
    """

    def __init__(self, path: Path, context: int, adapter: Path | None = None) -> None:
        self._library = library = load_library()
        self._model = self._context = None
        self._path = path
        _log.clear()
        library.llama_log_set(ctypes.cast(_LOG, _PTR), None)  # its server sets another one
        model_params = library.llama_model_default_params()
        self._model = library.llama_model_load_from_file(str(path).encode(), model_params)
        self._require(bool(self._model), "does not load it")
        self._vocab = library.llama_model_get_vocab(self._model)
        self.vocab_size: int = library.llama_vocab_n_tokens(self._vocab)
        self._size = max(256, -(-context // 256) * 256)
        params = library.llama_context_default_params()
        params.first[0] = params.first[1] = params.first[2] = self._size  # n_ctx, n_batch, n_ubatch
        self._context = library.llama_init_from_model(self._model, params)
        self._require(bool(self._context), "cannot run it")
        sizes = library.llama_n_ctx(self._context), library.llama_n_batch(self._context)
        self._require(sizes == (self._size, self._size), "has other parameters: use another version of xllamacpp")
        library.llama_set_n_threads(self._context, torch.get_num_threads(), torch.get_num_threads())
        if adapter is not None:
            loaded = library.llama_adapter_lora_init(self._model, str(adapter).encode())
            self._require(bool(loaded), f"does not load {adapter.name} on it")
            adapters, scales = (_PTR * 1)(loaded), (ctypes.c_float * 1)(1.0)
            failed = library.llama_set_adapters_lora(self._context, adapters, 1, scales)
            self._require(failed == 0, f"does not apply {adapter.name}")

    def _require(self, condition: bool, what: str) -> None:
        if condition:
            return
        self.close()
        reason = f" ({_log[0][:200]})" if _log else ""
        raise AdapterError(f"{self._path.name} is not kept: llama.cpp {what}{reason}.")

    def close(self) -> None:
        """Free its memory."""
        if self._context:
            self._library.llama_free(self._context)
        if self._model:
            self._library.llama_model_free(self._model)
        self._model = self._context = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a prompt, as llama.cpp's and Ollama's servers read it: special tokens by
        their text, with the beginning-of-text token if the model asks for it."""
        encoded = text.encode()
        ids = (_I32 * (len(encoded) + 8))()
        count = self._library.llama_tokenize(self._vocab, encoded, len(encoded), ids, len(ids), True, True)
        return list(ids[: max(0, count)])

    def is_end(self, token_id: int) -> bool:
        """Generation ends at this token."""
        return bool(self._library.llama_vocab_is_eog(self._vocab, token_id))

    def loss(self, rows: Sequence[tokenization.TokenIds], notify: EventHandler, stage: str) -> HeldOutLoss:
        """Summed loss of each row, run alone.

        Args:
            rows: encoded rows; negative ids are not predicted.
            notify: receives progress events.
            stage: their name.
        """
        losses = []
        for number, row in enumerate(rows):
            losses.append(self._row_loss(row))
            notify(Progress(stage, number + 1, len(rows)))
        return HeldOutLoss(losses, [tokenization.count_predictions(row) for row in rows])

    def _row_loss(self, row: tokenization.TokenIds) -> float:
        library = self._library
        ids, predicted = tokenization.token_ids(row), np.flatnonzero(row[1:] >= 0)
        self._require(len(ids) <= self._size, "has no context for such a row")
        if len(predicted) == 0:
            return 0.0
        batch = library.llama_batch_init(self._size, 0, 1)
        try:
            batch.n_tokens = len(ids)
            for position, number in enumerate(ids):
                batch.token[position], batch.pos[position] = int(number), position
                batch.n_seq_id[position], batch.seq_id[position][0] = 1, 0
                batch.logits[position] = 0
            for position in predicted.tolist():
                batch.logits[position] = 1
            library.llama_memory_clear(library.llama_get_memory(self._context), True)
            self._require(library.llama_decode(self._context, batch) == 0, "cannot compute a row")
        finally:
            library.llama_batch_free(batch)
        pointer = library.llama_get_logits(self._context)
        logits = np.ctypeslib.as_array(pointer, (len(predicted), self.vocab_size))
        targets = torch.from_numpy(ids[predicted + 1].astype("int64"))
        return float(F.cross_entropy(torch.from_numpy(logits), targets, reduction="none").double().sum())
