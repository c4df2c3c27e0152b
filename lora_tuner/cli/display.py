"""How events and data look in a terminal. Data goes to stdout; progress and notices go to stderr."""

import datetime
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..adapters.adapter import Adapter
from ..adapters.library import Ancestor
from ..adapters.manifest import Manifest
from ..errors import AdapterError, Notice, Progress

if TYPE_CHECKING:
    from ..adapters.compatibility import CompatibilityReport
    from ..adapters.hub_sync import TransferResult
    from ..convert.blend import BlendResult
    from ..convert.compress import CompressResult
    from ..convert.export_gguf import ExportResult
    from ..convert.merge import MergeResult
    from ..evaluation import GainMatrix
    from ..inference.generator import GenerationOutput
    from ..training.inputs import PreviewedRow
    from ..training.profiling import RunEstimate
    from ..training.sweep import SweepResult
from ..text import CONTROL_CHARACTERS, escape_control, format_bytes, format_counts, format_duration, one_line

BASE_LABEL = "(base)"  # no adapter can be called that
MIN_COLUMN_WIDTH = 36  # characters a column of text needs to be readable
LINE_SECONDS = 10.0  # seconds between lines of progress where no bar can be drawn


class Display:
    """Shows events: a live bar on a terminal, else a line now and then."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.bar: Any = None
        self.task: Any = None
        self.stage = ""
        self.first = 0
        self.started = self.said = 0.0

    def __call__(self, event: Notice | Progress) -> None:
        if isinstance(event, Notice):
            self.console.print(Text(escape_control(event.text)), soft_wrap=True)
            return
        if event.stage != self.stage:
            self._begin(event)
        if self.bar is not None:
            self.bar.update(self.task, completed=event.done, total=event.total, detail=event.detail)
        elif event.done == event.total or time.monotonic() - self.said > LINE_SECONDS:
            self.said = time.monotonic()
            left = (self.said - self.started) / max(event.done - self.first, 1) * (event.total - event.done)
            parts = [f"{event.stage} {event.done}/{event.total}", event.detail]
            print_stderr("  ".join(part for part in [*parts, f"{format_duration(left)} left" if left else ""] if part))
        if event.done >= event.total:
            self.close()

    def _begin(self, event: Progress) -> None:
        self.close()
        self.stage, self.first, self.started, self.said = event.stage, event.done, time.monotonic(), time.monotonic()
        if not self.console.is_terminal:
            return
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self.bar = Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.bar.start()
        self.task = self.bar.add_task(escape_control(event.stage), total=event.total, completed=event.done, detail="")

    def close(self) -> None:
        """Leave the bar as it stands and begin a new line."""
        if self.bar is not None:
            self.bar.stop()
        self.bar, self.stage = None, ""


def print_stderr(text: str) -> None:
    print(one_line(text), file=sys.stderr)


def show_text(text: str) -> None:
    """What a model writes, as it is; on a terminal without what that would obey, for an adapter may be a stranger's."""
    print(escape_control(text) if sys.stdout.isatty() else text, end="", flush=True)


def show_json(data: Any) -> None:
    text = json.dumps(data, indent=2, ensure_ascii=False)
    print(CONTROL_CHARACTERS.sub(lambda match: f"\\u{ord(match[0]):04x}", text))


def print_table(rows: Iterable[Sequence[str]], header: Sequence[str] = ()) -> None:
    grid = Table(box=None, pad_edge=False, show_header=bool(header), header_style="bold")
    for name in header:
        grid.add_column(Text(escape_control(name)), overflow="fold")
    for row in rows:
        grid.add_row(*(Text(escape_control(cell), overflow="fold") for cell in row))
    _console().print(grid)


def _console() -> Console:
    """Standard output; as wide as need be when it is a pipe, for who reads that wants a row on a line."""
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 10_000
    return console


def show_trained(adapter: Adapter) -> None:
    manifest = adapter.manifest
    assert manifest is not None
    assert manifest.run is not None
    run = manifest.run
    print(f"{adapter.path}  {format_bytes(adapter.bytes)}, {run.steps:,} steps in {format_duration(run.seconds)}")
    for line in _result_lines(manifest):
        print(line)


def show_sweep(ladder: "SweepResult") -> None:
    rows = [
        (
            it.name,
            str(it.rank),
            f"{it.learning_rate:g}",
            *(
                (f"{it.loss:.4f}", f"{it.gap:.4f} ± {it.standard_error:.4f}")
                if it.loss is not None
                else ("diverged", "")
            ),
            format_bytes(it.bytes),
            format_duration(it.seconds),
        )
        for it in ladder.trials
    ]
    print_table(rows, ("adapter", "rank", "learning rate", "held-out loss", "worse than the best", "size", "training"))
    print(f"the base has {ladder.base_loss:.4f}; the picture is {ladder.folder / 'sweep.png'}")
    print(f"keep {ladder.recommended}: the smallest that the best does not beat by more than a standard error")


def _result_lines(manifest: Manifest) -> list[str]:
    result = manifest.result
    if result is None:
        return ["not measured"]
    before, after = result.perplexities
    return [
        f"held-out loss {result.base_loss:.4f} -> {result.loss:.4f}  "
        f"(gain {result.gain:.4f} ± {result.standard_error:.4f}, {result.rows} rows)",
        f"perplexity    {before:.2f} -> {after:.2f}",
    ]


def show_adapter_card(adapter: Adapter, ancestors: Sequence[Ancestor]) -> None:
    """One adapter, what people ask first coming first. `--json` has all that is known."""
    manifest, config = adapter.manifest, adapter.config
    update = f"rank {adapter.rank}, alpha {config['lora_alpha']}, on {', '.join(adapter.targets)}"
    facts: dict[str, Any] = {
        "adapter": str(adapter.path),
        "update": f"{update}; {adapter.parameters:,} parameters, {format_bytes(adapter.bytes)}",
    }
    if manifest is None:
        facts |= {
            "base": adapter.base or "not named",
            "made": "by another tool: it has no manifest (`adapters adopt` gives it one)",
        }
    else:
        facts |= {
            "worth": "\n".join(_result_lines(manifest)),
            "base": f"{manifest.base.name}: {manifest.base.weights}",
            "revision": manifest.base.revision,
            "fingerprint": manifest.base.fingerprint,
            "lineage": "\n".join(_format_ancestor(it) for it in ancestors) or None,
        }
        if manifest.data is not None:
            facts |= {
                "data": manifest.data.source,
                "where": manifest.data.where,
                "rows": format_counts(manifest.data.counts),
                "measured on": manifest.data.eval_dataset,
            }
        if manifest.run is not None:
            run = manifest.run
            facts["run"] = (
                f"{run.method}, {run.steps:,} steps, {run.tokens:,} tokens, {format_duration(run.seconds)} on {run.device} "
                f"in {run.dtype}"
            )
        facts["made by"] = manifest.made_by
        versions = ", ".join(f"{name} {it}" for name, it in manifest.versions.items())
        facts["made"] = (
            f"{manifest.created} with {versions}" if versions else f"by another tool; adopted {manifest.created}"
        )
    show_facts(facts)


def _format_ancestor(ancestor: Ancestor) -> str:
    """One line of the lineage, indented by generation."""
    location = "" if ancestor.here == ancestor.name else f", now named {ancestor.here}"
    if ancestor.here is None:
        location = ", not in this library"
    return f"{'  ' * (ancestor.generation - 1)}from {ancestor.name} ({ancestor.sha256[:12]}{location})"


def show_plan(plan: "RunEstimate") -> None:
    total = plan.base_parameters + plan.trained_parameters
    again = ", activations computed again" if plan.gradient_checkpointing else ""
    print_table(
        [
            ("steps", f"{plan.steps:,}{f' (one epoch is {plan.steps_per_epoch:,})' if plan.steps_per_epoch else ''}"),
            ("seconds a step", f"{plan.seconds_per_step:.2f} ({plan.tokens_per_second:,.0f} tokens/s)"),
            ("training", format_duration(plan.training_seconds)),
            ("measuring held-out loss", format_duration(plan.held_out_seconds)),
            ("peak memory", format_bytes(plan.peak_memory_bytes)),
            ("base", f"{plan.dtype if plan.load_in == 'full' else plan.load_in}{again}"),
            ("rows cut short", f"{plan.truncated_share:.1%}"),
            ("parameters trained", f"{plan.trained_parameters:,} of {total:,} ({plan.trained_parameters / total:.2%})"),
            ("adapter", format_bytes(plan.adapter_bytes)),
        ]
    )


def show_preview(rows: Sequence["PreviewedRow"]) -> None:
    for number, row in enumerate(rows, 1):
        labels = sum(row.labels)
        pieces = [text if label else f"[{text}]" for text, label in zip(row.tokens, row.labels, strict=True)]
        broken = "; \ufffd is a part of a character" if any("\ufffd" in piece for piece in pieces) else ""
        print(f"row {number}\n  before  {row.before!r}\n  after   {row.after!r}")
        print(
            f"  {len(pieces)} tokens, {labels} of them learnt (the others in brackets){broken}\n  {'|'.join(pieces)}\n"
        )


def show_adapters(found: Iterable[tuple[str, Adapter | AdapterError]]) -> None:
    rows, broken = [], []
    for name, adapter in found:
        if isinstance(adapter, AdapterError):
            broken.append(f"{name} is broken: {adapter}")
            continue
        manifest = adapter.manifest
        data, result = (manifest.data, manifest.result) if manifest else (None, None)
        rows.append(
            (
                name,
                adapter.base,
                str(adapter.rank),
                ", ".join(adapter.targets) if len(adapter.targets) < 3 else f"{len(adapter.targets)} kinds",
                Path(data.name).name if data else "?",
                format_bytes(adapter.bytes),
                f"{result.gain:.3f} ± {result.standard_error:.3f}" if result else "?",
                _format_age(manifest.created) if manifest else "?",
                ", ".join(parent.name for parent in manifest.parents) if manifest else "?",
            )
        )
    if rows:
        print_table(rows, ("name", "base", "rank", "targets", "data", "size", "gain", "age", "parent"))
    for text in broken:
        print_stderr(text)


def _format_age(created: str) -> str:
    """How long ago that was; `?` for what is no time."""
    try:
        then = datetime.datetime.fromisoformat(created)
        seconds = (datetime.datetime.now(datetime.UTC) - then).total_seconds()
    except (ValueError, TypeError):  # TypeError: without its time zone
        return "?"
    return format_duration(max(seconds, 0.0))


def show_compared(answers: Sequence["GenerationOutput"]) -> None:
    """The answers to one prompt, side by side where the terminal is wide enough for that, else one under another."""
    names = list(dict.fromkeys(answer.adapter or BASE_LABEL for answer in answers))
    columns = {name: [it.text for it in answers if (it.adapter or BASE_LABEL) == name] for name in names}
    console = Console(highlight=False)
    prompt = answers[0].prompt
    if console.width >= MIN_COLUMN_WIDTH * len(names):
        grid = Table(box=None, padding=(0, 3, 1, 0), pad_edge=False, header_style="bold", expand=True)
        for name in names:
            grid.add_column(Text(escape_control(name)), ratio=1)
        for row in zip(*columns.values(), strict=True):
            grid.add_row(*(Text(escape_control(prompt + text)) for text in row))
        console.print(grid)
    else:
        for name, texts in columns.items():
            for text in texts:
                console.print(Text(f"--- {escape_control(name)}", "bold"))
                print(f"{escape_control(prompt + text)}\n")


def show_gains(matrix: "GainMatrix") -> None:
    """Losses and gains, an adapter a row and a set of rows a column; a cell a line where that is too wide."""
    bases = [next((line[i] for line in matrix.cells if line[i]), None) for i in range(len(matrix.sets))]
    losses: list[tuple[str, ...]] = [
        (BASE_LABEL, *(f"{it.base_loss:.4f} ({it.perplexities[0]:.2f})" if it else "" for it in bases)),
        *(
            (name, *(f"{it.loss:.4f} ({it.perplexities[1]:.2f})" if it else "" for it in line))
            for name, line in zip(matrix.adapters, matrix.cells, strict=True)
        ),
    ]
    gains = [
        (name, *(f"{it.gain:+.4f} ± {it.standard_error:.4f}" if it else "" for it in line))
        for name, line in zip(matrix.adapters, matrix.cells, strict=True)
    ]
    sets = [f"{it.name}\n{len(it.texts)} rows" for it in matrix.sets]
    print("held-out loss, in nats a token (perplexity), on the rows of")
    _print_matrix(losses, sets)
    print(f"\ngain over {one_line(matrix.base)}, with its standard error; below zero it has forgotten")
    _print_matrix(gains, sets)
    for it in matrix.sets:
        if it.missing:
            print_stderr(f"{it.name} has no column: {it.missing}.")


def _print_matrix(rows: Sequence[Sequence[str]], columns: Sequence[str]) -> None:
    present = [i for i in range(len(columns)) if any(row[i + 1] for row in rows)]
    names = [name.partition("\n")[0] for name in columns]
    widths = [max(map(len, column)) + 2 for column in zip(*rows, ("", *names), strict=True)]
    if sum(widths) <= _console().width:
        print_table(((row[0], *(row[i + 1] for i in present)) for row in rows), ("", *(columns[i] for i in present)))
    else:
        print_table((row[0], f"on {names[i]}", row[i + 1]) for row in rows for i in present)


def show_merged(merged: "MergeResult") -> None:
    """Where the model is, and how near it is to base and adapter."""
    proof = merged.comparison
    print(merged.path)
    print(
        f"read back, beside base and adapter: logits differ by {proof.max_logit_difference:.2g} at the most, best tokens are the same at "
        f"{proof.top1_agreement:.2%} of positions"
    )
    if proof.losses:
        before, after = (math.exp(min(loss, 700.0)) for loss in proof.losses)
        print(f"perplexity {before:.4f} -> {after:.4f} ({proof.rows} held-out rows)")


def show_blended(blended: "BlendResult") -> None:
    adapter, proof = blended.adapter, blended.comparison
    assert adapter.manifest is not None
    print(
        one_line(f"{adapter.path}  {format_bytes(adapter.bytes)}, rank {_ranks(adapter)}: {adapter.manifest.made_by}")
    )
    print(
        f"read back, beside its update in the base's weights: logits differ by {proof.max_logit_difference:.2g} at the most"
    )
    if any(blended.lost_energy.values()):
        print(
            f"rank cut from {blended.exact_rank}: {blended.total_lost_energy:.2%} of the energy is lost; {_largest_loss(blended.lost_energy)}"
        )
    for line in _result_lines(adapter.manifest):
        print(line)
    if len(blended.results) > 1:
        for name, it in blended.results.items():
            print(one_line(f"  on {name}: gain {it.gain:.4f} ± {it.standard_error:.4f}, {it.rows} rows"))


def show_compressed(compressed: "CompressResult") -> None:
    before, after = compressed.bytes
    ranks = [sorted(it) for it in zip(*compressed.ranks.values(), strict=True)]
    was, now = (f"{it[0]}" if it[0] == it[-1] else f"{it[0]} to {it[-1]}" for it in ranks)
    print(
        f"{compressed.adapter.path}  {format_bytes(after)} of {format_bytes(before)} ({after / before:.0%}), rank {now}; it was {was}"
    )
    print(f"{compressed.total_lost_energy:.2%} of the energy is lost; {_largest_loss(compressed.lost_energy)}")
    if compressed.results is None:
        print("not measured")
        return
    full, reduced = compressed.results
    print(f"held-out loss {full.loss:.4f} -> {reduced.loss:.4f}; the base has {full.base_loss:.4f} ({full.rows} rows)")


def _ranks(adapter: Adapter) -> str:
    ranks = {adapter.rank_of(module) for module in adapter.modules}
    return f"{min(ranks)}" if len(ranks) == 1 else f"{min(ranks)} to {max(ranks)}"


def _largest_loss(lost: dict[str, float]) -> str:
    worst = sorted(lost, key=lambda module: -lost[module])[:3]
    return "most in " + ", ".join(f"{module} ({lost[module]:.2%})" for module in worst) + "; --json has each layer"


def show_exported(exported: "ExportResult") -> None:
    print(
        f"{exported.path}  {format_bytes(exported.bytes)}, {exported.tensors} tensors, read back: {exported.error:.1e} off at most"
    )


def show_compatibility(name: str, verdict: "CompatibilityReport") -> None:
    print(one_line(f"{name}: {verdict.tool} {'takes it' if verdict.accepted else 'does not take it'}"))
    for line in [*verdict.errors, *verdict.notes]:
        print(one_line(f"- {line}"))


def show_transfer(parcel: "TransferResult") -> None:
    print_table([(name, format_bytes(count)) for name, count in parcel.files.items()])
    if parcel.url or parcel.adapter:
        print(parcel.url or (parcel.adapter and parcel.adapter.path))


def show_facts(facts: dict[str, Any]) -> None:
    """Nested facts as a two-column table, without what is not known."""
    print_table((key, _plain(value)) for key, value in facts.items() if value not in (None, {}, []))


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{key}: {_plain(entry)}" for key, entry in value.items() if entry not in (None, {}, []))
    if isinstance(value, list | tuple):
        texts = [str(entry) for entry in value]
        return ("\n" if any(" " in text for text in texts) else ", ").join(texts)
    return str(value)
