"""Best LoRA learning rate by width of the base.

Small bases of several widths are pretrained on film reviews for the same number of steps; then LoRA learns program code at
several rates. Float32, rank 8. The bases are weak: what counts is how the best rate changes with width, not the rate.
"""

import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lora_tuner import TrainConfig
from lora_tuner.config import EMBEDDED_BASE
from lora_tuner.data import packing
from lora_tuner.models.base_files import quiet_transformers
from lora_tuner.models.resolve import find_base
from lora_tuner.training.setup import prepare_training

from .measure import Figure, figure
from .methods import REVIEWS, program_code, train_once

WIDTHS, RATES = (64, 128, 256), (1e-3, 2e-3, 4e-3, 8e-3, 16e-3)
STEPS, BATCH, LENGTH, RATE = 400, 4, 256, 3e-3  # of pretraining


def run(rounds: int) -> list[Figure]:
    """Takes about twenty minutes per round; each round has its own seed."""
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        code = program_code(Path(folder, "code"))
        for width in WIDTHS:
            results: dict[float, list[tuple[float, float]]] = {rate: [] for rate in RATES}
            for seed in range(rounds):
                base = _pretrain(Path(folder, f"{width}-{seed}"), width, seed)
                for rate in RATES:
                    settings = code | {"base": base, "method": "lora", "learning_rate": rate}
                    results[rate].append(train_once(settings, seed)[:2])
            for rate, runs in results.items():
                loss, gain = (statistics.median(values) for values in zip(*runs, strict=True))
                figures.append(figure(f"width {width}, {rate:g}", loss, "nats", f"gain {gain:.4f}"))
                print(width, rate, loss, gain, file=sys.stderr, flush=True)
    return figures


def _pretrain(folder: Path, width: int, seed: int) -> str:
    """Save a base of four layers that was trained on `STEPS` batches of reviews."""
    embedded = find_base(EMBEDDED_BASE)
    common: dict[str, Any] = {
        "base": EMBEDDED_BASE,
        "max_length": LENGTH,
        "max_steps": 1,
        "eval_rows": 2,
        "rank": 1,
    }
    with quiet_transformers():
        setup = prepare_training(
            TrainConfig.model_validate(REVIEWS | common | {"max_rows": None, "device": "cpu"})
        )
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(setup.base.tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=4,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=setup.base.tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    order = torch.randperm(len(setup.sequences), generator=torch.Generator().manual_seed(seed)).tolist()
    loss = torch.zeros(())
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min((step + 1) / 40, (STEPS - step) / (STEPS - 40))
        items = [setup.sequences[order[(step * BATCH + i) % len(order)]] for i in range(BATCH)]
        batch = packing.collate(items, setup.base.tokenizer.pad_token_id)
        labels = batch.pop("labels")
        logits = model(**batch, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    print(f"width {width}: {loss.item():.3f} nats after {STEPS} steps", file=sys.stderr, flush=True)
    model.save_pretrained(folder)
    for file in embedded.folder.glob("token*"):
        shutil.copy(file, folder)
    return str(folder)
