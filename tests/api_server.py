"""A server in a thread of this process, over a tiny model, and a brake on its worker."""

import contextlib
import socket
import threading
import time

import httpx
import numpy as np
import openai

from lora_tuner import Generator, ModelOptions, SamplingParams
from lora_tuner.adapters.library import Library
from lora_tuner.config import ServerConfig
from lora_tuner.models.resolve import find_base
from lora_tuner.server.playground.app import mount
from lora_tuner.server.routes import create_app
from lora_tuner.server.runner import _Server
from lora_tuner.server.service import ModelService

from . import adapter_files

PROMPT = "the actor"
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def write_adapter(shelf, name, base, seed, facts=None):
    """An adapter with random weights, which says other things than the base; one of that name is replaced."""
    draw = np.random.default_rng(seed)
    shapes = {"A": (4, 32), "B": (96, 4)}
    weights = {
        f"base_model.model.transformer.h.{layer}.attn.c_attn.lora_{part}.weight": draw.normal(0, 0.3, shape).astype(
            "f4"
        )
        for layer in (0, 1)
        for part, shape in shapes.items()
    }
    manifest = adapter_files.manifest(base=facts or find_base(str(base)).base_info().model_dump())
    with Library(shelf).create(name, overwrite=True) as work:
        adapter_files.write(work, {"fan_in_fan_out": True}, weights, manifest)
    return shelf / name


def greedy(base, shelf, name, prompt=PROMPT, tokens=20, **settings):
    """What `generate` writes, alone."""
    adapters = [shelf / name] if name else []
    generator = Generator(*adapters, adapters_dir=shelf, options=ModelOptions(base=str(base), device="cpu"))
    return generator.generate(prompt, SamplingParams(temperature=0, max_new_tokens=tokens, **plain(settings)))


def plain(settings):
    """Sampling as clients of OpenAI mean it."""
    return {"repetition_penalty": 1.0, "top_p": 1.0, "top_k": 0} | settings


class Served:
    """A server that runs."""

    def __init__(self, desk, app, server, thread, port):
        self.desk, self.app, self.server, self.thread = desk, app, server, thread
        self.worker, self.generator = desk.worker, desk.generator
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    def client(self, key="none", **settings):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, **{"max_retries": 0, "timeout": 60} | settings)

    def post(self, path, **body):
        return httpx.post(f"{self.url}{path}", json=body, timeout=60)

    def get(self, path, **settings):
        return httpx.get(f"{self.url}{path}", timeout=60, **settings)

    def send(self, data):
        """What comes back for these bytes, until the server closes or is silent for a while."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
            connection.sendall(data)
            connection.settimeout(1)
            return read(connection)

    @contextlib.contextmanager
    def braked(self, pause=None):
        """Within it the model makes a step only when it is let, or with `pause` one every so many seconds."""
        writer, brake = self.generator.engine, threading.Semaphore(0)
        step = writer.step

        def slow():
            if writer.rows:
                time.sleep(pause) if pause else brake.acquire()
            step()

        writer.step = slow
        try:
            yield lambda steps=1: [brake.release() for _ in range(steps)]
        finally:
            writer.step = step
            brake.release(100)

    def wait(self, condition, seconds=20):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"waiting {self.worker.waiting}, running {self.worker.running}"
            time.sleep(0.005)


def read(connection):
    data = b""
    with contextlib.suppress(TimeoutError, ConnectionError):
        while part := connection.recv(65536):
            data += part
    return data


@contextlib.contextmanager
def serving(base, shelf, only=(), *, page=False, **settings):
    settings = ServerConfig(**{"port": 0, "timeout": 60.0} | settings)
    generator = Generator(
        adapters_dir=shelf, max_resident=settings.max_resident, options=ModelOptions(base=str(base), device="cpu")
    )
    desk = ModelService(generator, settings, only)
    app = create_app(desk)
    if page:
        mount(app, desk, settings.api_key)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = _Server(app, desk, app.state.metrics, lambda: None)
        desk.start()
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        served = Served(desk, app, server, thread, listener.getsockname()[1])
        try:
            served.wait(lambda: server.started)
            yield served
        finally:
            server.should_exit = True
            thread.join(30)
            desk.stop()
    assert not thread.is_alive()
