"""The commands that make something out of adapters, and hand it on: merge, blend, compress, export, push, pull."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..adapters.library import Library
from ..config import MAX_RANK, Dtype, ModelOptions, TrainConfig
from ..errors import ConfigError
from .display import print_stderr, show_blended, show_compressed, show_exported, show_json, show_merged, show_transfer
from .options import (
    DEFAULT_ADAPTERS_DIR,
    EVAL_SET_FIELDS,
    AdapterArgument,
    AdapterArguments,
    AdaptersDirOption,
    JsonOption,
    complete_adapter_names,
    display,
    eval_sets_from,
    model_options,
    settings_options,
)

EvalRowsOption = Annotated[int | None, typer.Option(min=2, help="So many of each set of rows.", show_default="all")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace what is there under that name.")]
RepoArgument = Annotated[str, typer.Argument(help="A model repo on the Hub, owner/name.", show_default=False)]


@settings_options(TrainConfig, *EVAL_SET_FIELDS)
@model_options("base", "revision", "force")
def merge(
    given: dict[str, Any],
    adapters: AdapterArguments,
    out: Annotated[
        Path,
        typer.Option(help="The model folder to write; of several adapters, each gets one in it.", show_default=False),
    ],
    dtype: Annotated[Dtype, typer.Option(help="Numbers of the merged model; it is merged in float32.")] = "float32",
    max_shard_size: Annotated[str, typer.Option(help="Weights larger than this become several files.")] = "5GB",
    eval_rows: Annotated[int, typer.Option(min=2, help="Held-out rows that it is proven on.")] = 50,
    adapters_dir: AdaptersDirOption = DEFAULT_ADAPTERS_DIR,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    *,
    options: ModelOptions,
) -> None:
    """Write base and adapter as one plain model, for tools that know no adapters, and prove that it says the same."""
    found = Library(adapters_dir).get_all(adapters)
    from ..convert import merge as convert_merge

    places = [out if len(found) == 1 else out / it.name for it in found]
    for place in places:
        convert_merge.check_model_folder(place, overwrite=overwrite)
    sets = eval_sets_from(given, eval_rows)
    facts = []
    for adapter, place in zip(found, places, strict=True):
        merged = convert_merge.merge(
            adapter,
            place,
            dtype=dtype,
            shard_size=max_shard_size,
            sets=sets,
            eval_rows=eval_rows,
            overwrite=overwrite,
            options=options,
        )
        facts.append(dataclasses.asdict(merged) | {"path": str(merged.path)})
        if not as_json:
            show_merged(merged)
    if as_json:
        show_json(facts)


@settings_options(TrainConfig, *EVAL_SET_FIELDS)
@model_options("base", "revision", "device", "force")
def blend(
    given: dict[str, Any],
    parts: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME=WEIGHT...",
            help="Adapters and their weights; below 0 one is taken away.",
            autocompletion=complete_adapter_names,
        ),
    ],
    name: Annotated[str, typer.Option(help="Name of the blend.", show_default=False)],
    rank: Annotated[
        int | None,
        typer.Option(min=1, max=MAX_RANK, help="Cut the sum to this rank.", show_default="the exact sum"),
    ] = None,
    eval_rows: EvalRowsOption = None,
    adapters_dir: AdaptersDirOption = DEFAULT_ADAPTERS_DIR,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    *,
    options: ModelOptions,
) -> None:
    """Add adapters up into a new one: the weighted sum of their updates, exact unless its rank is cut."""
    library = Library(adapters_dir)
    weighted = [_parse_weight(part) for part in parts]
    chosen = [(library.get(adapter), weight) for adapter, weight in weighted]
    library.check_name_free(name, overwrite=overwrite)
    from ..convert import blend as convert_blend

    blended = convert_blend.blend(
        chosen,
        name,
        library,
        rank=rank,
        sets=eval_sets_from(given, eval_rows),
        eval_rows=eval_rows,
        overwrite=overwrite,
        options=options,
    )
    if as_json:
        facts = {key: it for key, it in vars(blended).items() if key != "adapter"}
        facts |= {
            "comparison": vars(blended.comparison),
            "results": {key: it.model_dump() for key, it in blended.results.items()},
        }
        show_json(blended.adapter.to_dict() | {"blend": facts})
    else:
        show_blended(blended)


def _parse_weight(part: str) -> tuple[str, float]:
    name, equals, weight = part.rpartition("=")
    try:
        if equals and name:
            return name, float(weight)
    except ValueError:
        pass
    raise ConfigError(f"'{part}' is not NAME=WEIGHT, such as imdb=0.7.")


@settings_options(TrainConfig, *EVAL_SET_FIELDS)
@model_options("base", "revision", "device", "force")
def compress(
    given: dict[str, Any],
    adapter: AdapterArgument,
    name: Annotated[
        str | None,
        typer.Option(help="Name of the compressed one.", show_default="that of the adapter, and -compressed"),
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Share of each layer's energy to keep.", show_default="0.99"),
    ] = None,
    max_bytes: Annotated[
        int | None,
        typer.Option(min=1, help="Keep as much energy as fits: bytes of the weights.", show_default=False),
    ] = None,
    eval_rows: EvalRowsOption = None,
    adapters_dir: AdaptersDirOption = DEFAULT_ADAPTERS_DIR,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    *,
    options: ModelOptions,
) -> None:
    """Make an adapter smaller: in each layer the least rank that keeps its energy, and the loss measured again."""
    library = Library(adapters_dir)
    found = library.get(adapter)
    from ..convert import compress as convert_compress

    compressed = convert_compress.compress(
        found,
        name or f"{found.name}-compressed",
        library,
        energy=energy,
        max_bytes=max_bytes,
        sets=eval_sets_from(given, eval_rows),
        eval_rows=eval_rows,
        overwrite=overwrite,
        options=options,
    )
    if as_json:
        facts = {key: it for key, it in vars(compressed).items() if key != "adapter"}
        facts |= {
            "comparison": vars(compressed.comparison),
            "results": [it.model_dump() for it in compressed.results or ()],
        }
        show_json(compressed.adapter.to_dict() | {"compress": facts})
    else:
        show_compressed(compressed)


@model_options("base", "revision", "force")
def export(
    adapter: AdapterArgument,
    out: Annotated[Path, typer.Option(help="The file to write.", show_default=False)],
    to: Annotated[
        Literal["gguf"], typer.Option(help="gguf: llama.cpp and Ollama read it over the base as GGUF.")
    ] = "gguf",
    dtype: Annotated[Literal["float16", "bfloat16", "float32"], typer.Option(help="Numbers in the file.")] = "float16",
    adapters_dir: AdaptersDirOption = DEFAULT_ADAPTERS_DIR,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    *,
    options: ModelOptions,
) -> None:
    """Write an adapter in the format of another program."""
    found = Library(adapters_dir).get(adapter)
    from ..convert.export_gguf import to_gguf

    exported = to_gguf(found, out, dtype=dtype, overwrite=overwrite, options=options)
    show_json(vars(exported) | {"path": str(exported.path)}) if as_json else show_exported(exported)


def push(
    adapter: AdapterArgument,
    repo: RepoArgument,
    private: Annotated[bool, typer.Option("--private", help="Where the repo is made, make it private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would go; nothing leaves.")] = False,
    adapters_dir: AdaptersDirOption = DEFAULT_ADAPTERS_DIR,
    as_json: JsonOption = False,
) -> None:
    """Put an adapter with its model card on the Hugging Face Hub."""
    found = Library(adapters_dir).get(adapter)
    from ..adapters import hub_sync

    parcel = hub_sync.push(found, repo, private=private, dry_run=dry_run)
    show_json({"repo": parcel.repo, "files": parcel.files, "url": parcel.url}) if as_json else show_transfer(parcel)
    if dry_run:
        print_stderr("Nothing was sent: a dry run.")


def pull(
    repo: RepoArgument,
    name: Annotated[str | None, typer.Option(help="Its name here.", show_default="the repo's")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.", show_default=False)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would come; nothing is fetched.")] = False,
    adapters_dir: AdaptersDirOption = DEFAULT_ADAPTERS_DIR,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Take an adapter from the Hugging Face Hub into the library."""
    from ..adapters import hub_sync

    parcel = hub_sync.pull(
        repo, Library(adapters_dir), name, revision=revision, overwrite=overwrite, dry_run=dry_run, notify=display
    )
    facts = parcel.adapter.to_dict() if parcel.adapter else {}
    show_json({"repo": parcel.repo, "files": parcel.files} | facts) if as_json else show_transfer(parcel)
    if dry_run:
        print_stderr("Nothing was fetched: a dry run.")
