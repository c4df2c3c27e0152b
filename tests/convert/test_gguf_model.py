"""Whole models as GGUF, and adapters over them: llama.cpp computes what transformers computes."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lora_tuner.adapters.adapter import load_adapter_folder
from lora_tuner.adapters.llama_cpp import ARCHITECTURES
from lora_tuner.convert.export_gguf import to_gguf
from lora_tuner.convert.gguf_model import write_model_gguf

from .. import gguf_base, gguf_models
from ..parameters import sampled

PROMPT, TOKENS = [5, 77, 200, 31, 9, 120, 300, 44, 260, 7, 19, 88, 140, 222, 33], 20
TOLERANCE = 3e-3  # of log-probabilities: llama.cpp looks GELU up in a table in float16
EVERY_OTHER = 6  # of these cases one is quick


def write(folder, out, dtype="float32"):
    """The notices of writing a folder as GGUF."""
    notices = []
    write_model_gguf(folder, out, dtype, notify=lambda notice: notices.append(notice.text))
    return notices


def assert_same_greedy_ids(model, llama, printable):
    """All log-probabilities agree, and each id is the likeliest, up to near ties."""
    ids, top = llama.greedy_ids(PROMPT, TOKENS, printable)
    assert len(ids) == TOKENS
    with torch.inference_mode():
        logits = model(torch.tensor([PROMPT + ids])).logits[0, len(PROMPT) - 1 : -1].double()
    expected = torch.log_softmax(logits, -1)
    assert (expected - torch.tensor(top)).abs().max() < TOLERANCE
    allowed = expected[:, printable]
    assert (allowed.max(-1).values - expected[range(TOKENS), ids] < TOLERANCE).all()
    return expected


@pytest.mark.parametrize("name", sampled(gguf_models.MODELS, EVERY_OTHER))
def test_gguf_model_and_adapter_match_transformers(tmp_path, name):
    pytest.importorskip("xllamacpp")
    folder = gguf_models.save(tmp_path / "base", name)
    notices = write(folder, tmp_path / "base.gguf")
    assert ("sliding window" in "".join(notices)) == (name == "mistral with a window")
    printable = gguf_base.printable_ids()
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    without = assert_same_greedy_ids(plain, gguf_base.LlamaCpp(tmp_path / "base.gguf"), printable)
    adapter = load_adapter_folder(gguf_base.adapt(folder, tmp_path / "adapter"))
    exported = to_gguf(adapter, tmp_path / "adapter.gguf", dtype="float32")
    assert exported.tensors == len(adapter.tensors)
    adapted = PeftModel.from_pretrained(plain, adapter.path)
    with_adapter = assert_same_greedy_ids(
        adapted, gguf_base.LlamaCpp(tmp_path / "base.gguf", exported.path), printable
    )
    assert (with_adapter[0] - without[0]).abs().max() > 10 * TOLERANCE


def test_each_exported_architecture_is_proven():
    proven = {model_type for model_type, _ in gguf_models.MODELS.values()}
    assert proven == ARCHITECTURES.keys() - {"gemma3"}  # the text model of that one is gemma3_text
