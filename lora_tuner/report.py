"""What people look at: the loss curve as a picture, and the model card."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from . import portable
from .config import HELD_OUT_LENGTH, MOST
from .errors import AdapterError
from .files import shown
from .manifest import BaseFacts, DataFacts, Manifest, RunFacts
from .store import PLOT, SPECTRUM, Adapter

if TYPE_CHECKING:
    from .evaluation import GainMatrix

MAX_METRICS = 50_000_000  # bytes of a curve


def write_metrics(history: Sequence[dict[str, Any]], path: Path) -> None:
    """One JSON object a line, as the trainer logged them: `step` with `loss`, or with `eval_loss`."""
    path.write_text("".join(json.dumps(entry) + "\n" for entry in history), encoding="utf-8")


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The steps and losses of what `write_metrics` wrote. Raises AdapterError for what nobody could draw, whosever it is."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_METRICS:  # a pipe would never end
            raise ValueError("it is missing, or too large to be one")
        entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        found = [{key: float(entry[key]) for key in ("step", "loss", "eval_loss") if key in entry} for entry in entries]
        if not all("step" in entry and all(0 <= value <= MOST for value in entry.values()) for entry in found):
            raise ValueError("a step or a loss is no number that can be drawn")
    except (OSError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise AdapterError(f"{path} holds no curve: {error}.") from error
    return found


def plot_loss(history: Sequence[dict[str, Any]], manifest: Manifest, to: Path | IO[bytes]) -> None:
    """Training loss over steps, each step and smoothed, with the held-out losses."""
    from matplotlib.figure import Figure

    assert manifest.data is not None
    assert manifest.run is not None
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    steps = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    if steps:
        axes.plot(*zip(*steps, strict=True), color="0.75", linewidth=1, label="training, each step")
        smooth, average = [], steps[0][1]
        for step, loss in steps:
            average += 0.1 * (loss - average)
            smooth.append((step, average))
        axes.plot(*zip(*smooth, strict=True), color="tab:blue", label="training, smoothed")
    held_out = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    if manifest.result:
        held_out = {0: manifest.result.base_loss} | held_out | {manifest.run.kept_step: manifest.result.loss}
    if held_out:
        axes.plot(*zip(*sorted(held_out.items()), strict=True), "o-", color="tab:orange", label="held out")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    # A "$" in a file's name is no formula.
    axes.set_title(f"{shown(manifest.data.name)[:60]} on {shown(manifest.base.name)[:60]}", parse_math=False)
    if steps or held_out:
        axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(to, metadata={"Software": None})


def plot_gains(matrix: "GainMatrix", path: Path) -> None:
    """The gain matrix as a heat map: blue where an adapter helps, red where it has forgotten, grey where rows are missing."""
    import numpy as np
    from matplotlib.figure import Figure

    gains = np.array([[np.nan if cell is None else cell.gain for cell in line] for line in matrix.cells])
    most = float(np.nanmax(np.abs(gains))) if np.isfinite(gains).any() else 0.0
    title = f"Gain over {shown(matrix.base)} (nats per token)"
    longest = 0.1 * max(map(len, [*matrix.adapters, *(shown(it.name) for it in matrix.sets)]))  # inches, about
    size = 2.2 + longest + max(1.1 * len(matrix.sets), 0.08 * len(title)), 1.8 + longest + 0.6 * len(matrix.adapters)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("0.85")
    image = axes.imshow(gains, cmap="RdBu", vmin=-most or -1.0, vmax=most or 1.0, aspect="auto")
    for row, line in enumerate(matrix.cells):
        for column, cell in enumerate(line):
            text = "missing" if cell is None else f"{cell.gain:+.3f}\n± {cell.standard_error:.3f}"
            strong = cell is not None and abs(cell.gain) > 0.6 * most
            axes.text(column, row, text, ha="center", va="center", fontsize=8, color="white" if strong else "black")
    axes.set_xticks(
        range(len(matrix.sets)), [shown(it.name) for it in matrix.sets], rotation=30, ha="right", parse_math=False
    )
    axes.set_yticks(range(len(matrix.adapters)), matrix.adapters, parse_math=False)
    axes.set(xlabel="measured on the held-out rows of", ylabel="adapter")
    axes.set_title(title, parse_math=False, fontsize=10)
    figure.colorbar(image)
    figure.savefig(path, format="png", metadata={"Software": None})


def plot_spectra(spectra: Mapping[str, Any], ranks: Mapping[str, int], to: Path | IO[bytes]) -> None:
    """The squared singular values of each layer's update, as shares of their sum, largest first; a kind of layer a colour, and
    a dot where the layer was cut, if it was. `spectra` holds (rank,) of each layer."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    kinds = sorted({module.rpartition(".")[2] for module in spectra})
    colours = {kind: colormaps["tab10"](number % 10) for number, kind in enumerate(kinds)}
    named: set[str] = set()
    for module, squares in spectra.items():
        kind, shares = module.rpartition(".")[2], (squares / squares.sum()).tolist()
        label = None if kind in named else kind
        axes.plot(range(1, len(shares) + 1), shares, color=colours[kind], label=label, linewidth=0.7, alpha=0.6)
        if module in ranks:
            axes.plot(ranks[module], shares[ranks[module] - 1], "o", markersize=2.5, color=colours[kind])
        named.add(kind)
    axes.set(xlabel="singular value", ylabel="share of the layer's energy", yscale="log")
    axes.set_title("Spectra of the updates" + ("; a dot is where a layer is cut" if ranks else ""))
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(to, metadata={"Software": None})


def plot_ladder(
    rungs: Sequence[tuple[str, int, float, float]], base_loss: float, keep: str, to: Path | IO[bytes]
) -> None:
    """Held-out loss of adapters over their bytes, and over the seconds that they took; the one to keep stands out. `rungs` are
    (name, bytes, seconds, loss)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), dpi=120, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, place, label in ((panels[0], 1, "megabytes"), (panels[1], 2, "seconds of training")):
        for rung in rungs:
            across = float(rung[place]) / (1e6 if place == 1 else 1)
            axes.plot(across, rung[3], "o", color="tab:orange" if rung[0] == keep else "tab:blue")
            axes.annotate(rung[0], (across, rung[3]), xytext=(4, 4), textcoords="offset points", fontsize=8)
        axes.margins(x=0.15, y=0.15)
        axes.set(xlabel=label)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set(ylabel="held-out loss (nats per token)")
    figure.suptitle(f"The base has {base_loss:.4f}; keep {keep}", fontsize=10, parse_math=False)
    figure.savefig(to, format="png", metadata={"Software": None})


def facts(adapter: Adapter) -> list[tuple[str, str]]:
    """What people want to know of an adapter, as name and text. The text may be a stranger's."""
    manifest = adapter.manifest
    about = f"{shown(manifest.base.name)} ({manifest.base.weights})" if manifest else adapter.base or "not named"
    rows = [
        ("Base", about),
        ("Update", f"{_kind(adapter)}, {_ranks(adapter)}, {_alphas(adapter)}, on {', '.join(adapter.targets)}"),
        ("Size", f"{adapter.parameters:,} parameters, {adapter.bytes / 1e6:.1f} MB"),
    ]
    if manifest is None:
        return [*rows, ("Made", "by another tool: it has no manifest")]
    data, run, result = manifest.data, manifest.run, manifest.result
    rows += [
        ("Made from", ", ".join(f"{parent.name} ({parent.sha256[:12]})" for parent in manifest.parents)),
        ("Made by", f"`{manifest.made_by}`" if manifest.made_by else ""),
        *(_of_data(data) if data else []),
        ("Run", _of_run(run) if run else ""),
    ]
    if result:
        rows += [
            ("Held-out loss", f"{result.loss:.4f} nats a token; the base has {result.base_loss:.4f}"),
            ("Gain", f"{result.gain:.4f} ± {result.standard_error:.4f} (standard error, {result.rows} rows, paired)"),
            ("Perplexity", "{1:.2f}; the base has {0:.2f}".format(*result.perplexities)),
        ]
    return [(key, value) for key, value in rows if value]


def model_card(adapter: Adapter, name: str) -> str:
    """The README.md of an adapter: Hub metadata, then what it is, how well it does, and how to load it."""
    from huggingface_hub import ModelCardData

    manifest = adapter.manifest
    assert manifest is not None
    data, run = manifest.data, manifest.run
    metadata = ModelCardData(
        base_model=_hub_id(manifest.base),
        datasets=["stanfordnlp/imdb"] if data and data.name == "imdb" else None,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", "lora_tuner"],
    )
    base = _plain(shown(manifest.base.name))
    table = "\n".join("| {} | {} |".format(key, _plain(value).replace("|", "\\|")) for key, value in facts(adapter))
    return f"""---
{metadata.to_yaml().strip()}
---

# {name}

A LoRA adapter: it makes {base} write like {_plain(shown(data.name)) if data else "the text it was trained on"}.

| | |
| --- | --- |
{table}

The loss is summed over tokens, each held-out row alone and cut at {HELD_OUT_LENGTH} tokens at the most, its end of text included.
{"`run.yaml` repeats the run; " if run else ""}`manifest.json` holds these figures, and the hashes of base, data and weights.
{_pictures(adapter)}
## Use
{_SPEAK if data and data.format != "text" else ""}{_use(adapter, name, _hub_id(manifest.base) or f"path/to/{base}")}"""


_SPEAK = """
It was trained on conversations: give it text in the base's chat template (`tokenizer.apply_chat_template`), not bare prompts as
below; `python cli.py generate --chat` does so.
"""


def _plain(text: str) -> str:
    """On one line and without HTML: a manifest may come from strangers."""
    return " ".join(text.split()).replace("<", "&lt;")


def _kind(adapter: Adapter) -> str:
    return "DoRA" if adapter.config.get("use_dora") else "rsLoRA" if adapter.config.get("use_rslora") else "LoRA"


def _ranks(adapter: Adapter) -> str:
    ranks = {adapter.rank_of(module) for module in adapter.modules}
    return f"rank {min(ranks)}" if len(ranks) == 1 else f"ranks {min(ranks)} to {max(ranks)}"


def _alphas(adapter: Adapter) -> str:
    return "alphas by layer" if adapter.config.get("alpha_pattern") else f"alpha {adapter.config['lora_alpha']}"


def _of_data(data: DataFacts) -> list[tuple[str, str]]:
    return [
        ("Data", shown(data.source)),
        ("Read as", f"conversations ({data.format}): answers alone are learnt" if data.format != "text" else ""),
        ("Only", ", ".join(data.where)),
        ("Rows", ", ".join(f"{count:,} {key.replace('_', ' ')}" for key, count in data.counts.items() if count)),
        ("Measured on", shown(data.eval_dataset) if data.eval_dataset else ""),
    ]


def _of_run(run: RunFacts) -> str:
    minutes = run.seconds / 60
    return f"{run.method}, {run.steps:,} steps, {run.tokens:,} tokens, {minutes:.1f} minutes on {run.device} in {run.dtype}"


def _pictures(adapter: Adapter) -> str:
    shown = [("Loss", PLOT), ("Singular values", SPECTRUM)]
    return "".join(f"\n![{what}]({name})\n" for what, name in shown if (adapter.path / name).is_file())


def _use(adapter: Adapter, name: str, repo: str) -> str:
    """How other tools load it."""
    text = f"""
With PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({repo!r})
tokenizer = AutoTokenizer.from_pretrained({repo!r})
model = PeftModel.from_pretrained(base, "path/to/{name}")
inputs = tokenizer("Once", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=60)[0]))
```

With transformers alone, which calls PEFT itself:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({repo!r})
model.load_adapter("path/to/{name}")
```
"""
    vllm, llama_cpp = (portable.check(adapter, tool, name) for tool in ("vllm", "llama.cpp"))
    if vllm.accepted:
        text += f"""
With vLLM, where `{name}` is then the name of a model beside the base:

```bash
vllm serve {repo} --enable-lora --max-lora-rank {portable.vllm_rank(adapter)} --lora-modules {name}=path/to/{name}
```
"""
    if llama_cpp.accepted:
        text += f"""
With llama.cpp, over the base as GGUF:

```bash
python cli.py export path/to/{name} --to gguf --out {name}.gguf
llama-completion -m base.gguf --lora {name}.gguf -no-cnv -n 60 -p "Once"
```
"""
    for verdict in (vllm, llama_cpp):
        text += "".join(f"\n{obstacle}.\n" for obstacle in verdict.obstacles)
    return text


def _hub_id(base: BaseFacts) -> str | None:
    """The base's id on the Hub; None for a folder, which is called as it was given and has no revision."""
    return base.repo if base.revision or base.repo != base.name else None
