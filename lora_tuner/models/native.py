"""C kernels of training and generation on a CPU (`native.c`), built once into the user's cache by
the system's compiler.

Called through ctypes, so they need no headers of torch or Python. Where there is no compiler, or it
fails, transformers' layers and torch's products are used: slower, with the same results up to
rounding. Surprise: torch and the kernels share one pool of OpenMP threads only because the loader
finds torch's libgomp first; so torch is imported before."""

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from .. import atomic_io
from ..errors import ConfigError

SOURCE = Path(__file__).with_suffix(".c")
LIBRARY = "native.so"
# Signed zeros, NaN and infinity are kept: a step that is not finite must be seen.
FLAGS = (
    "-O3", "-std=c99", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi", "-shared", "-fPIC",
)  # fmt: skip
VECTOR_FLAGS = {"x86_64": ("-march=native", "-mprefer-vector-width=512"), "arm64": ("-mcpu=native",)}
DTYPES = {torch.float32: "_f32", torch.bfloat16: "_bf16", torch.int8: "_int8"}
COMPILE_SECONDS = 120
_C_TYPES = {int: ctypes.c_int64, float: ctypes.c_float}
# Beyond these rows torch's products are faster.
PRODUCT_ROWS = {torch.float32: 8, torch.bfloat16: 2, torch.int8: 32}


class NativeKernels:
    """The functions of `native.c`. Tensors are passed as pointers, so their sizes must be right.

    `build` identifies source, compiler and flags.
    """

    def __init__(self, library: ctypes.CDLL, build: str) -> None:
        self.build = build
        self._library = library
        self._functions: dict[tuple[str, torch.dtype], Callable[..., None]] = {}

    def call(self, name: str, dtype: torch.dtype, *arguments: torch.Tensor | int | float | None) -> None:
        """Call a function for a dtype: tensors and None as pointers, integers as int64."""
        function = self._functions.get((name, dtype))
        if function is None:
            function = getattr(self._library, name + DTYPES[dtype])
            function.argtypes = [_C_TYPES.get(type(value), ctypes.c_void_p) for value in arguments]
            function.restype = None
            self._functions[name, dtype] = function
        function(*[it.data_ptr() if isinstance(it, torch.Tensor) else it for it in arguments])


@cache
def native_kernels() -> NativeKernels | None:
    """Load the kernels, and build them if the cache has none for this CPU. None without a compiler."""
    return load_kernels()[0]


def native_for(tensor: torch.Tensor) -> NativeKernels | None:
    """The kernels, if there are any for the device and dtype of a tensor."""
    return native_kernels() if tensor.device.type == "cpu" and tensor.dtype in DTYPES else None


def few_rows_product(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None = None
) -> torch.Tensor | None:
    """x weight' for a few rows, as fast as the weight is read; torch reads it at half the speed.

    Args:
        x: (rows, in), rounded to bfloat16 first for a weight in it, as is the result.
        weight: (out, in) in float32, bfloat16, or int8 with its `scale` (out,).

    Returns:
        (rows, out) in float32; None where torch is as fast, or there are no kernels.
    """
    kernels = native_for(weight)
    if kernels is None or len(x) > PRODUCT_ROWS[weight.dtype] or not weight.is_contiguous():
        return None
    x = (x.bfloat16() if weight.dtype == torch.bfloat16 else x).float().contiguous()
    out = x.new_empty(len(x), len(weight))
    kernels.call("product", weight.dtype, x, weight, scale, out, len(x), x.shape[1], len(weight))
    return out


@cache
def load_kernels() -> tuple[NativeKernels | None, str]:
    """Load or build the kernels. Returns them, or None and the reason."""
    try:
        compiler = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        return None, f"CC is no command: {error}"
    compiler = compiler or [name for name in ("cc", "gcc", "clang") if shutil.which(name)][:1]
    if not compiler:
        return None, "no C compiler is installed"
    machine = {"AMD64": "x86_64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    flags = [*FLAGS, *VECTOR_FLAGS.get(machine, ())]
    try:
        version = _run([*compiler, "--version"])
        build = _short_hash(SOURCE.read_text(encoding="utf-8"), version, *compiler[1:], *flags)
        with contextlib.suppress(OSError, ConfigError):  # none yet, damaged, or no cache
            return NativeKernels(_load_cached(_cache_folder(build)), build), ""
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            built = Path(folder) / LIBRARY
            _compile([*compiler, *flags], built)
            library = ctypes.CDLL(str(built))  # stays loaded when the file is gone
            if not hasattr(library, "product_f32"):
                return None, f"{compiler[0]} wrote a library without the kernels"
            with contextlib.suppress(OSError, ConfigError), atomic_io.atomic_folder(_cache_folder(build)) as work:
                shutil.copyfile(built, work / LIBRARY)
                atomic_io.write_hashes(work)
    except (OSError, subprocess.SubprocessError) as error:
        return None, " ".join(str(error).split())
    return NativeKernels(library, build), ""


def _load_cached(folder: Path) -> ctypes.CDLL:
    """Load a library of the cache. One that is cut short would end the process with a signal."""
    if not atomic_io.matches_hashes(folder):
        raise OSError(f"{folder} is missing or damaged")
    return ctypes.CDLL(str(folder / LIBRARY))


def _cache_folder(build: str) -> Path:
    """Folder of a build for this CPU: machines may share a cache, and -march=native is not the same on all."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    except OSError:
        cpu = [platform.machine(), platform.processor()]
    return atomic_io.cache_dir() / "kernels" / f"{build}-{_short_hash(*cpu)}"


def _short_hash(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]


def _compile(command: list[str], built: Path) -> None:
    arguments = [str(SOURCE), "-o", str(built), "-lm"]
    try:
        _run([*command, "-fopenmp", *arguments])
    except OSError:  # clang on macOS has no OpenMP: one thread then
        _run([*command, *arguments])


def _run(command: list[str]) -> str:
    """Run a compiler. Returns its output; raises OSError with its first error."""
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=COMPILE_SECONDS, check=False
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no output"]
        error = next((line for line in lines if "error" in line), lines[0])  # warnings may stand before it
        raise OSError(f"{command[0]} failed: {error[:200]}")
    return done.stdout
