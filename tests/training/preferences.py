"""Preferences that a tiny model learns in some steps, and what the losses need of a plain model."""

import json
import random
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lora_tuner.data.tokenization import token_ids
from lora_tuner.models import lora

GOOD, BAD = ["shines", "convinces", "works"], ["drags", "fails", "falls apart"]


def pairs(count, seed=0):
    """Pairs whose chosen answer is of other words than the rejected one; lengths are alike."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        who = draw.choice(["the actor", "the director", "the story", "her voice"])
        chosen, rejected = (
            ". ".join(f"{who} {draw.choice(words)}" for _ in range(draw.randint(1, 4))) for words in (GOOD, BAD)
        )
        rows.append({"prompt": f"{number}: what of {who}?", "chosen": f"{chosen}.", "rejected": f"{rejected}."})
    return rows


def answers(count, seed=0, share=0.5):
    """The same as single answers with labels, of which so many are desired."""
    rows = []
    for number, row in enumerate(pairs(count, seed)):
        label = number % 10 < 10 * share
        answer = row["chosen" if label else "rejected"]
        rows.append({"prompt": row["prompt"], "completion": answer, "label": label})
    return rows


def write_rows(rows, name="pairs.jsonl"):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def run_settings(objective):
    """Write rows for an objective; return the settings of a run on them that leaves none out."""
    rows = answers(64) if objective == "kto" else pairs(60)
    return {"dataset": write_rows(rows), "objective": objective, "eval_rows": 100, "near_duplicates": "keep"}


def perturb(setup, seed=1):
    """Give the LoRA layers a gain that is not nothing."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in setup.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))


def plain_model(setup, folder):
    """Load the adapter as it is now with plain transformers and PEFT, without dropout."""
    lora.save_adapter_files(
        lora.adapter_state_dict(setup.model), setup.model.peft_config[lora.ADAPTER_NAME], folder
    )
    base = AutoModelForCausalLM.from_pretrained(setup.base.files.as_setting, dtype=torch.float32)
    return PeftModel.from_pretrained(base, folder, is_trainable=True).eval()


def log_probabilities(model, row):
    """Log-probability of each next token of a row, and whether it is a label."""
    ids = torch.tensor(token_ids(row)).long()
    logps = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    return logps, torch.tensor(row[1:] >= 0)


def gradients(model, adapter_name="default"):
    """Gradient of each trained weight, by its name without that of the adapter."""
    return {
        name.replace(f".{adapter_name}.", "."): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
