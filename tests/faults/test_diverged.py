"""A learning rate that is far too high: the run stops at the first infinite loss or gradient, and keeps good weights."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from lora_tuner.adapters import adapter
from lora_tuner.training import trainer

from .. import adapter_files
from .process import unchanged
from .runs import ADAPTER, RUN

LAST = RUN / "last-good"


@pytest.mark.parametrize(
    ("kind", "rate", "dtype"),
    [
        ("gpt2", "1e30", "float32"),
        *(
            pytest.param(kind, rate, dtype, marks=pytest.mark.slow)
            for kind in ("gpt2", "llama")
            for rate in ("1000", "1e30")
            for dtype in ("float32", "float16", "bfloat16")
            # float16 has the smallest range
            if (kind, rate, dtype) != ("gpt2", "1e30", "float32") and (rate == "1e30" or dtype == "float16")
        ),
    ],
)
def test_divergence_keeps_last_good_adapter(run, arguments, request, kind, rate, dtype):
    shutil.rmtree("base")
    shutil.copytree(request.getfixturevalue(kind), "base")
    old = adapter_files.write(ADAPTER, facts=adapter_files.manifest())
    how = ["--learning-rate", rate, "--dtype", dtype, "--max-steps", "8", "--overwrite"]
    with unchanged(old):
        ended = run(*arguments, *how)
    assert ended.status == 1
    what = (
        r"The loss is nan in step 2"
        if rate == "1e30"
        else r"(The loss is nan|A gradient is not finite) in step [23]"
    )
    assert re.match(rf"Error: {what}, so the run has stopped\.", ended.line)
    assert f" The last good adapter is in {LAST}. Try a lower learning rate than " in ended.line
    assert f"{float(rate):g}, such as 0.002 (--learning-rate)" in ended.line
    assert adapter.verify_weights(adapter.load_adapter_folder(LAST)) == []
    # The same command runs again from the start: there is no checkpoint.
    with unchanged(old):
        assert run("train", "--resume", "reviews").line == ended.line


def infinite_gradient() -> None:
    """Make a gradient of step 3 infinite, and its loss not."""
    step = trainer.LoraTrainer.training_step

    def training_step(self, model, *arguments):
        loss = step(self, model, *arguments)
        if self.state.global_step == 2:
            next(parameter.grad for parameter in model.parameters() if parameter.requires_grad)[0, 0] = torch.inf
        return loss

    trainer.LoraTrainer.training_step = training_step


@pytest.mark.slow
def test_last_good_had_finite_gradients(run, arguments):
    ended = run(*arguments, "--learning-rate", "0.1", "--max-steps", "8", before=infinite_gradient)
    assert "A gradient is not finite in step 3," in ended.line
    kept = load_file(LAST / adapter.WEIGHTS_FILE)
    shutil.rmtree(RUN)
    how = ["--schedule", "constant", "--max-steps", "1"]
    assert run(*arguments, "--learning-rate", "0.1", "--warmup", "0", *how).status == 0
    assert kept.keys() == load_file(ADAPTER / adapter.WEIGHTS_FILE).keys()
    assert all((it == kept[name]).all() for name, it in load_file(ADAPTER / adapter.WEIGHTS_FILE).items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rate", "what"), [("1e30", "The held-out loss is nan"), ("1e39", "A weight is not finite")]
)
def test_divergence_after_training_writes_no_adapter(run, arguments, rate, what):
    ended = run(*arguments, "--learning-rate", rate, "--max-steps", "1")
    assert ended.status == 1
    assert ended.line.startswith(
        f"Error: {what} in step 1, so the run has stopped. The last good adapter is in {LAST}."
    )
    assert not ADAPTER.exists()
    told = run("generate", "--adapter", LAST, "the", "--max-new-tokens", "2", "--greedy")
    assert told.status == 0, told.err
    assert adapter.verify_weights(adapter.load_adapter_folder(LAST)) == []
    if rate == "1e30":  # the last step has a checkpoint
        with unchanged(LAST):
            assert run("train", "--resume", "reviews").line == ended.line


@pytest.mark.slow
def test_worse_adapter_gives_notice(run, arguments):
    good = run(*arguments, "--max-steps", "40")
    assert "worse" not in good.err
    assert run("merge", "reviews", "--out", "learnt").status == 0
    ended = run(*arguments, "--base", "learnt", "--name", "bad", "--learning-rate", "30", "--max-steps", "1")
    assert ended.status == 0
    assert "The adapter is worse than its base: held-out loss " in ended.err
    assert "Try a lower learning rate than 30, such as 0.002 (--learning-rate), or fewer steps." in ended.err


@pytest.mark.parametrize(
    "command",
    [
        ["evaluate", "one"],
        *(
            pytest.param([*it, "--name", "b"], marks=pytest.mark.slow)
            for it in (["blend", "one=2"], ["compress", "one"])
        ),
    ],
)
def test_nan_adapter_is_one_line(run, world, tmp_path, command):
    shutil.copytree(world, tmp_path / "root")
    place = tmp_path / "root" / "adapters" / "one"
    tensors = load_file(place / adapter.WEIGHTS_FILE)
    save_file({name: np.full_like(it, 1e37) for name, it in tensors.items()}, place / adapter.WEIGHTS_FILE)
    (place / adapter.MANIFEST_FILE).unlink()
    how = ["--adapters-dir", place.parent, "--eval-dataset", world / "reviews.txt"]
    with unchanged(place.parent):
        ended = run(*command, *how)
    assert ended.status == 1
    assert "has a held-out loss of nan on" in ended.line


def test_nan_base_is_one_line(run, arguments):
    path = Path("base/model.safetensors")
    tensors = load_file(path)
    save_file(
        tensors | {name: np.full_like(it, np.nan) for name, it in tensors.items() if "ln_f" in name},
        path,
        {"format": "pt"},
    )
    ended = run(*arguments)
    assert ended.status == 1
    assert ended.line.startswith("Error: base has a training loss of nan in float32: its weights are damaged.")
    assert not RUN.exists()
