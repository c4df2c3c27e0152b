"""`cli.py` for processes on a CPU that shard the base, as GPUs would."""

from lora_tuner.cli.app import app
from lora_tuner.models import fsdp

fsdp.DEVICES = ("cpu",)
app()
