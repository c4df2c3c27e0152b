"""DPO, ORPO and KTO beside TRL's trainers, on the same model and batches (extra `bench`)."""

import math
from itertools import islice

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import SequentialSampler

from lora_tuner import train
from lora_tuner.data.packing import IGNORE_INDEX
from lora_tuner.data.tokenization import token_ids
from lora_tuner.models import lora
from lora_tuner.training import reference
from lora_tuner.training.setup import prepare_training

from .preferences import answers, gradients, perturb, plain_model
from .test_objectives import OBJECTIVES, preferring  # noqa: F401 - a fixture
from .test_run import history

pytest.importorskip("trl")
pytestmark = pytest.mark.slow  # TRL takes seconds to import
COMMON = {
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "report_to": [],
    "logging_steps": 1,
    "max_length": 64,
    "disable_tqdm": True,
    "save_strategy": "no",
    "remove_unused_columns": False,
}


def sequential(trainer_class):
    """A trainer that takes its rows in their order."""

    class Ordered(trainer_class):
        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(self.train_dataset)

    return Ordered


def trl_trainer(setup, model, folder, **settings):
    """TRL's trainer of an objective, whose reference is the model as it is now."""
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    texts = {"prompt": ["a"], "chosen": [" b"], "rejected": [" c"]}
    name = setup.objective.name
    if name == "kto":
        texts = {"prompt": ["a", "b"], "completion": [" b", " c"], "label": [True, False]}
        desirable, undesirable = setup.objective.weights
        settings |= {"desirable_weight": desirable, "undesirable_weight": undesirable}
        settings |= {"per_device_train_batch_size": 2}
    config_class, trainer_class = {
        "dpo": (DPOConfig, DPOTrainer),
        "orpo": (ORPOConfig, ORPOTrainer),
        "kto": (KTOConfig, KTOTrainer),
    }[name]
    arguments = config_class(str(folder), beta=setup.objective.beta, **COMMON | settings)
    return sequential(trainer_class)(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict(texts),
        processing_class=setup.base.tokenizer,
    )


def padded(rows, pad):
    """Rows as one padded batch: token ids, attention mask, and which tokens are of the answer."""
    length = max(map(len, rows))
    ids, mask, of_answer = (np.full((len(rows), length), value) for value in (pad, 0, 0))
    for index, row in enumerate(rows):
        ids[index, : len(row)] = token_ids(row)
        mask[index, : len(row)] = 1
        of_answer[index, : len(row)] = row >= 0
    return tuple(map(torch.tensor, (ids, mask, of_answer)))


def trl_batch(setup, numbers):
    """The batch that TRL's collator makes of these rows."""
    pad, objective = setup.base.tokenizer.pad_token_id, setup.objective
    rows = [objective.rows[number] for number in numbers]
    if objective.name == "kto":
        ids, mask, of_answer = padded(rows, pad)
        other_ids, other_mask, of_other = padded([objective.mismatched[number] for number in numbers], pad)
        labels = torch.tensor([objective.desired[number] for number in numbers])
        batch = {"input_ids": ids, "attention_mask": mask, "completion_mask": of_answer, "label": labels}
        return batch | {
            "KL_input_ids": other_ids,
            "KL_attention_mask": other_mask,
            "KL_completion_mask": of_other,
        }
    if objective.name == "dpo":
        ids, mask, of_answer = padded([*rows[::2], *rows[1::2]], pad)
        return {"input_ids": ids, "attention_mask": mask, "completion_mask": of_answer}
    batch = {}
    for side, of_side in (("chosen", rows[::2]), ("rejected", rows[1::2])):
        ids, mask, of_answer = padded(of_side, pad)
        batch |= {f"{side}_input_ids": ids, f"{side}_attention_mask": mask}
        batch[f"{side}_labels"] = ids.where(of_answer == 1, IGNORE_INDEX)
    return batch


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_equals_that_of_trl(preferring, model_folder, tmp_path, objective):  # noqa: F811
    rows = answers(60, share=0.7) if objective == "kto" else None
    setup = prepare_training(preferring(objective, rows, base=str(model_folder), beta=0.3, max_steps=50))
    setup = reference.with_reference(setup)
    trainer = trl_trainer(setup, plain_model(setup, tmp_path / "start"), tmp_path / "trl")
    perturb(setup)
    now = lora.adapter_state_dict(setup.model)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if ".default." in name:
                parameter.copy_(now[name.replace(".default.", ".")])
    items = [setup.sequences[index] for index in range(2)]
    numbers = [number for item in items for number in item.numbers]
    trainer.model.train()
    theirs = trainer.compute_loss(trainer.model, trl_batch(setup, numbers))
    theirs.backward()
    setup.model.train()
    batch = setup.collate(items)
    ours = setup.loss(setup.model, batch, setup.count([batch]))
    ours.backward()
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    own, plain = gradients(setup.model, lora.ADAPTER_NAME), gradients(trainer.model)
    assert own.keys() == plain.keys()
    assert max(float(gradient.abs().max()) for gradient in plain.values()) > 1e-3
    for name, gradient in plain.items():
        assert torch.allclose(own[name], gradient, atol=1e-5), name


def test_dpo_curve_equals_that_of_trl(preferring, model_folder, tmp_path):  # noqa: F811
    """30 steps of two pairs, over more than an epoch."""
    common = {"learning_rate": 2e-3, "max_grad_norm": 1.0, "weight_decay": 0.0, "max_steps": 30}
    config = preferring(
        base=str(model_folder), packing=False, batch_size=2, schedule="constant", warmup=0, **common
    )
    setup = prepare_training(config)
    sequences, per_epoch = setup.sequences, setup.steps_per_epoch
    assert per_epoch < 30
    order = [
        sequences.groups[index]
        for epoch in range(math.ceil(30 / per_epoch))
        for index in sequences.epoch_order(epoch, config.seed, [])
    ]
    assert len(sequences) % 2 == 0  # else TRL's mean of the last batch of an epoch is over fewer pairs
    start = tmp_path / "start"
    trainer = trl_trainer(
        setup,
        plain_model(setup, start),
        tmp_path / "trl",
        per_device_train_batch_size=2,
        lr_scheduler_type="constant",
        **common,
    )
    pairs = []
    for chosen, rejected in islice(order, 60):
        rows = [setup.objective.rows[number] for number in (chosen, rejected)]
        begin = int((rows[0] >= 0).argmax())
        ids = [token_ids(row).tolist() for row in rows]
        pairs.append({"prompt_ids": ids[0][:begin], "chosen_ids": ids[0][begin:], "rejected_ids": ids[1][begin:]})
    trainer.train_dataset = Dataset.from_list(pairs)
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    ours = [entry["loss"] for entry in history(train(config)) if "loss" in entry]
    assert len(ours) == len(theirs) == 30
    assert ours[0] == pytest.approx(math.log(2), abs=1e-3)
    assert ours[-1] < 0.6
    assert ours == pytest.approx(theirs, abs=1e-3)
