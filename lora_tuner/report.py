"""What people look at: the loss curve as a picture, and the model card."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .evaluation import perplexity
from .store import Adapter, Manifest


def write_metrics(history: Sequence[dict[str, Any]], path: Path) -> None:
    """One JSON object a line, as the trainer logged them: `step` with `loss`, or with `eval_loss`."""
    path.write_text("".join(json.dumps(entry) + "\n" for entry in history), encoding="utf-8")


def plot_loss(history: Sequence[dict[str, Any]], manifest: Manifest, path: Path) -> None:
    """Training loss over steps, each step and smoothed, with the held-out losses."""
    from matplotlib.figure import Figure

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
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=f"{manifest.data.name} on {manifest.base.name}")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Software": None})


def model_card(adapter: Adapter, name: str) -> str:
    """The README.md of an adapter: Hub metadata, then what it is, how well it does, and how to load it."""
    from huggingface_hub import ModelCardData

    manifest = adapter.manifest
    assert manifest is not None
    metadata = ModelCardData(
        base_model=manifest.base.repo if "/" in manifest.base.repo and not Path(manifest.base.repo).exists() else None,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", "lora_tuner"],
    )
    counts, run, result = manifest.data.counts, manifest.run, manifest.result
    repo, config = manifest.base.repo, adapter.config
    rows = [
        ("Base", f"{manifest.base.name} ({manifest.base.weights})"),
        ("Update", f"LoRA, rank {config['r']}, alpha {config['lora_alpha']}, on {', '.join(adapter.targets)}"),
        ("Size", f"{adapter.parameters:,} parameters, {adapter.bytes / 1e6:.1f} MB"),
        ("Data", f"{manifest.data.source}; {counts['train']:,} rows to train on, {counts['held_out']:,} held out"),
        ("Rows left out", ", ".join(f"{counts[key]:,} {label}" for key, label in _LEFT_OUT if counts[key]) or "none"),
        (
            "Run",
            f"{run.steps:,} steps, {run.tokens:,} tokens, {run.seconds / 60:.1f} minutes on {run.device} in {run.dtype}",
        ),
    ]
    if result:
        rows += [
            ("Held-out loss", f"{result.loss:.4f} nats a token; the base has {result.base_loss:.4f}"),
            ("Gain", f"{result.gain:.4f} ± {result.standard_error:.4f} (standard error, {result.rows} rows, paired)"),
            ("Perplexity", f"{perplexity(result.loss):.2f}; the base has {perplexity(result.base_loss):.2f}"),
        ]
    table = "\n".join(f"| {key} | {value} |" for key, value in rows)
    return f"""---
{metadata.to_yaml().strip()}
---

# {name}

A LoRA adapter: it makes {manifest.base.name} write like {manifest.data.name}.

| | |
| --- | --- |
{table}

The loss is summed over tokens, each held-out row alone and cut at 512 tokens, its end of text included.
`run.yaml` repeats the run; `manifest.json` holds these figures, and the hashes of base, data and weights.

![Loss](loss.png)

## Use

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({repo!r})
tokenizer = AutoTokenizer.from_pretrained({repo!r})
model = PeftModel.from_pretrained(base, "path/to/{name}")
inputs = tokenizer("Once", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=60)[0]))
```
"""


_LEFT_OUT = [("filtered", "by --where"), ("empty", "empty"), ("duplicates", "duplicates"), ("not_drawn", "by --rows")]
