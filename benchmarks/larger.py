"""Memory and time of training on a base of 1.1 billion parameters, by precision.

The base has TinyLlama's shape and random weights; rank 8 on all linear layers, one sequence of 512 tokens per step, a
few steps. Each configuration runs in its own process.
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
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "bfloat16, gradient checkpointing": {"dtype": "bfloat16", "gradient_checkpointing": "on"},
    "bfloat16": {"dtype": "bfloat16", "gradient_checkpointing": "off"},
    "8-bit, gradient checkpointing": {"dtype": "bfloat16", "load_in": "8bit", "gradient_checkpointing": "on"},
    "4-bit, gradient checkpointing": {"dtype": "bfloat16", "load_in": "4bit", "gradient_checkpointing": "on"},
}
SHAPE = (2048, 5632, 22, 32, 4)  # TinyLlama's: hidden size, MLP size, layers, heads, key-value heads


def _save_model(folder: Path, width: int, mlp_width: int, layers: int, heads: int, kv_heads: int) -> None:
    """A Llama with random weights in bfloat16, and the embedded base's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from lora_tuner.models.resolve import find_base
    from lora_tuner.models.tokenizer import load_tokenizer

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=width,
        intermediate_size=mlp_width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    load_tokenizer(find_base("smollm2-135m")).save_pretrained(folder)


def run(rounds: int) -> list[Figure]:
    """Takes a few minutes per configuration. Memory hardly varies, so each runs once whatever `rounds` is."""
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        make(f"{folder}/base", SHAPE)
        for name, settings in CONFIGURATIONS.items():
            result = step(f"{folder}/base", settings)
            note = f"{result['seconds']:.0f} s per step, {result['parameters'] / 1e9:.2f} billion parameters"
            figures.append(figure(name, result["peak"] / 1e9, "GB at most", note))
            print(name, result, file=sys.stderr, flush=True)
    return figures


def make(folder: str, shape: tuple[int, ...]) -> None:
    """Save a base of that shape, in its own process."""
    subprocess.run([sys.executable, "-m", __name__, "shape", folder, json.dumps(shape)], check=True)


def step(base: str, settings: dict[str, Any]) -> dict[str, float]:
    """Peak bytes, seconds per step and parameters, measured in its own process."""
    command = [sys.executable, "-m", __name__, "train", base, json.dumps(settings)]
    output = subprocess.run(command, capture_output=True, check=True).stdout
    result: dict[str, float] = json.loads(output.splitlines()[-1])
    return result


def _train(base: str, settings: dict[str, Any]) -> None:
    from lora_tuner import TrainConfig, plan

    common = {
        "base": base,
        "dataset": "imdb",
        "max_rows": 300,
        "eval_rows": 2,
        "rank": 8,
        "max_length": 512,
        "long_rows": "truncate",
        "batch_size": 1,
    }
    estimate = plan(TrainConfig.model_validate(common | settings | {"max_steps": STEPS}))
    print(
        json.dumps(
            {
                "peak": estimate.peak_memory_bytes,
                "seconds": estimate.seconds_per_step,
                "parameters": estimate.base_parameters,
            }
        )
    )


if __name__ == "__main__":
    argument = json.loads(sys.argv[3])
    if sys.argv[1] == "shape":
        _save_model(Path(sys.argv[2]), *argument)
    else:
        _train(sys.argv[2], argument)
