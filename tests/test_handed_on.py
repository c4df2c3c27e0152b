"""From training to llama.cpp on real bases: answers are learnt, and end there by themselves.

The second base is the folder, GGUF file or Hub id that LORA_TUNER_SECOND_BASE names; without it, its
test is skipped.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_tuner.convert.go_template import PLAIN

from . import gguf_base, ollama

CLI = Path(__file__).parents[1] / "cli.py"
LIMIT = 96  # tokens of an answer
GREEDY = ("--greedy", "--max-new-tokens", "64", "--repetition-penalty", "1")
QUESTIONS = [
    f"{question} a {color} {thing}?"
    for question, color, thing in itertools.product(
        ("Where do I find", "What is", "Can you draw", "Why would I want"),
        ("red", "green", "small", "heavy", "wooden", "cheap", "strange"),
        ("fruit", "house", "bicycle", "animal", "book", "song", "coat"),
    )
]
LEARNED, ASKED = QUESTIONS[::2][:96], QUESTIONS[1::2][:100]


def answer(question):
    return f"A {question.rstrip('?').split(' a ')[1]} is easy to describe: look for one near you, and take a picture."


@pytest.fixture
def cli(tmp_path):
    def run(*arguments):
        done = subprocess.run(
            [sys.executable, CLI, *map(str, arguments)],
            cwd=tmp_path,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=1800,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def write_chats(path):
    rows = [json.dumps({"prompt": question, "completion": answer(question)}) for question in LEARNED]
    path.write_text("\n".join(rows))


def count_stops(llama, template, parameters):
    """Number of chats that end before the limit, sampled with the parameters of the Modelfile."""
    stopped = 0
    settings = {name: float(parameters[name][0]) for name in ("temperature", "top_p") if name in parameters}
    for seed, question in enumerate(ASKED):
        prompt = (
            question if template == PLAIN else ollama.render(template, [{"role": "user", "content": question}])
        )
        request = {"prompt": prompt}
        request |= {"max_tokens": LIMIT, "seed": seed, "stop": parameters["stop"], "temperature": 0.8}
        response = llama.server.handle_completions(request | settings)["choices"][0]
        stopped += response["finish_reason"] == "stop"
    return stopped


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("name", ["smollm2-135m", "LORA_TUNER_SECOND_BASE"])
def test_real_base_goes_from_training_to_llama_cpp(cli, tmp_path, name):
    pytest.importorskip("xllamacpp")
    if name.isupper() and name not in os.environ:
        pytest.skip(f"{name} names no base")
    base = os.environ.get(name, name)
    write_chats(tmp_path / "chats.jsonl")
    steps = [
        "--max-steps",
        "30",
        "--batch-size",
        "2",
        "--max-length",
        "128",
        "--eval-rows",
        "20",
        "--name",
        "chats",
    ]
    cli("train", "--base", base, "--dataset", "chats.jsonl", *steps)
    generated = cli("generate", "--adapter", "chats", "--no-chat", *GREEDY, "The actor")
    cli("merge", "chats", "--out", "merged", "--eval-rows", 10)
    exported = json.loads(cli("export", "chats", "--to", "ollama", "--quantize", "f16", "--out", "f16", "--json"))
    result = exported["model"]["result"]
    assert abs(result["gain"]) < 0.01
    assert exported["model"]["other_texts"] == 0
    check_greedy_text(tmp_path, generated)
    small = json.loads(cli("export", "chats", "--to", "ollama", "--quantize", "q8_0", "--out", "q8", "--json"))
    assert abs(small["model"]["result"]["gain"]) < 0.05
    parameters = ollama.parse_modelfile((tmp_path / "q8" / "Modelfile").read_text())
    llama = gguf_base.LlamaCpp(tmp_path / "q8" / "model.gguf", context=512)
    assert count_stops(llama, parameters["TEMPLATE"][0], parameters) >= 95


def check_greedy_text(folder, generated):
    """llama.cpp's greedy tokens are those of the merged model, up to a place where its two best logits
    are closer than rounding to float16, and its text is that of `generate` up to there."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "merged")
    model = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32)
    prompt = tokenizer("The actor")["input_ids"]
    llama = gguf_base.LlamaCpp(folder / "f16" / "model.gguf", context=512)
    ids = [number for number, _ in llama.greedy(prompt, 64)[1]]
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    best = logits.topk(2)
    for position, number in enumerate(ids):
        if best.indices[position, 0] != number:
            assert best.values[position, 0] - best.values[position, 1] < 0.02
            ids = ids[:position]
            break
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert text.strip()
    assert text in generated
