"""The command that serves adapters to other programs."""

import os
from typing import Annotated, Any

import typer

from ..cli.options import DEFAULT_ADAPTERS_DIR, AdaptersDirOption
from ..config import ModelOptions, ServerConfig, resolve_settings
from ..errors import ConfigError
from .options import complete_adapter_names, model_options, settings_options

KEY_VARIABLE = "LORA_TUNER_API_KEY"
MISSING_EXTRA = ("fastapi", "gradio", "prometheus_client", "uvicorn")


@settings_options(ServerConfig)
@model_options()
def serve(
    given: dict[str, Any],
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="Serve this adapter, by name or path. May be repeated.",
            show_default="all of the library",
            autocompletion=complete_adapter_names,
        ),
    ] = None,
    browse: Annotated[bool, typer.Option("--open", help="Open the playground in a browser.")] = False,
    adapters_dir: AdaptersDirOption = DEFAULT_ADAPTERS_DIR,
    *,
    options: ModelOptions,
) -> None:
    """Answer OpenAI's clients, and people in a browser: one base in memory, every adapter of the library beside it."""
    if KEY_VARIABLE in os.environ:
        given = {"api_key": os.environ[KEY_VARIABLE]} | given
    settings = resolve_settings(ServerConfig, given)
    try:
        from ..server.runner import serve
    except ModuleNotFoundError as error:
        if error.name not in MISSING_EXTRA:
            raise
        raise ConfigError("serve needs FastAPI, uvicorn and Gradio: `pip install -e '.[serve]'` gets them.") from error
    serve(adapter or [], settings, options=options, adapters_dir=adapters_dir, browse=browse)
