"""A server in a thread of this process, over a tiny model, whose steps a test can hold back."""

import contextlib
import json
import socket
import threading
import time

import httpx
import numpy as np
import openai

from lora_tuner import Generator, ModelOptions, SamplingParams
from lora_tuner.adapters import adapter
from lora_tuner.adapters.library import Library
from lora_tuner.config import ServerConfig
from lora_tuner.models.resolve import find_base
from lora_tuner.server.routes import create_app
from lora_tuner.server.runner import _Server
from lora_tuner.server.service import ModelService

from . import adapter_files

PROMPT = "the actor"
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
GREEDY = {"prompt": PROMPT, "temperature": 0, "max_tokens": 20}
CHAT = {"messages": [{"role": "user", "content": "so?"}]}
TEXT = {"type": "text", "text": "so?"}
KEY = "a key of the tests"
HOSTILE = '<img src="http://elsewhere.example/x.png" onerror="window.run=1"><script>window.run=1</script>${window.run=1}{{1}}'


def write_adapter(adapters_dir, name, base, seed, base_info=None, **facts):
    """Write an adapter with random weights, whose text differs from the base's. Replaces one of that name."""
    random = np.random.default_rng(seed)
    shapes = {"A": (4, 32), "B": (96, 4)}
    weights = {
        f"base_model.model.transformer.h.{layer}.attn.c_attn.lora_{part}.weight": random.normal(
            0, 0.3, shape
        ).astype("f4")
        for layer in (0, 1)
        for part, shape in shapes.items()
    }
    base_info = base_info or find_base(str(base)).base_info().model_dump()
    with Library(adapters_dir).create(name, overwrite=True) as folder:
        manifest = adapter_files.manifest(base=base_info, **facts)
        adapter_files.write(folder, {"fan_in_fan_out": True}, weights, manifest)
    return adapters_dir / name


def add_hostile_adapters(adapters_dir, like):
    """Write a hostile adapter with the weights of another one, and a broken one."""
    good = adapter.load_adapter_folder(adapters_dir / like)
    data = good.manifest.data.model_copy(update={"name": HOSTILE, "source": HOSTILE, "where": [HOSTILE]})
    hostile = adapters_dir / "xss"
    hostile.mkdir()
    for name in (adapter.WEIGHTS_FILE, adapter.CONFIG_FILE):
        (hostile / name).write_bytes((good.path / name).read_bytes())
    manifest = good.manifest.model_copy(update={"data": data, "created": HOSTILE, "made_by": HOSTILE})
    (hostile / adapter.MANIFEST_FILE).write_text(manifest.to_json())
    (hostile / adapter.CARD_FILE).write_text(f"# {HOSTILE}\n![x](http://elsewhere.example/y.png)")
    (hostile / adapter.METRICS_FILE).write_text(json.dumps({"step": HOSTILE, "loss": HOSTILE}) + "\n")
    adapter_files.write(adapters_dir / "broken", {"peft_type": HOSTILE})


def greedy(base, adapters_dir, name, prompt=PROMPT, tokens=20, **sampling):
    """Return the output of a generator of its own, with the API's default sampling."""
    adapters = [adapters_dir / name] if name else []
    options = ModelOptions(base=str(base), device="cpu")
    generator = Generator(*adapters, adapters_dir=adapters_dir, options=options)
    settings = {"repetition_penalty": 1.0, "top_p": 1.0, "top_k": 0} | sampling
    return generator.generate(prompt, SamplingParams(temperature=0, max_new_tokens=tokens, **settings))


class RunningServer:
    def __init__(self, service, app, server, thread, port):
        self.service, self.app, self.server, self.thread = service, app, server, thread
        self.scheduler, self.generator = service.scheduler, service.generator
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    def client(self, key="none", **settings):
        defaults = {"max_retries": 0, "timeout": 60}
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, **defaults | settings)

    def post(self, path, **body):
        return httpx.post(f"{self.url}{path}", json=body, timeout=60)

    def get(self, path, **settings):
        return httpx.get(f"{self.url}{path}", timeout=60, **settings)

    def send(self, data):
        """Return the response to these bytes, until the server closes or is silent for a second."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
            connection.sendall(data)
            connection.settimeout(1)
            return read_all(connection)

    @contextlib.contextmanager
    def held_steps(self, pause=None):
        """Hold each step until the yielded function releases it; with `pause` steps take that many seconds."""
        engine, released = self.generator.engine, threading.Semaphore(0)
        step = engine.step

        def held_step():
            if engine.sequences:
                time.sleep(pause) if pause else released.acquire()
            step()

        engine.step = held_step
        try:
            yield released.release
        finally:
            engine.step = step
            released.release(100)

    def wait(self, condition, seconds=20):
        end = time.monotonic() + seconds
        while not condition():
            state = f"waiting {self.scheduler.waiting}, running {self.scheduler.running}"
            assert time.monotonic() < end, state
            time.sleep(0.005)


def read_all(connection):
    data = b""
    with contextlib.suppress(TimeoutError, ConnectionError):
        while part := connection.recv(65536):
            data += part
    return data


@contextlib.contextmanager
def serving(base, adapters_dir, only=(), *, page=False, dtype="auto", **settings):
    settings = ServerConfig(**{"port": 0, "timeout": 60.0} | settings)
    generator = Generator(
        adapters_dir=adapters_dir,
        max_resident=settings.max_resident,
        options=ModelOptions(base=str(base), device="cpu", dtype=dtype),
    )
    service = ModelService(generator, settings, only)
    app = create_app(service)
    if page:
        from lora_tuner.server.playground.app import mount  # gradio takes seconds to import

        mount(app, service, settings.api_key)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = _Server(app, service, app.state.metrics, lambda: None)
        service.start()
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        running = RunningServer(service, app, server, thread, listener.getsockname()[1])
        try:
            running.wait(lambda: server.started)
            yield running
        finally:
            server.should_exit = True
            thread.join(30)
            service.stop()
    assert not thread.is_alive()


def error_of(response, status):
    assert response.status_code == status, response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    return response.json()["error"]


def events(text):
    return [
        json.loads(line.removeprefix("data: ")) for line in text.split("\n\n") if line and "[DONE]" not in line
    ]


def turn(**message):
    """A conversation with this message at its end."""
    return {"messages": [*CHAT["messages"], message]}
