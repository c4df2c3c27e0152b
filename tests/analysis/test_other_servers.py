"""`adapters check --url` on the embedded base: precisions of this server, llama.cpp's server, and vLLM's.

The vLLM tests run where VLLM names its command, such as VLLM=/tmp/vllm/bin/vllm.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import time
import urllib.request

import pytest

import lora_tuner
from lora_tuner import Library, TrainConfig
from lora_tuner.analysis.server_check import check_server
from lora_tuner.convert.export_gguf import to_gguf
from lora_tuner.convert.gguf_model import write_model_gguf
from lora_tuner.models.resolve import find_base

from .. import tiny_models
from ..api_server import serving
from ..test_handed_on import write_chats
from .test_server_check import OTHER_TEMPLATE, SCALES, copy_scaled

BASE = "smollm2-135m"
TRAINED = {"float32": {}, "bfloat16": {"dtype": "bfloat16"}, "8bit": {"load_in": "8bit"}}

pytestmark = [pytest.mark.slow, pytest.mark.real]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Adapters of conversations, trained in each precision, and one of texts."""
    folder = tmp_path_factory.mktemp("real")
    write_chats(folder / "chats.jsonl")
    (folder / "reviews.txt").write_text("\n".join(tiny_models.reviews(200)))
    settings = {
        "base": BASE,
        "max_steps": 20,
        "batch_size": 2,
        "max_length": 128,
        "eval_rows": 40,
        "adapters_dir": folder / "adapters",
        "runs_dir": folder / "runs",
        "device": "cpu",
    }
    runs = {f"chats-{name}": ("chats.jsonl", changes) for name, changes in TRAINED.items()}
    for name, (data, changes) in {**runs, "reviews": ("reviews.txt", {"dtype": "float32"})}.items():
        dtype = {} if "dtype" in changes else {"dtype": "float32"}
        lora_tuner.train(TrainConfig(name=name, dataset=str(folder / data), **settings, **dtype, **changes), None)
    return Library(folder / "adapters")


@pytest.fixture(scope="module")
def base_folder():
    return find_base(BASE).folder


def adapters(library):
    return [library.get(name) for name in library.names()]


def show(name, check):
    for endpoint in ("text", "chat"):
        if comparison := getattr(check, endpoint):
            print(name, endpoint, check.verdict, comparison)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_no_precision_is_accused(library, dtype):
    """Adapters trained in each precision, served in each."""
    with serving(BASE, library.path, dtype=dtype) as served:
        for adapter in adapters(library):
            check = check_server(adapter, f"{served.url}/v1", others=adapters(library))
            show(f"{adapter.name} in {dtype}", check)
            assert check.verdict == "the adapter"


@contextlib.contextmanager
def llama_cpp(model, adapter=None, scale=1.0, template=None):
    """llama.cpp's server, as its users run it."""
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.verbosity = str(model), 512, 1, -1
    params.port, params.use_jinja = free_port(), True
    if template is not None:
        params.chat_template = template
    if adapter is not None:
        loaded = xllamacpp.CommonAdapterLoraInfo()
        loaded.path, loaded.scale = str(adapter), scale
        params.lora_adapters = [loaded]
    server = xllamacpp.Server(params)
    yield f"{server.listening_address}/v1"
    del server


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def test_llama_cpp_server(library, base_folder, tmp_path):
    pytest.importorskip("xllamacpp")
    model = tmp_path / "base.gguf"
    write_model_gguf(base_folder, model, "float16")
    files = {}
    for name in ("chats-float32", "reviews"):
        files[name] = to_gguf(library.get(name), tmp_path / f"{name}.gguf").path
    sabotages = {
        "the adapter": {"adapter": files["chats-float32"]},
        "the base": {},
        "another adapter": {"adapter": files["reviews"]},
        "a wrong template": {"adapter": files["chats-float32"], "template": OTHER_TEMPLATE},
    }
    for expected, settings in sabotages.items():
        with llama_cpp(model, **settings) as url:
            check = check_server(library.get("chats-float32"), url, others=adapters(library))
            show("llama.cpp", check)
            assert check.verdict == expected
    for scale in SCALES.values():
        with llama_cpp(model, files["chats-float32"], scale) as url:
            check = check_server(library.get("chats-float32"), url, others=adapters(library))
            show(f"llama.cpp at {scale}", check)
            assert check.verdict == "a wrong scale"
            assert check.scale == pytest.approx(scale, abs=0.15)
    with llama_cpp(model, files["reviews"]) as url:
        assert check_server(library.get("reviews"), url, others=adapters(library)).verdict == "the adapter"
    damaged = damage(base_folder, tmp_path / "damaged")
    write_model_gguf(damaged, tmp_path / "damaged.gguf", "float16")
    with llama_cpp(tmp_path / "damaged.gguf", files["chats-float32"]) as url:
        check = check_server(library.get("chats-float32"), url, others=adapters(library))
        show("llama.cpp, other base", check)
        assert check.verdict == "unknown"


def damage(folder, out):
    """Copy a base with noise on its weights, as a bad quantization leaves them."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, out)
    torch.manual_seed(0)
    for file in out.glob("*.safetensors"):
        weights = load_file(file)
        for name, weight in weights.items():
            if weight.dim() > 1 and "embed" not in name:
                weights[name] = weight + weight.std() * torch.randn_like(weight)
        file.unlink()
        save_file(weights, file, metadata={"format": "pt"})
    return out


@contextlib.contextmanager
def vllm(base, *options):
    command = os.environ.get("VLLM")
    if not command:
        pytest.skip("VLLM names no command")
    port = free_port()
    fixed = ["--port", str(port), "--max-model-len", "512", "--dtype", "bfloat16", "--served-model-name", "base"]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen([command, "serve", str(base), *fixed, *options], env=environment) as process:
        try:
            end = time.monotonic() + 600
            while time.monotonic() < end and process.poll() is None:
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                    break
                time.sleep(2)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()


def test_vllm_server(library, base_folder, tmp_path):
    chats, reviews = library.get("chats-float32"), library.get("reviews")
    copies = shutil.copytree(chats.path, tmp_path / "scaled" / "chats").parent
    modules = {"chats-float32": chats.path, "reviews": reviews.path}
    modules |= {name: copy_scaled(copies / "chats", name, scale) for name, scale in SCALES.items()}
    lora = ["--enable-lora", "--max-lora-rank", "16", "--max-loras", "1"]
    lora += ["--lora-modules", *(f"{name}={path}" for name, path in modules.items())]
    served = {
        "chats-float32": "the adapter",
        "base": "the base",
        "reviews": "another adapter",
        "loud": "a wrong scale",
        "quiet": "a wrong scale",
    }
    with vllm(base_folder, *lora) as url:
        for model, expected in served.items():
            check = check_server(chats, url, model=model, others=[chats, reviews])
            show(f"vLLM {model}", check)
            assert check.verdict == expected
            if model in SCALES:
                assert check.scale == pytest.approx(SCALES[model], abs=0.15)
        assert check_server(reviews, url).verdict == "the adapter"
    template = tmp_path / "other.jinja"
    template.write_text(OTHER_TEMPLATE)
    with vllm(base_folder, *lora, "--chat-template", str(template)) as url:
        assert check_server(chats, url, others=[reviews]).verdict == "a wrong template"
    with vllm(damage(base_folder, tmp_path / "damaged"), *lora) as url:
        assert check_server(chats, url, others=[reviews]).verdict == "unknown"
