"""Alternatives, written as in their documentation: Trainer with PEFT, full fine-tuning as in tutorials, TRL.

Each function trains and returns the times of its steps.
"""

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from lora_tuner.models.resolve import find_base
from lora_tuner.models.tokenizer import load_tokenizer

RANK, ALPHA = 8, 16


def stock(name: str) -> tuple[Any, Any]:
    """Model, in float32, and tokenizer of transformers."""
    files = find_base(name)
    return AutoModelForCausalLM.from_pretrained(files.folder, dtype=torch.float32), load_tokenizer(files)


class Clock(TrainerCallback):
    """Seconds of each optimizer step, and its tokens without padding."""

    def __init__(self, limit: float | None = None) -> None:
        self.limit = limit  # seconds of training after which to stop
        self.seconds: list[float] = []
        self.tokens: list[int] = []
        self.waiting: deque[int] = deque()  # tokens of batches that were prefetched
        self.start = 0.0

    def counting(
        self, collate: Callable[[Any], dict[str, torch.Tensor]]
    ) -> Callable[[Any], dict[str, torch.Tensor]]:
        def count(rows: Any) -> dict[str, torch.Tensor]:
            batch = collate(rows)
            mask = batch.get("attention_mask")
            self.waiting.append(int(mask.sum() if mask is not None else batch["input_ids"].numel()))
            return batch

        return count

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.start)
        self.tokens.append(sum(self.waiting.popleft() for _ in range(args.gradient_accumulation_steps)))
        if self.limit is not None and sum(self.seconds) > self.limit:
            control.should_training_stop = True


def plain(
    model: Any, tokenizer: Any, texts: list[str], steps: int, *, length: int = 512, batch: int = 8
) -> Clock:
    """Trainer and PEFT: every text padded to `length`."""
    wrapped = get_peft_model(model, _lora())
    return _stock(wrapped, tokenizer, texts, steps, length=length, batch=batch, rate=1e-3, limit=None)


def tutorial(model: Any, tokenizer: Any, texts: list[str], steps: int, limit: float | None = None) -> Clock:
    """Full fine-tuning at 128 tokens, batch 8, learning rate 5e-5, with Trainer's linear decay."""
    return _stock(model, tokenizer, texts, steps, length=128, batch=8, rate=5e-5, limit=limit)


def _lora() -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules="all-linear")


def _arguments(steps: int, batch: int, rate: float) -> dict[str, Any]:
    return {
        "output_dir": "/tmp/unused",
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "learning_rate": rate,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": torch.cuda.is_available(),
        "dataloader_pin_memory": False,
    }


def _stock(
    model: Any,
    tokenizer: Any,
    texts: list[str],
    steps: int,
    *,
    length: int,
    batch: int,
    rate: float,
    limit: float | None,
) -> Clock:
    clock = Clock(limit)
    rows = Dataset.from_dict({"text": texts}).map(
        lambda batch_rows: tokenizer(
            batch_rows["text"], truncation=True, padding="max_length", max_length=length
        ),
        batched=True,
        remove_columns=["text"],
    )
    Trainer(
        model=model,
        args=TrainingArguments(**_arguments(steps, batch, rate)),
        train_dataset=rows,
        data_collator=clock.counting(DataCollatorForLanguageModeling(tokenizer, mlm=False)),
        callbacks=[clock],
    ).train()
    # A padded batch always takes the same time, so every step counts with the average number of tokens.
    average = sum(map(sum, rows["attention_mask"])) / len(rows) * batch
    clock.tokens = [round(average)] * len(clock.seconds)
    return clock


def with_trl(
    model: Any,
    tokenizer: Any,
    texts: list[str],
    steps: int,
    *,
    length: int = 512,
    batch: int = 8,
    accumulation: int = 1,
) -> Clock:
    """TRL's SFTTrainer with packing, `batch` sequences per step in `accumulation` micro-batches."""
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    clock = Clock()
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            **_arguments(steps, batch // accumulation, 1e-3),
            gradient_accumulation_steps=accumulation,
            max_length=length,
            packing=True,
        ),
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=tokenizer,
        peft_config=_lora(),
        callbacks=[clock],
    )
    trainer.data_collator = clock.counting(trainer.data_collator)
    trainer.train()
    return clock
