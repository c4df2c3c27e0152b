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
    "bfloat16, activations computed again": {"dtype": "bfloat16", "checkpointing": "on"},
    "bfloat16": {"dtype": "bfloat16", "checkpointing": "off"},
    "8 bits, activations computed again": {"dtype": "bfloat16", "load_in": "8bit", "checkpointing": "on"},
    "4 bits, activations computed again": {"dtype": "bfloat16", "load_in": "4bit", "checkpointing": "on"},
}


def _shape(folder: Path) -> None:
    """TinyLlama's shape, in bfloat16, with the embedded base's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from lora_tuner.base_model import find_base, load_tokenizer

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
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
        subprocess.run([sys.executable, "-m", __spec__.name, "shape", f"{place}/base"], check=True)
        for name, how in WAYS.items():
            asked = json.dumps(how)
            done = subprocess.run(
                [sys.executable, "-m", __spec__.name, "train", f"{place}/base", asked], capture_output=True, check=True
            )
            found = json.loads(done.stdout.splitlines()[-1])
            note = f"{found['seconds']:.0f} s a step, {found['parameters'] / 1e9:.2f} billion parameters"
            figures.append(figure(name, found["peak"] / 1e9, "GB at the most", note))
            print(name, found, file=sys.stderr, flush=True)
    return figures


def _train(base: str, how: dict[str, Any]) -> None:
    from lora_tuner import TrainConfig, fast
    from lora_tuner.cost import fit_memory, measure
    from lora_tuner.job import prepare

    fast.keep_memory()
    given = {
        "base": base,
        "dataset": "imdb",
        "rows": 300,
        "eval_rows": 2,
        "rank": 8,
        "max_length": 512,
        "batch_size": 1,
    }
    plan = measure(fit_memory(prepare(TrainConfig.model_validate(given | how | {"max_steps": STEPS}))))
    print(
        json.dumps(
            {"peak": plan.peak_memory_bytes, "seconds": plan.seconds_per_step, "parameters": plan.base_parameters}
        )
    )


if __name__ == "__main__":
    _shape(Path(sys.argv[2])) if sys.argv[1] == "shape" else _train(sys.argv[2], json.loads(sys.argv[3]))
