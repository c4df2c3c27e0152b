"""What people look at: the loss curve as a picture, and the model card."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .config import HELD_OUT_LENGTH
from .manifest import BaseFacts, Manifest
from .store import Adapter


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
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    # A "$" in a file's name is no formula.
    axes.set_title(f"{_shown(manifest.data.name)} on {_shown(manifest.base.name)}", parse_math=False)
    if steps or held_out:
        axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Software": None})


def model_card(adapter: Adapter, name: str) -> str:
    """The README.md of an adapter: Hub metadata, then what it is, how well it does, and how to load it."""
    from huggingface_hub import ModelCardData

    manifest = adapter.manifest
    assert manifest is not None
    metadata = ModelCardData(
        base_model=_hub_id(manifest.base),
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", "lora_tuner"],
    )
    counts, run, result = manifest.data.counts, manifest.run, manifest.result
    base, config = _shown(manifest.base.name), adapter.config
    repo = _hub_id(manifest.base) or f"path/to/{base}"
    rows = [
        ("Base", f"{base} ({manifest.base.weights})"),
        ("Update", f"LoRA, rank {config['r']}, alpha {config['lora_alpha']}, on {', '.join(adapter.targets)}"),
        ("Size", f"{adapter.parameters:,} parameters, {adapter.bytes / 1e6:.1f} MB"),
        ("Data", _shown(manifest.data.source)),
        ("Rows", ", ".join(f"{count:,} {key.replace('_', ' ')}" for key, count in counts.items() if count)),
        (
            "Run",
            f"{run.steps:,} steps, {run.tokens:,} tokens, {run.seconds / 60:.1f} minutes on {run.device} in {run.dtype}",
        ),
    ]
    if result:
        rows += [
            ("Held-out loss", f"{result.loss:.4f} nats a token; the base has {result.base_loss:.4f}"),
            ("Gain", f"{result.gain:.4f} ± {result.standard_error:.4f} (standard error, {result.rows} rows, paired)"),
            ("Perplexity", "{1:.2f}; the base has {0:.2f}".format(*result.perplexities)),
        ]
    table = "\n".join("| {} | {} |".format(key, value.replace("|", "\\|")) for key, value in rows)
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


def _hub_id(base: BaseFacts) -> str | None:
    """The base's id on the Hub; None for a folder, which is called as it was given and has no revision."""
    return base.repo if base.revision or base.repo != base.name else None


def _shown(name: str) -> str:
    """A name for strangers: of a path on this machine, its last part."""
    path = Path(name).expanduser()
    return path.resolve().name if path.is_absolute() or path.exists() else name
