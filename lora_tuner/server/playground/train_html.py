"""HTML of the tab that trains: uploads, rows as the model sees them, the plan, and runs with their samples."""

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from ...adapters.plots import AverageLoss
from ...adapters.samples import Sample
from ...analysis.lengths import describe_span
from ...config import TrainConfig
from ...text import (
    describe_coverage,
    display_name,
    escape_control,
    format_bytes,
    format_count,
    format_duration,
    format_rows,
    format_share,
    format_share_of,
    shorten,
)
from ...training.jobs import Job, JobState, LiveRun
from . import charts, html
from .commands import Json

MAX_TEXT = 2_000  # characters of a row that are shown
_MAX_BARS = 24
DATA_HINT = "csv, tsv, json, jsonl, txt, md, html, docx, xlsx, parquet and more; several files are one dataset."
LINE_BREAK = "\u21b5\n"

# Sends the files to `uploads`, one after another, and then tells the page the number of the upload.
UPLOAD_SCRIPT = """
const status = text => { element.querySelector("[role=status]").textContent = text };
const send = (url, file, done) => new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.upload.onprogress = event => status(`${done}${file.name}: ${Math.floor(event.loaded / file.size * 100)}%`);
    request.onload = () => {
        if (request.status === 201) return resolve();
        let text = `The server answered with status ${request.status}.`;
        try { text = JSON.parse(request.responseText).error.message } catch {}
        reject(text);
    };
    request.onerror = () => reject(`${file.name} was not sent: the server refused it, or has gone.`);
    request.open("PUT", url);
    request.send(file);
});
const sendAll = async files => {
    if (!files.length) return;
    const limit = Number(element.querySelector("[data-limit]").dataset.limit);
    const large = files.find(file => file.size > limit);
    if (large) return trigger("upload", {id: "", problem: `${large.name} is too large: at most ${limit / 1e6} MB are taken.`});
    const id = [...crypto.getRandomValues(new Uint8Array(16))].map(byte => byte.toString(16).padStart(2, "0")).join("");
    try {
        for (const [index, file] of files.entries()) {
            const done = files.length > 1 ? `${index + 1} of ${files.length}, ` : "";
            const path = element.querySelector("[data-path]").dataset.path;
            await send(`${path}/${id}/${encodeURIComponent(file.name)}`, file, done);
        }
        trigger("upload", {id, problem: ""});
    } catch (problem) { trigger("upload", {id: "", problem: String(problem)}) }
};
element.addEventListener("change", event => sendAll([...event.target.files]));
element.addEventListener("dragover", event => { event.preventDefault(); element.classList.add("over") });
element.addEventListener("dragleave", () => element.classList.remove("over"));
element.addEventListener("drop", event => {
    event.preventDefault();
    element.classList.remove("over");
    sendAll([...event.dataTransfer.files]);
});
"""


def drop_zone(
    limit: int,
    files: Sequence[str] = (),
    problem: str = "",
    *,
    label: str = "Files to train on",
    hint: str = DATA_HINT,
    path: str = "uploads",
) -> Markup:
    """Show where files are dropped, and those of the last upload or why there is none.

    They are sent to a path of `uploads`.
    """
    text = f"Uploaded: {', '.join(files)}." if files else ""
    return Markup(
        '<div class="drop" data-limit="{}" data-path="{}"><label>Drop files here, or choose them '
        '<input type="file" multiple aria-label="{}"></label>'
        '<p class="note">{}</p><p class="note" role="status">{}</p>{}</div>'
    ).format(limit, path, label, hint, text, html.failure(problem) if problem else "")


def heading(text: str) -> Markup:
    return Markup('<h2 class="heading">{}</h2>').format(text)


def busy(text: str) -> Markup:
    """Show that a command works, and its last line."""
    return Markup('<p class="note" aria-busy="true" role="status">{}</p>').format(text)


# Rows as the model sees them


def preview(data: Json, config: TrainConfig) -> Markup:
    """Show what `train --preview --json` says."""
    has_marks = any(not part["is_learned"] for row in data["rows"] for part in row["parts"])
    marks = "What is marked is learned; the rest is context." if has_marks else "All of the text is learned."
    unit = "row"
    if any(row["side"] for row in data["rows"]):
        marks, unit = "What is marked is compared; the rest is context.", "answer"
    rows = Markup("").join(_row(row, config) for row in data["rows"])
    return Markup("{}{}{}{}").format(
        html.note(f"The first of {format_count(data['train_rows'], unit)} to train on. {marks}"),
        Markup('<div class="rows">{}</div>').format(rows),
        _lengths(data["lengths"], data["measured_rows"], data["train_rows"]) if data["lengths"] else "",
        _prompts(data["sample_prompts"]) + _dropped(data),
    )


def _row(row: Json, config: TrainConfig) -> Markup:
    parts = Markup("").join(
        Markup("<p>{}<{tag}>{}</{tag}></p>").format(
            Markup("<b>{}</b> ").format(part["role"]) if part["role"] else "",
            _text(part["text"]),
            tag=Markup("mark" if part["is_learned"] else "span"),
        )
        for part in row["parts"]
    )
    use = "compared" if row["side"] else "learned"
    facts = [f"{format_count(len(row['tokens']), 'token')}, {sum(row['labels']):,} {use}"]
    if row["cut_tokens"]:
        place = "in the middle" if config.label_column else "behind them"
        facts.append(f"Max length {config.max_length} cuts {row['cut_tokens']:,} {place}")
    if row["pieces"] > 1:
        facts.append(f"in {row['pieces']} rows of at most {config.max_length}")
    tokens = Markup("").join(
        Markup('<span class="{}">{}</span>').format("learned" if learned else "context", _text(token))
        for token, learned in list(zip(row["tokens"], row["labels"], strict=True))[:MAX_TEXT]
    )
    return Markup(
        '<article><h3>Row {}{}</h3>{}<p class="facts">{}</p>'
        '<details><summary>Tokens</summary><p class="tokens">{}</p></details></article>'
    ).format(row["number"], row["side"] and f", {row['side']}", parts, "; ".join(facts), tokens)


def _shown(text: str) -> str:
    return escape_control(shorten(text.replace("\r\n", "\n"), MAX_TEXT))


def _text(text: str) -> str:
    return _shown(text).replace("\n", LINE_BREAK)


def _lengths(lengths: Json, measured: int, total: int) -> Markup:
    """Show a histogram of lengths, and what is cut."""
    histogram = lengths["histogram"]
    size = -(-len(histogram) // _MAX_BARS)
    groups = [histogram[begin : begin + size] for begin in range(0, len(histogram), size)]
    counts = [sum(bar["rows"] for bar in group) for group in groups]
    bars = Markup("").join(
        Markup(
            '<tr><th scope="row">{}</th><td><span style="--share: {:.1f}%"></span></td><td>{:,}</td></tr>'
        ).format(describe_span(group[0]["start"], group[-1]["end"]), rows / max(counts) * 100, rows)
        for group, rows in zip(groups, counts, strict=True)
    )
    figures = (
        f"Shortest {lengths['shortest']:,}, median {lengths['median']:,}, 95% up to {lengths['percentile_95']:,}, "
        f"longest {lengths['longest']:,}; {lengths['total']:,} in all."
    )
    of = f"{measured:,} of {format_rows(total)}" if measured < total else format_rows(total)
    return Markup(
        '<div class="wide" tabindex="0" role="region" aria-label="Lengths"><table class="bars">'
        "<caption>Length in {} of {}</caption>"
        "<tbody>{}</tbody></table></div>{}"
    ).format(lengths["unit"], of, bars, html.note(f"{figures} {_cuts(lengths, measured)}"))


def _cuts(lengths: Json, measured: int) -> str:
    if not lengths["cuts"]:
        return ""
    limit, share = f"Max length {lengths['max_length']:,}", format_share(lengths["used_share"] or 0)
    for key, text in (
        ("truncated_rows", f"{limit} cuts {{}}"),
        ("chunked_rows", f"{limit} divides {{}} into several"),
    ):
        if rows := lengths[key]:
            shown = f"{format_rows(rows)} ({format_share_of(rows, measured)})"
            return f"{text.format(shown)}; {share} of the tokens are used."
    return f"No row is longer than {limit}; {share} of the tokens are used."


def _prompts(prompts: Sequence[str]) -> Markup:
    if not prompts:
        return Markup("")
    items = Markup("").join(Markup("<li>{}</li>").format(_shown(prompt)) for prompt in prompts)
    return Markup(
        '<p class="note">Prompts of the samples while it trains:</p><ul class="prompts">{}</ul>'
    ).format(items)


def _dropped(data: Json) -> Markup:
    if not data["dropped"]:
        return Markup("")
    examples = Markup("").join(
        Markup("<li>{}: {}</li>").format(display_name(copy["place"]), shorten(copy["text"], 200))
        for copy in data["dropped"]
    )
    return Markup(
        "<details><summary>Left out as copies: {}, {} nearly like a held-out one</summary><ul>{}</ul></details>"
    ).format(format_rows(data["duplicates"]), format_rows(data["near_duplicates"]), examples)


def data_report(page: str) -> Markup:
    """Show the page that `data --html` has written, in a frame without scripts."""
    return Markup(
        "<details open><summary>Data report</summary>"
        '<iframe class="report" title="Data report" sandbox srcdoc="{}"></iframe></details>'
    ).format(page)


# The plan


def plan(estimate: Json) -> Markup:
    """Show what `train --plan --json` says."""
    cut = f"; {format_rows(estimate['truncated_rows'])} cut" if estimate["truncated_rows"] else ""
    precision = estimate["dtype"] if estimate["load_in"] == "full" else estimate["load_in"]
    epoch = f" (one epoch: {estimate['steps_per_epoch']:,})" if estimate["steps_per_epoch"] else ""
    facts = {
        "Training": format_duration(estimate["training_seconds"]),
        "Evaluation": f"at most {format_duration(estimate['held_out_seconds'])}",
        "Reference": format_duration(seconds) if (seconds := estimate.get("reference_seconds")) else "",
        "Probe of the learning rate": format_duration(estimate["probe_seconds"])
        if estimate["probe_steps"]
        else "",
        "Steps": f"{estimate['steps']:,}{epoch}",
        "Speed": f"{estimate['seconds_per_step']:.2f} s per step, {estimate['tokens_per_second']:,.0f} tokens/s",
        "Peak memory": format_bytes(estimate["peak_memory_bytes"]),
        "Adapter": f"{format_bytes(estimate['adapter_bytes'])}, {estimate['trained_parameters']:,} parameters",
        "Text used": format_share(estimate["used_share"]) + cut,
        "Learning rate": f"{estimate['learning_rate']:g}, {estimate['learning_rate_origin']}",
        "Base": precision + (", gradient checkpointing" if estimate["gradient_checkpointing"] else ""),
        "Coverage": describe_coverage(estimate["coverage"], estimate["not_adapted"]),
    }
    return _facts(facts)


def _facts(facts: Mapping[str, str]) -> Markup:
    lines = Markup("").join(
        Markup("<dt>{}</dt><dd>{}</dd>").format(key, value) for key, value in facts.items() if value
    )
    return Markup('<dl class="facts-list">{}</dl>').format(lines)


# Runs


def job_label(job: Job) -> str:
    """Describe a job in the list of runs."""
    state = str(job.state)
    if job.state == JobState.WAITING and job.ahead:
        state += f" for {format_count(job.ahead, 'run')}"
    step = f", step {job.step:,}" + (f" of {job.total:,}" if job.total else "") if job.step or job.total else ""
    return f"{job.name}: {state}{step}"


def run(job: Job, live: LiveRun, problem: str, message: str) -> Markup:
    """Show state, figures and losses of a run; `message` is its last one."""
    metrics, total = live.metrics, job.total or live.total
    average = AverageLoss(total or len(metrics))
    smoothed = [average.update(entry["loss"]) for entry in metrics if "loss" in entry]
    held_out = [entry[key] for entry in metrics for key in ("eval_loss", "eval_subset_loss") if key in entry]
    name = "Held-out loss" if live.objective == "sft" else "Held-out loss of chosen answers"
    facts = {
        "Data": ", ".join(display_name(name) for name in job.data),
        "Loss, smoothed": f"{smoothed[-1]:.3f}" if smoothed else "",
        name: f"{held_out[0]:.3f} at first, now {held_out[-1]:.3f}" if held_out else "",
        "Speed": f"{live.tokens_per_second:,.0f} tokens/s" if live.tokens_per_second else "",
        "Time left": format_duration(live.seconds_left)
        if live.seconds_left and job.state in (JobState.RUNNING, JobState.PAUSED)
        else "",
        "Memory": format_bytes(live.memory_bytes) if live.memory_bytes else "",
    }
    return Markup('<section class="run" aria-label="Run {}"><h2>{}</h2>{}{}{}{}</section>').format(
        job.name,
        job_label(job),
        Markup('<progress value="{}" max="{}" aria-label="Steps"></progress>').format(job.step, total or 1)
        if job.state.is_alive
        else "",
        html.failure(problem) if problem else html.note(_advice(job, message)),
        _facts(facts),
        charts.loss_chart(metrics, total, objective=live.objective) if metrics else "",
    )


def _advice(job: Job, message: str) -> str:
    """Say what happens now, and what can be done."""
    return {
        JobState.WAITING: "It starts when the runs before it have ended.",
        JobState.STARTING: message or "Base and data are being loaded.",
        JobState.RUNNING: "It goes on when this page is closed.",
        JobState.PAUSED: "It keeps its memory until it continues.",
        JobState.STOPPED: "Its checkpoint is kept: Resume goes on exactly where it stopped.",
        JobState.FAILED: "It has failed.",
        JobState.FINISHED: "The adapter is in the library.",
    }[job.state]


def samples(shown: Sequence[Sample]) -> Markup:
    """Show the texts of base and adapter for each prompt side by side, the newest first."""
    if not shown:
        return Markup("")
    prompts = list(dict.fromkeys(sample.prompt for sample in shown))
    base = {sample.prompt: sample.base for sample in shown}
    steps: dict[int, dict[str, str]] = {}
    for sample in shown:
        steps.setdefault(sample.step, {})[sample.prompt] = sample.adapter
    head = Markup("").join(Markup('<th scope="col">{}</th>').format(_shown(prompt)) for prompt in prompts)
    lines = [("base", base), *((f"step {step:,}", texts) for step, texts in sorted(steps.items(), reverse=True))]
    body = Markup("").join(
        Markup('<tr><th scope="row">{}</th>{}</tr>').format(
            name,
            Markup("").join(Markup("<td>{}</td>").format(_shown(texts.get(prompt, ""))) for prompt in prompts),
        )
        for name, texts in lines
    )
    return Markup(
        '<div class="wide" tabindex="0" role="region" aria-label="Samples"><table class="samples">'
        "<caption>The same prompts, continued with one seed</caption>"
        '<thead><tr><th scope="col">prompt</th>{}</tr></thead><tbody>{}</tbody></table></div>'
    ).format(head, body)


def log(text: str) -> Markup:
    return Markup('<pre class="command" tabindex="0">{}</pre>').format(text)
