"""Imports of the fork server, done once for all commands."""

import gc

import lora_tuner.adapters.hub_sync
import lora_tuner.adapters.plots
import lora_tuner.cli.app
import lora_tuner.cli.doctor
import lora_tuner.convert.blend
import lora_tuner.convert.compress
import lora_tuner.convert.export_gguf
import lora_tuner.convert.merge
import lora_tuner.inference.generator
import lora_tuner.training.run  # noqa: F401
from lora_tuner.models import native

from ..conftest import prepare_process

prepare_process()
native.native_kernels()
gc.collect()
gc.freeze()  # a forked command collects only its own objects, and copies no pages for the rest
