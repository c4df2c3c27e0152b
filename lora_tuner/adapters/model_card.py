"""What people look at: the loss curve as a picture, and the model card."""

from typing import TYPE_CHECKING

from ..config import HELD_OUT_MAX_TOKENS
from ..text import display_name
from . import compatibility
from .adapter import LOSS_PLOT_FILE, SPECTRUM_FILE, Adapter
from .manifest import BaseInfo, DatasetInfo, RunInfo

if TYPE_CHECKING:
    pass


def summary_rows(adapter: Adapter) -> list[tuple[str, str]]:
    """What people want to know of an adapter, as name and text. The text may be a stranger's."""
    manifest = adapter.manifest
    about = f"{display_name(manifest.base.name)} ({manifest.base.weights})" if manifest else adapter.base or "not named"
    rows = [
        ("Base", about),
        ("Update", f"{_method_name(adapter)}, {_ranks(adapter)}, {_alphas(adapter)}, on {', '.join(adapter.targets)}"),
        ("Size", f"{adapter.parameters:,} parameters, {adapter.bytes / 1e6:.1f} MB"),
    ]
    if manifest is None:
        return [*rows, ("Made", "by another tool: it has no manifest")]
    data, run, result = manifest.data, manifest.run, manifest.result
    rows += [
        ("Made from", ", ".join(f"{parent.name} ({parent.sha256[:12]})" for parent in manifest.parents)),
        ("Made by", f"`{manifest.made_by}`" if manifest.made_by else ""),
        *(_data_section(data) if data else []),
        ("Run", _run_section(run) if run else ""),
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
    base = _escape_markdown(display_name(manifest.base.name))
    table = "\n".join(
        "| {} | {} |".format(key, _escape_markdown(value).replace("|", "\\|")) for key, value in summary_rows(adapter)
    )
    return f"""---
{metadata.to_yaml().strip()}
---

# {name}

A LoRA adapter: it makes {base} write like {_escape_markdown(display_name(data.name)) if data else "the text it was trained on"}.

| | |
| --- | --- |
{table}

The loss is summed over tokens, each held-out row alone and cut at {HELD_OUT_MAX_TOKENS} tokens at the most, its end of text included.
{"`run.yaml` repeats the run; " if run else ""}`manifest.json` holds these figures, and the hashes of base, data and weights.
{_picture_links(adapter)}
## Use
{_CHAT_EXAMPLE if data and data.format != "text" else ""}{_usage_section(adapter, name, _hub_id(manifest.base) or f"path/to/{base}")}"""


_CHAT_EXAMPLE = """
It was trained on conversations: give it text in the base's chat template (`tokenizer.apply_chat_template`), not bare prompts as
below; `python cli.py generate --chat` does so.
"""


def _escape_markdown(text: str) -> str:
    """On one line and without HTML: a manifest may come from strangers."""
    return " ".join(text.split()).replace("<", "&lt;")


def _method_name(adapter: Adapter) -> str:
    return "DoRA" if adapter.config.get("use_dora") else "rsLoRA" if adapter.config.get("use_rslora") else "LoRA"


def _ranks(adapter: Adapter) -> str:
    ranks = {adapter.rank_of(module) for module in adapter.modules}
    return f"rank {min(ranks)}" if len(ranks) == 1 else f"ranks {min(ranks)} to {max(ranks)}"


def _alphas(adapter: Adapter) -> str:
    return "alphas by layer" if adapter.config.get("alpha_pattern") else f"alpha {adapter.config['lora_alpha']}"


def _data_section(data: DatasetInfo) -> list[tuple[str, str]]:
    return [
        ("Data", display_name(data.source)),
        ("Read as", f"conversations ({data.format}): answers alone are learnt" if data.format != "text" else ""),
        ("Only", ", ".join(data.where)),
        ("Rows", ", ".join(f"{count:,} {key.replace('_', ' ')}" for key, count in data.counts.items() if count)),
        ("Measured on", display_name(data.eval_dataset) if data.eval_dataset else ""),
    ]


def _run_section(run: RunInfo) -> str:
    minutes = run.seconds / 60
    return f"{run.method}, {run.steps:,} steps, {run.tokens:,} tokens, {minutes:.1f} minutes on {run.device} in {run.dtype}"


def _picture_links(adapter: Adapter) -> str:
    shown = [("Loss", LOSS_PLOT_FILE), ("Singular values", SPECTRUM_FILE)]
    return "".join(f"\n![{what}]({name})\n" for what, name in shown if (adapter.path / name).is_file())


def _usage_section(adapter: Adapter, name: str, repo: str) -> str:
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
    vllm, llama_cpp = (compatibility.check_compatibility(adapter, tool, name) for tool in ("vllm", "llama.cpp"))
    if vllm.accepted:
        text += f"""
With vLLM, where `{name}` is then the name of a model beside the base:

```bash
vllm serve {repo} --enable-lora --max-lora-rank {compatibility.vllm_rank(adapter)} --lora-modules {name}=path/to/{name}
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
        text += "".join(f"\n{obstacle}.\n" for obstacle in verdict.errors)
    return text


def _hub_id(base: BaseInfo) -> str | None:
    """The base's id on the Hub; None for a folder, which is called as it was given and has no revision."""
    return base.repo if base.revision or base.repo != base.name else None
