"""The command that serves adapters to other programs."""

import os
from typing import Annotated, Any

import typer

from .config import Serving, resolve
from .errors import ConfigError
from .options import known, on_a_base, options_of, show

KEY = "LORA_TUNER_API_KEY"
NEEDED = ("fastapi", "gradio", "prometheus_client", "uvicorn")


@options_of(Serving)
@on_a_base
def serve(
    given: dict[str, Any],
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="Serve this adapter, by name or path. May be repeated.",
            show_default="all of the library",
            autocompletion=known,
        ),
    ] = None,
    browse: Annotated[bool, typer.Option("--open", help="Open the playground in a browser.")] = False,
    *,
    place: dict[str, Any],
) -> None:
    """Answer OpenAI's clients, and people in a browser: one base in memory, every adapter of the library beside it."""
    if KEY in os.environ:
        given = {"api_key": os.environ[KEY]} | given
    settings = resolve(Serving, given)
    try:
        from .server.serve import serve
    except ModuleNotFoundError as error:
        if error.name not in NEEDED:
            raise
        raise ConfigError("serve needs FastAPI, uvicorn and Gradio: `pip install -e '.[serve]'` gets them.") from error
    serve(adapter or [], settings, **place, browse=browse, notify=show)
