"""The command `export`."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..adapters.library import Library
from ..config import ModelOptions, TrainConfig
from ..errors import ConfigError
from ..text import escape_control, format_bytes, format_gain, one_line
from .display import show_json
from .options import (
    DEFAULT_ADAPTERS_DIR,
    EVAL_SET_FIELDS,
    AdaptersDirOption,
    JsonOption,
    Overrides,
    OverwriteOption,
    complete_adapter_names,
    eval_sets_from,
    model_options,
    settings_options,
)

if TYPE_CHECKING:
    from ..convert.export_gguf import ExportResult
    from ..convert.export_mlx import MlxExport
    from ..convert.export_model import ModelExport


@settings_options(TrainConfig, *EVAL_SET_FIELDS)
@model_options("base", "revision", "force")
def export(
    overrides: Overrides,
    out: Annotated[
        Path, typer.Option(help="File to write; for Ollama, vLLM and MLX, a folder.", show_default=False)
    ],
    adapter: Annotated[
        str | None,
        typer.Argument(
            help="Adapter, by name or path. Left out: the base of --base alone.",
            show_default=False,
            autocompletion=complete_adapter_names,
        ),
    ] = None,
    to: Annotated[
        Literal["gguf", "ollama", "vllm", "mlx"],
        typer.Option(
            help="gguf: a file for llama.cpp, on a GGUF file of the base. ollama: a folder with GGUF file and Modelfile. "
            "vllm: a folder, for an adapter of the text model of a multimodal base. mlx: a folder for mlx-lm, untried on a Mac."
        ),
    ] = "gguf",
    merged: Annotated[
        bool | None,
        typer.Option(
            "--merged/--no-merged",
            help="Export base and adapter as one model.",
            show_default="with --to ollama",
        ),
    ] = None,
    quantize: Annotated[
        Literal["q4_k_m", "q8_0", "f16"] | None,
        typer.Option(help="Quantize a whole model with llama.cpp, and measure its loss.", show_default=False),
    ] = None,
    dtype: Annotated[
        Literal["float16", "bfloat16", "float32"] | None,
        typer.Option(help="Precision of the file.", show_default="float16"),
    ] = None,
    eval_rows: Annotated[
        int | None,
        typer.Option(min=2, help="Held-out rows for the comparison, of each part of a blend.", show_default="50"),
    ] = None,
    adapters_dir: AdaptersDirOption = DEFAULT_ADAPTERS_DIR,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    *,
    options: ModelOptions,
) -> None:
    """Export an adapter, or a whole model, to files for another program.

    python cli.py export poems --out poems.gguf
    python cli.py export poems --to ollama --out poems-ollama

    Docs: docs/other-tools.md
    """
    is_whole = adapter is None or merged or (to == "ollama" and merged is None)
    _check_export(
        {
            "--merged, --no-merged": adapter is None and merged is not None,
            "--force": adapter is None and options.force,
            "--adapters-dir": adapter is None and adapters_dir != DEFAULT_ADAPTERS_DIR,
        },
        "only valid with an adapter",
    )
    _check_export({"--quantize": quantize and not is_whole}, "only valid for a whole model: use --merged")
    _check_export({"--dtype": quantize and dtype}, "not valid with --quantize, which chooses the precision")
    measured = {f"--{name.replace('_', '-')}": True for name in overrides} | {"--eval-rows": eval_rows}
    if to in ("vllm", "mlx"):
        whole: dict[str, object] = {"--merged": merged, "--quantize": quantize, "--dtype": dtype}
        only = "only renames the layers of an adapter" if to == "vllm" else "writes an adapter as it is"
        _check_export(whole | measured, f"not valid with --to {to}, which {only}")
        if adapter is None:
            raise ConfigError(f"--to {to}: name an adapter.")
    if to == "gguf" and not is_whole:
        _check_export(measured, "only valid where the result is measured: use --merged or --to ollama")
    if adapter is None and options.base is None:
        raise ConfigError("Name an adapter, or a base with --base.")
    if adapter is None and "eval_dataset" not in overrides:
        _check_export({"--eval-rows": eval_rows}, "only valid with an adapter or --eval-dataset")
    loaded = Library(adapters_dir).get(adapter) if adapter else None
    precision = dtype or "float16"
    if loaded is not None and to == "vllm":
        from ..convert.export_vllm import to_vllm

        renamed = to_vllm(loaded, out, overwrite=overwrite, options=options)
        show_json(renamed.to_dict()) if as_json else print(f"{out}  {format_bytes(renamed.bytes)}")
        return
    if loaded is not None and to == "mlx":
        from ..convert.export_mlx import to_mlx

        converted = to_mlx(loaded, out, overwrite=overwrite, options=options)
        show_json(vars(converted) | {"path": str(out)}) if as_json else _show_mlx_folder(converted)
        return
    if loaded is not None and to == "gguf" and not is_whole:
        from ..convert.export_gguf import to_gguf

        exported = to_gguf(loaded, out, dtype=precision, overwrite=overwrite, options=options)
        if as_json:
            show_json(vars(exported) | {"path": str(exported.path), "modelfile": exported.modelfile})
        else:
            _show_adapter_file(exported)
        return
    sets = eval_sets_from(overrides, eval_rows, [loaded] if loaded else [])
    from ..convert.export_model import export_model
    from ..convert.export_ollama import export_ollama

    if to == "gguf":
        model = export_model(
            loaded,
            out,
            quantization=quantize,
            dtype=precision,
            sets=sets,
            eval_rows=eval_rows or 50,
            overwrite=overwrite,
            options=options,
        )
        show_json(_model_dict(model)) if as_json else _show_model(model)
        return
    folder = export_ollama(
        loaded,
        out,
        merged=is_whole,
        quantization=quantize,
        dtype=precision,
        sets=sets,
        eval_rows=eval_rows or 50,
        overwrite=overwrite,
        options=options,
    )
    if as_json:
        details = {"template": folder.template, "stops": folder.stops, "parameters": folder.parameters}
        show_json({"path": str(folder.path), "model": _model_dict(folder.model)} | details)
    else:
        _show_model(folder.model)
        print(f"{folder.path}: create it with `ollama create NAME -f {folder.path / 'Modelfile'}`")


def _check_export(given: Mapping[str, object], why: str) -> None:
    """Raise ConfigError for the options that are given."""
    if names := [name for name, value in given.items() if value]:
        raise ConfigError(f"{', '.join(names)}: {why}.")


def _show_adapter_file(exported: "ExportResult") -> None:
    size = f"{format_bytes(exported.bytes)}, {exported.tensors} tensors"
    print(f"{exported.path}  {size}, largest rounding error {exported.error:.1e}")
    if exported.turn_end is not None:
        print(
            f"Answers end with {one_line(exported.turn_end)}, not with the end of text of the "
            "base. For llama.cpp: --override-kv "
            f"tokenizer.ggml.eot_token_id=int:{exported.turn_end_id}. Modelfile for Ollama:"
        )
        print(escape_control(exported.modelfile), end="")


def _show_mlx_folder(exported: "MlxExport") -> None:
    print(f"{exported.path}  {format_bytes(exported.bytes)}; untried on a Mac")
    end = "" if exported.turn_end is None else f" --extra-eos-token {shlex.quote(exported.turn_end)}"
    command = f"mlx_lm.generate --model {shlex.quote(exported.model)} --adapter-path {shlex.quote(str(exported.path))}{end}"
    print(one_line(command))


def _model_dict(model: "ModelExport") -> dict[str, object]:
    return vars(model) | {"path": str(model.path), "result": model.result and model.result.model_dump()}


def _show_model(model: "ModelExport") -> None:
    print(f"{model.path}  {format_bytes(model.bytes)}, {model.precision}")
    if (result := model.result) is None:
        print("held-out loss not measured: --eval-dataset names rows to measure it on")
        return
    change = format_gain(-result.gain, result.standard_error)
    print(
        f"held-out loss {result.base_loss:.3f} -> {result.loss:.3f} in llama.cpp, a difference of "
        f"{change} ({result.format_rows()})"
    )
