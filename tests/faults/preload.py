"""What the server imports once for all commands."""

import torch

import lora_tuner.cli
import lora_tuner.combine
import lora_tuner.doctor
import lora_tuner.export
import lora_tuner.generation
import lora_tuner.report
import lora_tuner.share
import lora_tuner.training  # noqa: F401

torch.set_num_threads(1)
