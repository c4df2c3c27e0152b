"""The commands `train` and `methods`."""

import contextlib
import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .. import distributed
from ..adapters.adapter import CONFUSION_FILE, LOSS_PLOT_FILE, RUN_FILE, Adapter, load_adapter_folder
from ..adapters.library import adapter_name
from ..adapters.manifest import RateProbe
from ..config import METHODS, STOP_RULES, ModelOptions, TrainConfig
from ..errors import ConfigError, Interrupted
from ..settings_files import expand_sweep, resolve_settings
from ..text import (
    escape_control,
    format_bytes,
    format_count,
    format_duration,
    format_gain,
)
from ..training.paths import SWEEP_PLOT_FILE
from ..training.progress import display
from .completion import complete_run_names
from .display import (
    BASE_LABEL,
    print_parts,
    print_picture,
    print_preference,
    print_result,
    print_stderr,
    print_table,
    quote,
    quote_argument,
    show_json,
)
from .generate import show_columns
from .options import JsonOption, Overrides, settings_options
from .preview import preview_to_dict, show_preview
from .report import measure, show_report

MAX_QUOTED = 300  # characters of a prompt in a command

if TYPE_CHECKING:
    from ..analysis.report import Report
    from ..training.sweep_result import SweepResult


@settings_options(TrainConfig)
def train(
    overrides: Overrides,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of settings. Options override it.", show_default=False)
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            help="Resume the unfinished run of this name; `runs` lists them.",
            show_default=False,
            autocompletion=complete_run_names,
        ),
    ] = None,
    accept: Annotated[
        Literal["threads"] | None,
        typer.Option(
            help="With --resume: accept another number of threads. The manifest says that the result is not exact.",
            show_default=False,
        ),
    ] = None,
    queue: Annotated[
        bool, typer.Option("--queue", help="First wait until the runs before it in --runs-dir have ended.")
    ] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Measure a few steps and print the estimated cost; do not train.")
    ] = False,
    preview: Annotated[
        int | None,
        typer.Option(
            metavar="[<number>]",
            min=1,
            help="Show N rows, 3 if N is left out, as the model sees them, lengths, dropped copies and prompts; do not train.",
            show_default=False,
        ),
    ] = None,
    report: Annotated[
        bool,
        typer.Option(
            "--report", help="Then report on what the adapter has learned; of a sweep, on the recommended one."
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train an adapter on your own text.

    python cli.py train --dataset poems.txt --clean lines --name poems --epochs 3

    Docs: docs/tour.md, docs/methods.md, docs/objectives.md, docs/scale.md
    """
    if resume is not None and (overrides.keys() - {"runs_dir", "threads"} or config or plan or preview):
        raise ConfigError(
            "--resume reuses the run's saved settings; only --runs-dir, --threads and --accept may be added."
            + _advise_more_steps(resume, overrides)
        )
    if accept and resume is None:
        raise ConfigError("--accept is for a run that is resumed: give --resume NAME too.")
    if plan and preview:
        raise ConfigError("--plan and --preview exclude each other: give one.")
    configs = [resolve_settings(TrainConfig, settings, config) for settings in expand_sweep(overrides)]
    if len(configs) > 1 and (plan or preview):
        raise ConfigError("--plan and --preview are for a single run: give one value of each setting.")
    settings = configs[0]
    if queue and (plan or preview):
        raise ConfigError("--queue is for training: leave it out with --plan and --preview.")
    if queue and distributed.expected_world_size() > 1:
        raise ConfigError("--queue is for a single process: run it without torchrun.")
    if report and (plan or preview):
        raise ConfigError("--report is for training: leave it out with --plan and --preview.")
    if report and distributed.expected_world_size() > 1:
        raise ConfigError(
            "--report is for a single process: leave it out, and use the command `report` afterwards."
        )
    changes: dict[str, Any] = {"threads": settings.threads, "accept": [accept] if accept else []}
    try:
        with _turn(configs, resume) if queue else contextlib.nullcontext():
            _run(configs, resume, changes, plan=plan, preview=preview, report=report, as_json=as_json)
    except KeyboardInterrupt as error:  # a run that has begun says how to resume it
        if resume or plan or preview:
            raise
        raise Interrupted("Interrupted before the first step: nothing was saved.") from error
    distributed.destroy_process_group()


def _turn(configs: list[TrainConfig], resume: str | None) -> contextlib.AbstractContextManager[None]:
    """Wait before anything heavy is loaded. Refuse a name that is taken at once."""
    from ..training import paths
    from ..training.tickets import turn

    settings = configs[0]
    runs_dir, name = settings.runs_dir, resume or adapter_name(settings)
    sweep_folder = paths.sweep_folder(runs_dir, name)
    if resume:
        is_sweep = (sweep_folder / paths.SWEEP_STATE_FILE).is_file()
        if not is_sweep and not (runs_dir / name / RUN_FILE).is_file():
            return contextlib.nullcontext()  # what resumes it says why it cannot
    else:
        is_sweep = len(configs) > 1
        if not is_sweep:
            paths.check_places(settings)
            paths.check_output_paths(settings)
    return turn(runs_dir, sweep_folder.name if is_sweep else name, display)


def _run(
    configs: list[TrainConfig],
    resume: str | None,
    changes: dict[str, Any],
    *,
    plan: bool,
    preview: int | None,
    report: bool,
    as_json: bool,
) -> None:
    settings = configs[0]
    from ..training import run, sweep
    from ..training.preview import make_preview

    if distributed.expected_world_size() > 1 and preview:
        raise ConfigError("--preview is for a single process: run it without torchrun.")
    if len(configs) > 1 or (resume and sweep.is_unfinished(resume, settings.runs_dir)):
        result = (
            sweep.resume_sweep(resume, settings.runs_dir, display, **changes)
            if resume
            else sweep.run_sweep(configs, display)
        )
        if not as_json:
            _show_sweep(result)
        made = _report(load_adapter_folder(result.path), settings) if report else None
        if as_json:
            picture = {"picture": str(result.folder / SWEEP_PLOT_FILE)}
            show_json(result.to_dict() | picture | _report_to_dict(made))
        elif made:
            print()
            show_report(made)
    elif preview:
        previewed = make_preview(settings, preview, display)
        if as_json:
            show_json(preview_to_dict(previewed, settings))
        else:
            show_preview(previewed, settings)
    elif plan:
        estimate = run.plan(settings, display)
        if distributed.rank() == 0:
            show_json(dataclasses.asdict(estimate)) if as_json else print_parts(estimate.summary())
    else:
        adapter = (
            run.train(settings, display)
            if resume is None
            else run.resume(resume, settings.runs_dir, display, **changes)
        )
        if distributed.rank() == 0:
            if not as_json:
                _show_trained(adapter)
            made = _report(adapter, settings) if report else None
            if as_json:
                samples = [sample.model_dump() for sample in adapter.samples]
                added = {"picture": str(adapter.path / LOSS_PLOT_FILE), "samples": samples}
                show_json(adapter.to_dict() | added | _report_to_dict(made))
            elif made:
                print()
                show_report(made)


def _report(adapter: Adapter, settings: TrainConfig) -> "Report":
    options = ModelOptions(
        device=settings.device, load_in=settings.load_in, threads=settings.threads, notify=display
    )
    return measure(adapter, adapter.path.parent, options)


def _report_to_dict(report: "Report | None") -> dict[str, object]:
    return {"report": report.to_dict()} if report else {}


def _advise_more_steps(name: str, overrides: Overrides) -> str:
    """Return a sentence for a resume that asks for more steps, else an empty text."""
    from ..training import paths
    from ..training.checkpoints import more_steps_advice

    rules = [rule for rule in STOP_RULES if rule in overrides]
    runs_dir = overrides.get("runs_dir", TrainConfig().runs_dir)
    if not rules or paths.sweep_folder(runs_dir, name).exists():  # no trial of a sweep has its name
        return ""
    run_file = runs_dir / name / RUN_FILE
    saved = resolve_settings(TrainConfig, {}, run_file) if run_file.is_file() else TrainConfig()
    wanted = overrides[rules[0]]
    if isinstance(wanted, list):
        wanted = max(wanted)
    if rules[0] == "max_steps" and saved.max_steps and wanted > saved.max_steps:
        wanted -= saved.max_steps
    option = f"--{rules[0].replace('_', '-')} {str(wanted).removesuffix('.0')}"
    return f" {more_steps_advice(saved.adapters_dir / name, option)}"


def _show_trained(adapter: Adapter) -> None:
    assert adapter.manifest is not None
    assert adapter.manifest.run is not None
    run = adapter.manifest.run
    if run.probe:
        _show_probe(run.probe)
    steps = f"{format_count(run.steps, 'step')} in {format_duration(run.seconds)}"
    kept = "" if run.kept_step == run.steps else f", of which step {run.kept_step:,} is kept as the best"
    print(f"{adapter.path}  {format_bytes(adapter.bytes)}, {steps}{kept}")
    print_result(adapter.manifest.result, adapter.manifest.data.sources if adapter.manifest.data else [])
    if preference := adapter.manifest.preference:
        print_preference(preference)
    if labels := adapter.manifest.labels:
        print("".join(f"{name:13} {text}\n" for name, text in labels.lines()), end="")
    if general := adapter.manifest.general:
        print(f"general text: {general.describe_change()}")
    print_picture(adapter.path / LOSS_PLOT_FILE, "losses of the run")
    if (confusion := adapter.path / CONFUSION_FILE).is_file():
        print_picture(confusion, "labels of held-out rows")
    _show_samples(adapter)
    _show_next_commands(adapter)


def _show_samples(adapter: Adapter) -> None:
    """Print the texts of base and adapter at the end of the run side by side."""
    columns: dict[str, list[tuple[str, str]]] = {BASE_LABEL: [], adapter.name: []}
    for sample in adapter.final_samples:
        prompt, *texts = map(escape_control, sample.shown)
        for column, text in zip(columns.values(), texts, strict=True):
            column.append((quote(prompt) if sample.chat else prompt, text))
    if adapter.final_samples:
        print()
        show_columns(columns, "sample")
        print()


def _show_next_commands(adapter: Adapter) -> None:
    """Print commands for the adapter to stderr, as they are no result."""
    from ..data.row_template import find_question

    library = adapter.path.parent
    option = "" if library == TrainConfig().adapters_dir else f" --adapters-dir {shlex.quote(str(library))}"
    prompts = [sample.prompt for sample in adapter.final_samples]
    if adapter.manifest and (template := adapter.manifest.template):
        prompts = [find_question(*template, prompt) for prompt in prompts]
    shown = [prompt for prompt in prompts if len(prompt) <= MAX_QUOTED]
    prompt = quote_argument(min(shown, key=lambda prompt: ("\n" in prompt, len(prompt)), default="Your prompt"))
    print_stderr("Next:")
    commands = [f"generate --adapter {adapter.name}", f"compare {prompt} --adapter {adapter.name}", "serve"]
    if adapter.manifest and adapter.manifest.labels:
        commands[0] = f"classify {prompt} --adapter {adapter.name}"
    for command in commands:
        print_stderr(f"  python cli.py {command}{option}")


def _show_probe(probe: RateProbe) -> None:
    rows = []
    for trial in probe.trials:
        loss, gap = "diverged", ""
        if trial.loss is not None:
            loss, gap = f"{trial.loss:.3f}", format_gain(trial.gap, trial.standard_error)
        rows.append((f"{trial.learning_rate:g}", loss, gap))
    print_table(rows, ("learning rate", "held-out loss", "gap to the best"))
    print(
        f"probe: {len(rows)} runs of {format_count(probe.steps, 'step')} on {format_count(probe.rows, 'held-out row')}, in "
        f"{format_duration(probe.seconds)}: the run took {probe.learning_rate:g}"
    )


def _show_sweep(result: "SweepResult") -> None:
    table, base, *sentences = result.summary()
    print_parts([table, base])
    figure = "loss" if result.base_accuracy is None else "error (1 - accuracy)"
    print_picture(result.folder / SWEEP_PLOT_FILE, f"held-out {figure} against size and training time")
    print_parts(sentences)
    recommended = load_adapter_folder(result.path)
    _show_samples(recommended)
    _show_next_commands(recommended)


def methods(as_json: JsonOption = False) -> None:
    """List the methods for `train --method`.

    Docs: docs/methods.md
    """
    if as_json:
        show_json([{"name": name, **dataclasses.asdict(method)} for name, method in METHODS.items()])
    else:
        rows = [(name, f"{method.learning_rate:g}", method.when) for name, method in METHODS.items()]
        print_table(rows, ("method", "learning rate on SmolLM2-135M", "when to choose it"))
