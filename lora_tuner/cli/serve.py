"""The command `serve`."""

import os
from typing import Annotated

import typer

from ..config import ModelOptions, ServerConfig
from ..errors import ConfigError
from ..settings_files import resolve_settings
from .options import (
    DEFAULT_ADAPTERS_DIR,
    AdaptersDirOption,
    Overrides,
    complete_adapter_names,
    model_options,
    settings_options,
)

API_KEY_VARIABLE = "LORA_TUNER_API_KEY"
SERVER_PACKAGES = ("fastapi", "gradio", "prometheus_client", "uvicorn")


@settings_options(ServerConfig)
@model_options()
def serve(
    overrides: Overrides,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="Adapter to serve, by name or path. May be repeated.",
            show_default="all in the library",
            autocompletion=complete_adapter_names,
        ),
    ] = None,
    browse: Annotated[bool, typer.Option("--open", help="Open the playground in a browser.")] = False,
    adapters_dir: AdaptersDirOption = DEFAULT_ADAPTERS_DIR,
    *,
    options: ModelOptions,
) -> None:
    """Start an OpenAI-compatible server and web page for all adapters.

    /v1/chat/completions asks through the chat template, /v1/completions continues the bare text. The page
    asks adapters that have learned conversations through their template.

    python cli.py serve --open

    Docs: docs/serving.md
    """
    if API_KEY_VARIABLE in os.environ:
        overrides = {"api_key": os.environ[API_KEY_VARIABLE]} | overrides
    settings = resolve_settings(ServerConfig, overrides)
    try:
        from ..server import runner

        runner.serve(adapter or [], settings, options=options, adapters_dir=adapters_dir, browse=browse)
    except ModuleNotFoundError as error:
        if error.name not in SERVER_PACKAGES:
            raise
        raise ConfigError(
            "serve needs FastAPI, uvicorn and Gradio: run `pip install 'lora_tuner[serve]'`."
        ) from error
