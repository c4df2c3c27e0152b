"""Folders and files that are no adapter of PEFT are refused with the one cause and the remedy."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_tuner import Library
from lora_tuner.adapters.adapter import CONFIG_FILE, WEIGHTS_FILE, load_adapter_folder
from lora_tuner.errors import AdapterError

from .. import adapter_files
from ..cli.test_commands import run

ONE = {"x": np.ones(2, np.float32)}
IMAGE = {"lora_unet_down_blocks_0.lora_down.weight": np.ones(2, np.float32)}
LYCORIS = {"lora_unet_down_blocks_0.hada_w1_a": np.ones(2, np.float32)}


def refusal(folder):
    with pytest.raises(AdapterError) as error:
        load_adapter_folder(folder)
    return str(error.value)


@pytest.mark.parametrize(
    ("below", "said"),
    [
        (["adapter"], "adapters/run holds its adapter in a sub-folder: give adapters/run/adapter."),
        (["out/final"], "adapters/run holds its adapter in a sub-folder: give adapters/run/out/final."),
        (
            ["checkpoint-500", "checkpoint-1000"],
            "adapters/run holds 2 adapters in sub-folders: give one of adapters/run/checkpoint-500, "
            "adapters/run/checkpoint-1000.",
        ),
        (
            [f"checkpoint-{number}" for number in range(7)],
            "adapters/run holds 7 adapters in sub-folders: give one of "
            + ", ".join(f"adapters/run/checkpoint-{number}" for number in range(5))
            + " and 2 more.",
        ),
    ],
)
def test_adapter_in_subfolder_is_named(tmp_path, below, said):
    for name in below:
        adapter_files.write(tmp_path / "adapters" / "run" / name)
    assert run("adapters", "show", "adapters/run", exit_code=1).stderr == f"Error: {said}\n"
    assert said in run("adapters", "list").stderr
    assert Library().get(f"adapters/run/{below[0]}").rank == 4


def test_default_adapter_beside_others_is_read(tmp_path):
    adapter_files.write(tmp_path / "adapters" / "mine")
    adapter_files.write(tmp_path / "adapters" / "mine" / "other")
    assert load_adapter_folder(tmp_path / "adapters" / "mine").rank == 4


def mlx(folder):
    (folder / CONFIG_FILE).write_text('{"fine_tune_type": "lora", "lora_parameters": {"rank": 8, "scale": 20.0}}')
    save_file(
        {"model.layers.0.self_attn.q_proj.lora_a": np.ones((32, 8), np.float32)}, folder / "adapters.safetensors"
    )


def pickled(folder):
    adapter_files.write(folder)
    (folder / WEIGHTS_FILE).rename(folder / "adapter_model.bin")


def whole_model(folder):
    (folder / "config.json").write_text("{}")
    save_file(ONE, folder / "model-00001-of-00002.safetensors")


FOLDERS = {
    "MLX": (
        mlx,
        "is an adapter of MLX (adapters.safetensors), not of PEFT: merge it with `mlx_lm.fuse --adapter-path {0}`, and "
        "give the result as --base.",
    ),
    "pickled": (
        pickled,
        "has pickled weights (adapter_model.bin), which are not read: convert them in that folder with `python -c "
        "\"import torch, safetensors.torch as s; s.save_file(torch.load('adapter_model.bin', weights_only=True), "
        "'adapter_model.safetensors')\"`.",
    ),
    "a whole model": (whole_model, "is a whole model, not an adapter: use it with --base {0}."),
    "GGUF": (
        lambda folder: (folder / "lora-f16.gguf").write_bytes(b"GGUF"),
        "is in GGUF (lora-f16.gguf), the format of llama.cpp: give the PEFT adapter that it was made from.",
    ),
    "diffusers": (
        lambda folder: save_file(
            {"unet.down_blocks.0.lora.down.weight": ONE["x"]}, folder / "pytorch_lora_weights.safetensors"
        ),
        "is a LoRA for image models (pytorch_lora_weights.safetensors), not an adapter for a language model.",
    ),
    "kohya": (
        lambda folder: save_file(IMAGE, folder / "style.safetensors"),
        "is a LoRA for image models (style.safetensors), not an adapter for a language model.",
    ),
    "LyCORIS": (
        lambda folder: save_file(LYCORIS, folder / "style.safetensors"),
        "is a LyCORIS adapter (style.safetensors), not an adapter for a language model.",
    ),
    "unknown": (
        lambda folder: save_file(ONE, folder / "some.safetensors"),
        "has no adapter_config.json: it is incomplete or not an adapter.",
    ),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_other_folder_is_refused_with_cause(tmp_path, kind):
    write, said = FOLDERS[kind]
    folder = tmp_path / "theirs"
    folder.mkdir()
    write(folder)
    assert refusal(folder) == f"{folder} {said.format(folder)}"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (WEIGHTS_FILE, "is a file of an adapter: give its folder, theirs."),
        ("a.gguf", "is in GGUF, the format of llama.cpp: give the PEFT adapter that it was made from."),
        ("style.safetensors", "is a LoRA for image models, not an adapter for a language model."),
        ("adapter.zip", f"is a file, and an adapter is a folder with {CONFIG_FILE} and {WEIGHTS_FILE}."),
    ],
)
def test_file_as_adapter_is_refused_with_cause(tmp_path, name, said):
    (tmp_path / "theirs").mkdir()
    save_file(IMAGE, tmp_path / "theirs" / name)
    assert run("adapters", "show", f"theirs/{name}", exit_code=1).stderr == f"Error: theirs/{name} {said}\n"
