"""What it takes to train a base of a billion parameters: the shape of a Llama of 1.1 billion with random weights, rank 8 on all
linear layers, one sequence of 512 tokens a step, a few steps, each way in a process of its own.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from .measure import Figure, figure

STEPS = 3
WAYS: dict[str, dict[str, Any]] = {
    "bfloat16, activations computed again": {"dtype": "bfloat16", "gradient_checkpointing": "on"},
    "bfloat16": {"dtype": "bfloat16", "gradient_checkpointing": "off"},
    "8 bits, activations computed again": {"dtype": "bfloat16", "load_in": "8bit", "gradient_checkpointing": "on"},
    "4 bits, activations computed again": {"dtype": "bfloat16", "load_in": "4bit", "gradient_checkpointing": "on"},
}


SHAPE = (2048, 5632, 22, 32, 4)  # TinyLlama's: width, inner width, layers, heads, heads of keys and values


def _shape(folder: Path, width: int, inner: int, layers: int, heads: int, of_keys: int) -> None:
    """A Llama with random weights in bfloat16, and the embedded base's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from lora_tuner.models.loading import load_tokenizer
    from lora_tuner.models.resolve import find_base

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=of_keys,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    load_tokenizer(find_base("smollm2-135m")).save_pretrained(folder)


def run(rounds: int) -> list[Figure]:
    """Takes some minutes a way; once each, whatever the rounds: what is measured is memory."""
    figures = []
    with tempfile.TemporaryDirectory() as place:
        make(f"{place}/base", SHAPE)
        for name, how in WAYS.items():
            found = step(f"{place}/base", how)
            note = f"{found['seconds']:.0f} s a step, {found['parameters'] / 1e9:.2f} billion parameters"
            figures.append(figure(name, found["peak"] / 1e9, "GB at the most", note))
            print(name, found, file=sys.stderr, flush=True)
    return figures


def make(folder: str, shape: tuple[int, ...]) -> None:
    """A base of that shape, made in a process of its own."""
    subprocess.run([sys.executable, "-m", __name__, "shape", folder, json.dumps(shape)], check=True)


def step(base: str, how: dict[str, Any]) -> dict[str, float]:
    """Peak bytes, seconds per step and parameters, of a process of its own."""
    asked = [sys.executable, "-m", __name__, "train", base, json.dumps(how)]
    found: dict[str, float] = json.loads(subprocess.run(asked, capture_output=True, check=True).stdout.splitlines()[-1])
    return found


def _train(base: str, how: dict[str, Any]) -> None:
    from lora_tuner import TrainConfig, plan

    given = {
        "base": base,
        "dataset": "imdb",
        "max_rows": 300,
        "eval_rows": 2,
        "rank": 8,
        "max_length": 512,
        "batch_size": 1,
    }
    cost = plan(TrainConfig.model_validate(given | how | {"max_steps": STEPS}))
    print(
        json.dumps(
            {"peak": cost.peak_memory_bytes, "seconds": cost.seconds_per_step, "parameters": cost.base_parameters}
        )
    )


if __name__ == "__main__":
    asked = json.loads(sys.argv[3])
    _shape(Path(sys.argv[2]), *asked) if sys.argv[1] == "shape" else _train(sys.argv[2], asked)
