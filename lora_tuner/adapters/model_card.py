"""The model card (README.md) of an adapter."""

import json
import shlex
from collections.abc import Sequence

from ..config import HELD_OUT_MAX_TOKENS, is_conversation
from ..text import describe_gain, display_name
from . import base_config, compatibility
from .adapter import CONFUSION_FILE, LOSS_PLOT_FILE, SPECTRUM_FILE, Adapter
from .manifest import BaseInfo, Manifest
from .report import card_section, describe_other_text
from .samples import Sample, samples_table


def model_card(adapter: Adapter, name: str, prompts: Sequence[str] = ()) -> str:
    """The README.md of an adapter: Hub metadata, summary, limits, and examples for other tools.

    Args:
        name: its name in the library.
        prompts: prompts of held-out rows (`data.prompts`), the first of which the examples show.
    """
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
        widget=[_widget(prompt, adapter.is_chat) for prompt in prompts] or None,
    )
    base = _escape_markdown(display_name(manifest.base.name))
    dataset = _escape_markdown(display_name(data.name)) if data else "its training data"
    rows = [(key, _escape_markdown(text).replace("|", "\\|")) for key, text in adapter.summary_rows()]
    table = "\n".join(f"| {key} | {text} |" for key, text in rows)
    pictures = "".join(
        f"\n![{title}]({file})\n" for title, file in _PICTURES.items() if (adapter.path / file).is_file()
    )
    prompt = prompts[0] if prompts else "Write your prompt here"
    usage = _usage_section(adapter, name, _hub_id(manifest.base) or f"path/to/{base}", prompt)
    limits = "".join(f"- {_escape_markdown(limit)}\n" for limit in _limitations(manifest))
    return f"""---
{metadata.to_yaml().strip()}
{_TO_FILL_IN}
---

# {name}

A LoRA adapter for {base}, trained on {dataset}.
{_escape_markdown(_describe_training(manifest))}

| | |
| --- | --- |
{table}

The loss is the mean negative log-likelihood per token, in nats, of held-out rows, measured one at a time, truncated to
{HELD_OUT_MAX_TOKENS} tokens, end of text included.
{"`run.yaml` repeats the run; " if run else ""}`manifest.json` has these figures and the hashes of base, data and weights.
{pictures}{_samples_section(adapter.final_samples, prompts)}{card_section(adapter.report)}
## Limitations

{limits}
## Use

{_describe_prompt(prompts, adapter)}
{usage}"""


_PICTURES = {"Loss": LOSS_PLOT_FILE, "Labels of held-out rows": CONFUSION_FILE, "Singular values": SPECTRUM_FILE}
# Comments, as the Hub refuses empty fields.
_TO_FILL_IN = """# Before you publish the adapter, fill in these two and remove the "#". Base and data may set the license.
# license: apache-2.0
# language: en"""


def _widget(prompt: str, is_chat: bool) -> dict[str, object]:
    """An example prompt, in the form of the Hub's model pages."""
    return {"messages": [{"role": "user", "content": prompt}]} if is_chat else {"text": prompt}


def _describe_training(manifest: Manifest) -> str:
    """Say in a sentence what was learned from which rows."""
    data = manifest.data
    if manifest.made_by:
        parents = " and ".join(parent.name for parent in manifest.parents)
        made = f" from {parents}" if parents else ""
        return f"It was made{made} by `{manifest.made_by}`, without further training."
    if data is None:
        return "Its training data is not known."
    count = f"{data.counts['train']:,} " if data.counts.get("train") else ""
    kind = f"{count}rows of text"
    if data.format.startswith("preferences"):
        kind = f"{count}preferences between answers"
    elif is_conversation(data.format):
        kind = f"the answers of {count}conversations"
    elif manifest.labels:
        kind = f"the labels of {count}texts"
    elif data.answer_column:
        kind = f"the column {data.answer_column} of {count}rows"
    where = f" with {', '.join(data.where)}" if data.where else ""
    others = f"rows of {display_name(data.eval_dataset)}" if data.eval_dataset else "other rows"
    result = manifest.result
    rows = f"{result.rows} of {result.of_rows:,}" if result and result.of_rows else f"{data.held_out_rows:,}"
    measured = f"; {rows} {others} measured it" if data.held_out_rows else ""
    return f"It was trained on {kind} from {display_name(data.source)}{where}{measured}."


def _samples_section(samples: Sequence[Sample], held_out: Sequence[str]) -> str:
    """Prompts, held-out or chosen, with the texts of base and adapter as a table; empty without samples."""
    if not samples:
        return ""
    asked = ", through the chat template" if samples[0].chat else ""
    is_held_out = all(sample.prompt in held_out for sample in samples)
    prompts = (
        "from held-out rows, which were not trained on" if is_held_out else "that were chosen before the run"
    )
    return f"""
## Samples

Prompts {prompts}. Base and adapter continued them with the same seed when training
had ended{asked}; the texts are cut off, and none was chosen.

{samples_table(samples)}"""


def _limitations(manifest: Manifest) -> list[str]:
    """List what was not measured, and what the figures do not promise."""
    base, data, result = display_name(manifest.base.name), manifest.data, manifest.result
    limits = []
    if result is None:
        limits.append("It was not evaluated: no held-out rows were measured.")
    elif manifest.preference:
        limits.append(manifest.preference.limitation(base))
    elif result.gain < 0:
        limits.append(f"On the held-out rows it is worse than {base}: {describe_gain(result.gain)}.")
    elif result.standard_error is not None and result.gain <= 2 * result.standard_error:
        limits.append(f"On the held-out rows it is not measurably better than {base}.")
    else:
        other = describe_other_text(manifest.general)
        limits.append(f"It predicts held-out rows of its data better than {base}; {other}.")
    if data is not None and is_conversation(data.format):
        limits.append(
            "It learned from conversations: without the chat template of the base its answers are poor."
        )
    elif manifest.labels is not None:
        limits.append("It tells the label of any text, also of one that is of another kind than its data.")
    elif data is not None:
        limits.append(f"It continues text; it follows instructions only as far as {base} does.")
    limits += [
        "It may repeat phrases, names and errors of its training data. Truth, bias and safety of its text were not "
        "measured.",
        f"It has the limitations of {base} too.",
    ]
    return limits


def _describe_prompt(prompts: Sequence[str], adapter: Adapter) -> str:
    data = adapter.manifest.data if adapter.manifest else None
    if not prompts:
        kind = "a question" if adapter.is_chat else "text"
        return f"Replace the prompt by {kind} as in the data."
    part = "first question" if adapter.is_chat else "beginning"
    if data and (data.answer_column or (adapter.manifest and adapter.manifest.labels)):
        part = "text up to the answer"
    return f"The prompt comes from a held-out row, which was not trained on: its {part}."


def _escape_markdown(text: str) -> str:
    """Join lines and escape HTML: a manifest may be untrusted."""
    return " ".join(text.split()).replace("<", "&lt;")


def _usage_section(adapter: Adapter, name: str, base: str, prompt: str) -> str:
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
    encode = f'inputs = tokenizer({prompt!r}, return_tensors="pt")'
    messages = [{"role": "user", "content": prompt}]
    request, endpoint = {"model": name, "prompt": prompt, "max_tokens": 60}, "completions"
    llama_options = f"-no-cnv -n 60 -p {shlex.quote(prompt)}"
    if adapter.is_chat:
        encode = (
            f"messages = {messages!r}\n"
            "inputs = tokenizer.apply_chat_template(\n"
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"\n'
            ")"
        )
        request, endpoint = {"model": name, "messages": messages, "max_tokens": 60}, "chat/completions"
        llama_options = f"-cnv -st -n 60 -p {shlex.quote(prompt)}"
    text = f"""
With lora_tuner{", which asks through the chat template" if adapter.is_chat else ""}:

```bash
python cli.py generate --adapter path/to/{name} {shlex.quote(prompt)}
```

With PEFT:

```python
from peft import PeftModel
from transformers import {auto_class}, AutoTokenizer

base = {auto_class}.from_pretrained({place})
{resize}tokenizer = AutoTokenizer.from_pretrained({repr(f"path/to/{name}") if adapter.added_tokens else place})
model = PeftModel.from_pretrained(base, "path/to/{name}")
{encode}
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
curl http://localhost:8000/v1/{endpoint} -H "Content-Type: application/json" \\
  -d {shlex.quote(json.dumps(request, ensure_ascii=False))}
```
"""
    if llama_cpp.accepted:
        text += f"""
With llama.cpp, on the base as GGUF:

```bash
python cli.py export path/to/{name} --to gguf --out {name}.gguf
llama-completion -m base.gguf --lora {name}.gguf {llama_options}
```
"""
    for report in (vllm, llama_cpp):
        text += "".join(f"\n{error}.\n" for error in report.errors)
    return text


def _hub_id(base: BaseInfo) -> str | None:
    """Id of the base on the Hub; None for a local folder, which has no revision."""
    return base.repo if base.revision or base.repo != base.name else None
