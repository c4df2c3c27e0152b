"""`cli.py` for processes on a CPU that split the base, as GPUs would."""

from lora_tuner import sharding
from lora_tuner.cli import app

sharding.DEVICES = ("cpu",)
app()
