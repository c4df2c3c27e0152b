"""The model card (README.md) of an adapter."""

from ..config import HELD_OUT_MAX_TOKENS, is_conversation
from ..text import describe_coverage, display_name, format_counts, format_gain, format_share
from . import base_config, compatibility
from .adapter import LOSS_PLOT_FILE, SPECTRUM_FILE, Adapter
from .manifest import BaseInfo, DatasetInfo, RateProbe, RunInfo, SourceInfo


def summary_rows(adapter: Adapter) -> list[tuple[str, str]]:
    """Name and text of each row of the summary table. Texts may come from an untrusted manifest."""
    manifest = adapter.manifest
    base = (
        f"{display_name(manifest.base.name)} ({manifest.base.weights})" if manifest else adapter.base or "unknown"
    )
    alpha = "alpha per layer" if adapter.config.get("alpha_pattern") else f"alpha {adapter.config['lora_alpha']}"
    rows = [
        ("Base", base),
        (
            "Adapter",
            f"{_method_name(adapter)}, {format_ranks(adapter)}, {alpha}, on {', '.join(adapter.targets)}",
        ),
        ("In place of the base's", str(adapter.replaced)),
        ("Size", f"{adapter.parameters:,} parameters, {adapter.bytes / 1e6:.1f} MB"),
    ]
    if manifest is None:
        return [*((name, text) for name, text in rows if text), ("Origin", "another tool (no manifest)")]
    data, run, result = manifest.data, manifest.run, manifest.result
    rows += [
        ("Added tokens", ", ".join(f"{token} ({number})" for token, number in adapter.added_tokens.items())),
        ("Parents", ", ".join(f"{parent.name} ({parent.sha256[:12]})" for parent in manifest.parents)),
        ("Command", f"`{manifest.made_by}`" if manifest.made_by else ""),
        *(_dataset_rows(data) if data else []),
        ("Text used", _format_use(run) if run else ""),
        ("Run", _format_run(run) if run else ""),
        ("Learning rate", _format_probe(run.probe) if run and run.probe else ""),
        ("Coverage", _format_coverage(run) if run else ""),
    ]
    if result:
        before, after = result.perplexities
        rows += [
            ("Held-out loss", f"{result.loss:.4f} nats per token (base: {result.base_loss:.4f})"),
            (
                "Gain",
                f"{format_gain(result.gain, result.standard_error)} (standard error, {result.format_rows()}, paired)"
                if result.standard_error is not None
                else format_gain(result.gain, None),
            ),
            ("Perplexity", f"{after:.2f} (base: {before:.2f})"),
            ("Advice", (run.advice if run else None) or ""),
        ]
    return [(name, text) for name, text in rows if text]


def model_card(adapter: Adapter, name: str) -> str:
    """The README.md of an adapter: Hub metadata, summary, and examples for other tools."""
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
    base = _escape_markdown(display_name(manifest.base.name))
    dataset = _escape_markdown(display_name(data.name)) if data else "its training data"
    rows = [(key, _escape_markdown(text).replace("|", "\\|")) for key, text in summary_rows(adapter)]
    table = "\n".join(f"| {key} | {text} |" for key, text in rows)
    chat_example = _CHAT_EXAMPLE if data and is_conversation(data.format) else ""
    pictures = "".join(
        f"\n![{title}]({file})\n"
        for title, file in (("Loss", LOSS_PLOT_FILE), ("Singular values", SPECTRUM_FILE))
        if (adapter.path / file).is_file()
    )
    usage = _usage_section(adapter, name, _hub_id(manifest.base) or f"path/to/{base}")
    return f"""---
{metadata.to_yaml().strip()}
---

# {name}

A LoRA adapter for {base}, trained on {dataset}.

| | |
| --- | --- |
{table}

The loss is measured on held-out rows, one at a time, truncated to {HELD_OUT_MAX_TOKENS} tokens, end of text included.
{"`run.yaml` repeats the run; " if run else ""}`manifest.json` has these figures and the hashes of base, data and weights.
{pictures}
## Use
{chat_example}{usage}"""


_CHAT_EXAMPLE = """
The adapter was trained on conversations: apply the base's chat template (`tokenizer.apply_chat_template`) to
the prompts below, or use `python cli.py generate`, which does.
"""


def _escape_markdown(text: str) -> str:
    """Join lines and escape HTML: a manifest may be untrusted."""
    return " ".join(text.split()).replace("<", "&lt;")


def _method_name(adapter: Adapter) -> str:
    if adapter.config.get("use_dora"):
        return "DoRA"
    return "rsLoRA" if adapter.config.get("use_rslora") else "LoRA"


def format_ranks(adapter: Adapter) -> str:
    ranks = {adapter.rank_of(module) for module in adapter.modules}
    return f"rank {min(ranks)}" if len(ranks) == 1 else f"ranks {min(ranks)} to {max(ranks)}"


def _dataset_rows(data: DatasetInfo) -> list[tuple[str, str]]:
    split = f" ({data.eval_split})" if data.eval_split else ""
    return [
        ("Data", display_name(data.source)),
        ("Format", _format_layout(data)),
        ("Filter", ", ".join(data.where)),
        ("Rows", format_counts(data.counts)),
        *((f"From {display_name(source.name)}", _format_source(source)) for source in data.sources),
        ("Held out by", data.group_by or ""),
        ("Evaluated on", f"{display_name(data.eval_dataset)}{split}" if data.eval_dataset else ""),
    ]


def _format_source(source: SourceInfo) -> str:
    parts = [f"{format_share(source.weight)} of the sequences"] if source.weight else []
    parts.append(format_counts(source.counts))
    if result := source.result:
        loss = f"held-out loss {result.loss:.4f} (base: {result.base_loss:.4f})"
        parts.append(f"{loss}, gain {format_gain(result.gain, result.standard_error)}, {result.format_rows()}")
    return "; ".join(parts)


def _format_layout(data: DatasetInfo) -> str:
    formats = data.format.split(" + ")
    if conversations := [name for name in formats if is_conversation(name)]:
        rest = "; other rows as text" if len(conversations) < len(formats) else ""
        return f"conversations ({' + '.join(conversations)}), trained on the answers alone{rest}"
    if data.template is None:
        return ""
    template = data.template.replace("\n", "\\n")
    return f"template {template}" + (f", trained on {data.answer_column} alone" if data.answer_column else "")


def _format_use(run: RunInfo) -> str:
    if run.used_answer_share is not None:
        tokens, answers = format_share(run.used_share or 0), format_share(run.used_answer_share)
        return f"{tokens} of the tokens, {answers} of those of answers; {run.truncated_rows:,} rows truncated"
    return format_share(run.used_share) if run.used_share is not None else ""


def _format_run(run: RunInfo) -> str:
    return (
        f"{run.method}, {run.steps:,} steps, {run.tokens:,} tokens, "
        f"{run.seconds / 60:.1f} minutes on {run.device} in {run.dtype}"
    )


def _format_probe(probe: RateProbe) -> str:
    losses = [
        f"{trial.learning_rate:g} {'diverged' if trial.loss is None else f'{trial.loss:.4f}'}"
        for trial in probe.trials
    ]
    return (
        f"{probe.learning_rate:g}, the best of {len(losses)} runs of {probe.steps} steps by the "
        f"loss on {probe.rows} held-out "
        f"rows{' (also those of the gain)' if probe.reported_rows else ''}: {', '.join(losses)}"
    )


def _format_coverage(run: RunInfo) -> str:
    """Share of the blocks that is adapted; empty for older manifests, which do not tell it."""
    return "" if run.coverage is None else describe_coverage(run.coverage, run.not_adapted)


def _usage_section(adapter: Adapter, name: str, base: str) -> str:
    """Examples for the tools that can load the adapter, and the reasons for those that cannot."""
    whole = any(map(base_config.is_in_wrapper, adapter.modules))
    auto_class = "AutoModelForMultimodalLM" if whole else "AutoModelForCausalLM"
    place = repr(base)
    if base.endswith(".gguf"):
        place = f"{base.rpartition('/')[0] or '.'!r}, gguf_file={base.rpartition('/')[2]!r}"
    resize = ""
    if size := adapter.replaced.vocab_size(0):
        # Rows of a whole matrix are as many as it has; single rows need at least so many.
        comparison = "!=" if adapter.replaced.sizes else "<"
        resize = (
            f"if base.get_input_embeddings().num_embeddings {comparison} {size}:\n"
            f"    base.resize_token_embeddings({size}, mean_resizing=False)\n"
        )
    text = f"""
With PEFT:

```python
from peft import PeftModel
from transformers import {auto_class}, AutoTokenizer

base = {auto_class}.from_pretrained({place})
{resize}tokenizer = AutoTokenizer.from_pretrained({repr(f"path/to/{name}") if adapter.added_tokens else place})
model = PeftModel.from_pretrained(base, "path/to/{name}")
inputs = tokenizer("Once", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=60)[0]))
```
"""
    if not adapter.replaced:
        text += f"""
With transformers, which calls PEFT:

```python
from transformers import {auto_class}

model = {auto_class}.from_pretrained({place})
model.load_adapter("path/to/{name}")
```
"""
    vllm, llama_cpp = (compatibility.check_compatibility(adapter, tool, name) for tool in ("vllm", "llama.cpp"))
    if vllm.accepted:
        text += f"""
With vLLM, which then serves a model `{name}`:

```bash
vllm serve {base} --enable-lora --max-lora-rank {compatibility.vllm_rank(adapter)} --lora-modules {name}=path/to/{name}
```
"""
    if llama_cpp.accepted:
        text += f"""
With llama.cpp, on the base as GGUF:

```bash
python cli.py export path/to/{name} --to gguf --out {name}.gguf
llama-completion -m base.gguf --lora {name}.gguf -no-cnv -n 60 -p "Once"
```
"""
    for report in (vllm, llama_cpp):
        text += "".join(f"\n{error}.\n" for error in report.errors)
    return text


def _hub_id(base: BaseInfo) -> str | None:
    """Id of the base on the Hub; None for a local folder, which has no revision."""
    return base.repo if base.revision or base.repo != base.name else None
