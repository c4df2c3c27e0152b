"""Generation with one model: lora_tuner, transformers' `generate`, llama.cpp if installed, bare
matrix products as the lower bound; and a cold start."""

import copy
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lora_tuner import Generator, ModelOptions, SamplingParams, TrainConfig
from lora_tuner.config import EMBEDDED_BASE
from lora_tuner.data.dataset import load_dataset
from lora_tuner.evaluation import held_out_loss
from lora_tuner.inference.constraints import Grammar, GrammarCompiler
from lora_tuner.inference.sequence import Sequence
from lora_tuner.models.base_files import quiet_transformers
from lora_tuner.models.layers import linear_layers
from lora_tuner.models.loading import load_base
from lora_tuner.models.resolve import find_base

from . import recipes
from .measure import Figure, figure, median_seconds

PROMPT, PROMPTS, NEW_TOKENS, HELD_OUT = "This film is about a man who", 8, 64, 100
PRECISIONS = {
    "float32": ModelOptions(dtype="float32"),
    "bfloat16": ModelOptions(dtype="bfloat16"),
    "8 bits": ModelOptions(load_in="8bit"),
    "4 bits": ModelOptions(load_in="4bit"),
}
GREEDY = SamplingParams(greedy=True, max_new_tokens=NEW_TOKENS, repetition_penalty=1.0)
FILMS = {  # longer than NEW_TOKENS
    "type": "array",
    "items": {
        "type": "object",
        "properties": {
            "title": {"type": "string"},
            "year": {"type": "integer"},
            "genre": {"enum": ["drama", "comedy", "western"]},
            "seen": {"type": "boolean"},
        },
        "required": ["title", "year", "genre", "seen"],
        "additionalProperties": False,
    },
    "minItems": 30,
}
CLI = Path(__file__).parents[1] / "cli.py"
BARE = """
import sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
AutoTokenizer.from_pretrained(sys.argv[1])
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
"""
LLAMA = """
import sys
import xllamacpp
file, threads, prompt, tokens = sys.argv[1:]
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.verbosity = file, 512, 1, -1
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
server = xllamacpp.Server(params)
request = {"prompt": prompt, "max_tokens": int(tokens), "temperature": 0, "ignore_eos": True}
for _ in sys.stdin:
    server.handle_completions(request)
    print("done", flush=True)
"""


def run(rounds: int) -> list[Figure]:
    """Takes some minutes."""
    return [
        *_throughput(rounds),
        *_scaling(rounds),
        *_constrained(rounds),
        *_losses(),
        *_cold_start(rounds),
    ]


def _throughput(rounds: int) -> list[Figure]:
    ours = {way: Generator(options=replace(options, base=EMBEDDED_BASE)) for way, options in PRECISIONS.items()}
    model, tokenizer = recipes.stock(EMBEDDED_BASE)
    model_bfloat16 = copy.deepcopy(model).bfloat16()
    text = ours["float32"].generate_batch([(PROMPT, None)], GREEDY)[0].text
    comparison = "same text" if text == _stock_generate(model, tokenizer, 1) else "DIFFERENT TEXT"
    figures = []
    for rows in (1, PROMPTS):
        requests = [(PROMPT, None)] * rows
        candidates: dict[str, Callable[[], Any]] = {
            "stock generate, float32": partial(_stock_generate, model, tokenizer, rows),
            "stock generate, bfloat16": partial(_stock_generate, model_bfloat16, tokenizer, rows),
            **{
                f"lora_tuner, {way}": partial(generator.generate_batch, requests, GREEDY)
                for way, generator in ours.items()
            },
            "bare products, float32": partial(_bare_products, model, rows),
        }
        if rows == 1 and (llama := _llama_cpp()) is not None:
            candidates["llama.cpp, its Q4_1 file"] = llama
        medians = median_seconds(candidates, rounds)
        stock = medians["stock generate, float32"]
        for name, duration in medians.items():
            note = f"{stock / duration:.2f} x stock"
            if name == "lora_tuner, float32":
                note += f", {comparison}"
            label = f"{rows} x {NEW_TOKENS} tokens: {name}"
            figures.append(figure(label, rows * NEW_TOKENS / duration, "tokens/s", note))
    return figures


def _scaling(rounds: int) -> list[Figure]:
    """Throughput with more prompts per batch, and with longer outputs."""
    generator = Generator(options=ModelOptions(base=EMBEDDED_BASE, dtype="float32"))
    shapes = [(rows, NEW_TOKENS) for rows in (2, 4, 16, 32)] + [(1, tokens) for tokens in (16, 256, 512)]

    def generate(rows: int, tokens: int) -> None:
        sampling = GREEDY.model_copy(update={"max_new_tokens": tokens})
        outputs = generator.generate_batch([(PROMPT, None)] * rows, sampling)
        assert all(output.tokens == tokens for output in outputs), "an output ended early"

    times = median_seconds(
        {f"{rows} x {tokens}": partial(generate, rows, tokens) for rows, tokens in shapes}, rounds
    )
    return [
        figure(f"{rows} x {tokens} tokens, float32", rows * tokens / times[f"{rows} x {tokens}"], "tokens/s")
        for rows, tokens in shapes
    ]


def _constrained(rounds: int) -> list[Figure]:
    """Throughput with a JSON schema for each output, and without one in the same rounds."""
    generator = Generator(options=ModelOptions(base=EMBEDDED_BASE, dtype="float32"))
    base, prompt = generator.base, generator.encode_prompt(PROMPT).token_ids
    form = GrammarCompiler(base).compile(Grammar("json", json.dumps(FILMS), "schema"), base.tokenizer)

    def generate(rows: int, with_schema: bool) -> None:
        constraints = [form.copy() if with_schema else None for _ in range(rows)]
        sequences = [Sequence(base, prompt, GREEDY, constraint=constraint) for constraint in constraints]
        generator.engine.add(sequences)
        while generator.engine.sequences:
            generator.engine.step()
        assert all(len(sequence.output_ids) == NEW_TOKENS for sequence in sequences), "an output ended early"

    sizes = (1, PROMPTS, 4 * PROMPTS)
    times = median_seconds(
        {
            f"{rows} {with_schema}": partial(generate, rows, with_schema)
            for rows in sizes
            for with_schema in (False, True)
        },
        rounds,
    )
    figures = []
    for rows in sizes:
        plain, constrained = times[f"{rows} False"], times[f"{rows} True"]
        note = f"{plain / constrained:.2f} x without a schema (must be 0.9)"
        label = f"{rows} x {NEW_TOKENS} tokens of a JSON schema, float32"
        figures.append(figure(label, rows * NEW_TOKENS / constrained, "tokens/s", note))
    return figures


def _stock_generate(model: Any, tokenizer: Any, rows: int) -> str:
    inputs = tokenizer([PROMPT] * rows, return_tensors="pt")
    settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "pad_token_id": tokenizer.eos_token_id}
    with torch.inference_mode(), quiet_transformers():
        output = model.generate(**inputs, **settings)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))


def _bare_products(model: Any, rows: int) -> None:
    """Only the matrix products of all tokens."""
    weights = [layer.weight for layer in linear_layers(model).values()] + [model.get_output_embeddings().weight]
    inputs = {size: torch.randn(rows, size) for size in {weight.shape[1] for weight in weights}}
    with torch.inference_mode():
        for _ in range(NEW_TOKENS):
            for weight in weights:
                torch.nn.functional.linear(inputs[weight.shape[1]], weight)


def _llama_cpp() -> Callable[[], Any] | None:
    """llama.cpp with the file that the embedded base was converted from; None if it is not
    installed or does not run.

    In a separate process: beside torch its threads hang or crash.
    """
    if importlib.util.find_spec("xllamacpp") is None:
        return None
    command = [sys.executable, "-c", LLAMA, str(find_base(EMBEDDED_BASE).gguf), str(torch.get_num_threads())]
    command += [PROMPT, str(NEW_TOKENS)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def generate() -> bool:
        try:
            print(file=stdin, flush=True)
        except BrokenPipeError:
            return False
        return stdout.readline() == "done\n"

    return generate if generate() else None


def _losses() -> list[Figure]:
    """Held-out loss of the base in each precision, against float32."""
    texts = load_dataset(TrainConfig()).held_out[:HELD_OUT]
    losses = {}
    for way, options in PRECISIONS.items():
        base = load_base(find_base(EMBEDDED_BASE), options)
        losses[way] = held_out_loss.measure_loss(
            base.model, base, held_out_loss.encode_held_out(base, texts)
        ).loss
    exact = losses["float32"]
    return [
        figure(f"held-out loss, {HELD_OUT} reviews: {way} over float32", loss - exact, "nats", f"{loss:.4f}")
        for way, loss in losses.items()
    ]


def _cold_start(rounds: int) -> list[Figure]:
    """Time of a new process to the first token, and of one that only imports transformers and loads
    the weights."""
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
    times = median_seconds({"command": partial(_process, command), "bare": partial(_process, bare)}, rounds)
    ratio = f"{times['command'] / times['bare']:.2f} x importing transformers and loading the weights"
    return [figure("cli.py generate, cold, to the first token", times["command"], "s", ratio)]


def _process(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PYTHONPATH": str(CLI.parent)})
