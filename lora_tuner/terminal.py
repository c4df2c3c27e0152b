"""How events and data look in a terminal. Data goes to stdout; progress and notices go to stderr."""

import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from .errors import AdapterError, Notice, Progress
from .manifest import Manifest
from .store import Adapter

if TYPE_CHECKING:
    from .cost import Plan
    from .job import PreviewedRow

LINE_EVERY = 10.0  # seconds between lines of progress where no bar can be drawn


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
            self.console.print(event.text, soft_wrap=True, markup=False)
            return
        if event.stage != self.stage:
            self._begin(event)
        if self.bar is not None:
            self.bar.update(self.task, completed=event.done, total=event.total, detail=event.detail)
        elif event.done == event.total or time.monotonic() - self.said > LINE_EVERY:
            self.said = time.monotonic()
            left = (self.said - self.started) / max(event.done - self.first, 1) * (event.total - event.done)
            parts = [f"{event.stage} {event.done}/{event.total}", event.detail]
            say("  ".join(part for part in [*parts, f"{duration(left)} left" if left else ""] if part))
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
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.bar.start()
        self.task = self.bar.add_task(event.stage, total=event.total, completed=event.done, detail="")

    def close(self) -> None:
        """Leave the bar as it stands and begin a new line."""
        if self.bar is not None:
            self.bar.stop()
        self.bar, self.stage = None, ""


def say(text: str) -> None:
    print(text, file=sys.stderr)


def show_json(data: Any) -> None:
    print(json.dumps(data, indent=2, ensure_ascii=False))


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    count, unit = (seconds / 60, "min") if seconds < 5400 else (seconds / 3600, "h")
    return f"{count:.1f} {unit}" if count < 10 else f"{count:,.0f} {unit}"


def size(count: float) -> str:
    return (
        f"{count / 1e9:.1f} GB"
        if count >= 1e9
        else f"{count / 1e6:.1f} MB"
        if count >= 1e5
        else f"{count / 1e3:.0f} kB"
    )


def table(rows: Iterable[Sequence[str]], header: Sequence[str] = ()) -> None:
    grid = Table(*header, box=None, pad_edge=False, show_header=bool(header), header_style="bold")
    for row in rows:
        grid.add_row(*row)
    Console(highlight=False).print(grid)


def show_trained(adapter: Adapter) -> None:
    manifest = adapter.manifest
    assert manifest is not None
    run = manifest.run
    print(f"{adapter.path}  {size(adapter.bytes)}, {run.steps:,} steps in {duration(run.seconds)}")
    for line in _result(manifest):
        print(line)


def _result(manifest: Manifest) -> list[str]:
    result = manifest.result
    if result is None:
        return ["not measured"]
    before, after = result.perplexities
    return [
        f"held-out loss {result.base_loss:.4f} -> {result.loss:.4f}  "
        f"(gain {result.gain:.4f} ± {result.standard_error:.4f}, {result.rows} rows)",
        f"perplexity    {before:.2f} -> {after:.2f}",
    ]


def show_adapter_card(adapter: Adapter) -> None:
    """One adapter, what people ask first coming first. `--json` has all that is known."""
    manifest, config = adapter.manifest, adapter.config
    update = f"rank {adapter.rank}, alpha {config['lora_alpha']}, on {', '.join(adapter.targets)}"
    facts: dict[str, Any] = {
        "adapter": str(adapter.path),
        "update": f"{update}; {adapter.parameters:,} parameters, {size(adapter.bytes)}",
    }
    if manifest is None:
        facts |= {"base": adapter.base or "not named", "made": "by another tool: it has no manifest"}
    else:
        run, counts = manifest.run, manifest.data.counts
        facts |= {
            "worth": "\n".join(_result(manifest)),
            "base": f"{manifest.base.name}: {manifest.base.weights}",
            "revision": manifest.base.revision,
            "fingerprint": manifest.base.fingerprint,
            "data": manifest.data.source,
            "where": manifest.data.where,
            "rows": ", ".join(f"{count:,} {key.replace('_', ' ')}" for key, count in counts.items() if count),
            "run": f"{run.steps:,} steps, {run.tokens:,} tokens, {duration(run.seconds)} on {run.device} in {run.dtype}",
            "made": f"{manifest.created} with {', '.join(f'{name} {it}' for name, it in manifest.versions.items())}",
        }
    show_facts(facts)


def show_plan(plan: "Plan") -> None:
    total = plan.base_parameters + plan.trained_parameters
    table(
        [
            ("steps", f"{plan.steps:,} (one epoch is {plan.steps_per_epoch:,})"),
            ("seconds a step", f"{plan.seconds_per_step:.2f} ({plan.tokens_per_second:,.0f} tokens/s)"),
            ("training", duration(plan.training_seconds)),
            ("measuring held-out loss", duration(plan.held_out_seconds)),
            ("peak memory", size(plan.peak_memory_bytes)),
            ("rows cut short", f"{plan.truncated_share:.1%}"),
            ("parameters trained", f"{plan.trained_parameters:,} of {total:,} ({plan.trained_parameters / total:.2%})"),
            ("adapter", size(plan.adapter_bytes)),
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
        result = manifest.result if manifest else None
        rows.append(
            (
                name,
                adapter.base,
                str(adapter.rank),
                Path(manifest.data.name).name if manifest else "?",
                size(adapter.bytes),
                f"{result.gain:.3f} ± {result.standard_error:.3f}" if result else "?",
                manifest.created[:10] if manifest else "?",
            )
        )
    if rows:
        table(rows, ("name", "base", "rank", "data", "size", "gain", "made"))
    for line in broken:
        say(line)


def show_facts(facts: dict[str, Any]) -> None:
    """Nested facts as a two-column table, without what is not known."""
    table((key, _plain(value)) for key, value in facts.items() if value not in (None, {}, []))


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{key}: {_plain(entry)}" for key, entry in value.items() if entry not in (None, {}, []))
    if isinstance(value, list | tuple):
        texts = [str(entry) for entry in value]
        return ("\n" if any(" " in text for text in texts) else ", ").join(texts)
    return str(value)
