"""What people look at: the loss curve as a picture, and the model card."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import HELD_OUT_LENGTH
from .manifest import BaseFacts, Manifest
from .store import Adapter

if TYPE_CHECKING:
    from .evaluation import GainMatrix

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank may be


def write_metrics(history: Sequence[dict[str, Any]], path: Path) -> None:
    """One JSON object a line, as the trainer logged them: `step` with `loss`, or with `eval_loss`."""
    path.write_text("".join(json.dumps(entry) + "\n" for entry in history), encoding="utf-8")


def plot_loss(history: Sequence[dict[str, Any]], manifest: Manifest, path: Path) -> None:
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
    axes.set_title(f"{_shown(manifest.data.name)} on {_shown(manifest.base.name)}", parse_math=False)
    if steps or held_out:
        axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Software": None})


def plot_gains(matrix: "GainMatrix", path: Path) -> None:
    """The gain matrix as a heat map: blue where an adapter helps, red where it has forgotten, grey where rows are missing."""
    import numpy as np
    from matplotlib.figure import Figure

    gains = np.array([[np.nan if cell is None else cell.gain for cell in line] for line in matrix.cells])
    most = float(np.nanmax(np.abs(gains))) if np.isfinite(gains).any() else 0.0
    title = f"Gain over {_shown(matrix.base)} (nats per token)"
    longest = 0.1 * max(map(len, [*matrix.adapters, *(_shown(it.name) for it in matrix.sets)]))  # inches, about
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
        range(len(matrix.sets)), [_shown(it.name) for it in matrix.sets], rotation=30, ha="right", parse_math=False
    )
    axes.set_yticks(range(len(matrix.adapters)), matrix.adapters, parse_math=False)
    axes.set(xlabel="measured on the held-out rows of", ylabel="adapter")
    axes.set_title(title, parse_math=False, fontsize=10)
    figure.colorbar(image)
    figure.savefig(path, format="png", metadata={"Software": None})


def model_card(adapter: Adapter, name: str) -> str:
    """The README.md of an adapter: Hub metadata, then what it is, how well it does, and how to load it."""
    from huggingface_hub import ModelCardData

    manifest = adapter.manifest
    assert manifest is not None
    assert manifest.data is not None
    assert manifest.run is not None
    metadata = ModelCardData(
        base_model=_hub_id(manifest.base),
        datasets=["stanfordnlp/imdb"] if manifest.data.name == "imdb" else None,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", "lora_tuner"],
    )
    counts, run, result = manifest.data.counts, manifest.run, manifest.result
    base, config = _shown(manifest.base.name), adapter.config
    rows = [
        ("Base", f"{base} ({manifest.base.weights})"),
        ("Update", f"LoRA, rank {config['r']}, alpha {config['lora_alpha']}, on {', '.join(adapter.targets)}"),
        ("Size", f"{adapter.parameters:,} parameters, {adapter.bytes / 1e6:.1f} MB"),
        ("Made from", ", ".join(f"{parent.name} ({parent.sha256[:12]})" for parent in manifest.parents)),
        ("Data", _shown(manifest.data.source)),
        ("Only", ", ".join(manifest.data.where)),
        ("Rows", ", ".join(f"{count:,} {key.replace('_', ' ')}" for key, count in counts.items() if count)),
        (
            "Run",
            f"{run.steps:,} steps, {run.tokens:,} tokens, {run.seconds / 60:.1f} minutes on {run.device} in {run.dtype}",
        ),
        ("Measured on", _shown(manifest.data.eval_dataset) if manifest.data.eval_dataset else ""),
    ]
    if result:
        rows += [
            ("Held-out loss", f"{result.loss:.4f} nats a token; the base has {result.base_loss:.4f}"),
            ("Gain", f"{result.gain:.4f} ± {result.standard_error:.4f} (standard error, {result.rows} rows, paired)"),
            ("Perplexity", "{1:.2f}; the base has {0:.2f}".format(*result.perplexities)),
        ]
    table = "\n".join("| {} | {} |".format(key, value.replace("|", "\\|")) for key, value in rows if value)
    return f"""---
{metadata.to_yaml().strip()}
---

# {name}

A LoRA adapter: it makes {base} write like {_shown(manifest.data.name)}.

| | |
| --- | --- |
{table}

The loss is summed over tokens, each held-out row alone and cut at {HELD_OUT_LENGTH} tokens at the most, its end of text included.
`run.yaml` repeats the run; `manifest.json` holds these figures, and the hashes of base, data and weights.

![Loss](loss.png)

## Use
{_use(adapter, name, _hub_id(manifest.base) or f"path/to/{base}")}"""


def _use(adapter: Adapter, name: str, repo: str) -> str:
    """How other tools load it. vLLM 0.33 and llama.cpp's converter of November 2026 were read for what they cannot."""
    config = adapter.config
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
    merge = f"merge it first: `python cli.py merge path/to/{name} --out merged/{name}`."
    if config.get("fan_in_fan_out") or config.get("use_dora"):
        kind = "DoRA" if config.get("use_dora") else "adapters on this kind of layer (GPT-2's)"
        return f"{text}\nvLLM and llama.cpp load no {kind}: {merge}\n"
    ranks = {adapter.rank_of(module) for module in adapter.modules}
    largest = next((rank for rank in VLLM_RANKS if rank >= max(ranks)), None)
    text += (
        f"""
With vLLM, where `{name}` is then the name of a model beside the base:

```bash
vllm serve {repo} --enable-lora --max-lora-rank {largest} --lora-modules {name}=path/to/{name}
```
"""
        if largest
        else f"\nvLLM takes ranks up to {VLLM_RANKS[-1]}: {merge}\n"
    )
    if config.get("use_rslora") or config.get("alpha_pattern"):
        return f"{text}\nllama.cpp would scale it wrongly, as it knows neither rsLoRA nor alphas of single layers: {merge}\n"
    return f"""{text}
With llama.cpp, over the base as GGUF; `path/to/base` needs the base's config.json alone:

```bash
python convert_lora_to_gguf.py --base path/to/base --outfile {name}.gguf path/to/{name}
llama-completion -m base.gguf --lora {name}.gguf -no-cnv -n 60 -p "Once"
```
"""


def _hub_id(base: BaseFacts) -> str | None:
    """The base's id on the Hub; None for a folder, which is called as it was given and has no revision."""
    return base.repo if base.revision or base.repo != base.name else None


def _shown(name: str) -> str:
    """A name for strangers: of a path on this machine, its last part."""
    path = Path(os.path.expanduser(name))
    return path.resolve().name if path.is_absolute() or path.exists() else name
