"""Many clients at once, while adapters change on disk."""

import concurrent.futures
import itertools
import random
import shutil
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest

from lora_tuner import Generator, ModelOptions, SamplingParams
from lora_tuner.adapters import adapter

from .. import api_server

NAMES = [f"a{number}" for number in range(8)]
PROMPTS = ["the actor", "so", "this film never drags. the story"]
TOKENS = 24
GREEDY = {"max_tokens": TOKENS, "temperature": 0}


@pytest.mark.parametrize("seconds", [3, pytest.param(60, marks=pytest.mark.slow)])
def test_load_while_adapters_change(gpt2: Path, tmp_path: Path, seconds: int) -> None:
    """Each output is that of one version of its adapter; each error fits a state that the adapter was in."""
    expected: dict[tuple[str, str], set[str]] = {}
    sampling = SamplingParams(temperature=0, max_new_tokens=TOKENS, repetition_penalty=1.0)
    for version in (0, 1):
        folder = tmp_path / str(version)
        for number, name in enumerate(NAMES):
            api_server.write_adapter(folder, name, gpt2, 10 * version + number)
        options = ModelOptions(base=str(gpt2), device="cpu")
        generator = Generator(adapters_dir=folder, options=options)
        for name, prompt in itertools.product(NAMES, PROMPTS):
            (output,) = generator.generate_batch([(prompt, name)], sampling)
            expected.setdefault((name, prompt), set()).add(output.text)
    adapters_dir, outcomes, changes = tmp_path / "adapters", Counter[str](), Counter[str]()
    shutil.copytree(tmp_path / "0", adapters_dir)
    with api_server.serving(gpt2, adapters_dir, max_batch=8, max_waiting=24, max_resident=5) as served:
        end = time.monotonic() + seconds

        def send_requests(client: int) -> None:
            chooser = random.Random(client)
            with httpx.Client(base_url=served.url, timeout=60) as http:
                while time.monotonic() < end:
                    name, prompt = chooser.choice(NAMES), chooser.choice(PROMPTS)
                    response = http.post("/v1/completions", json={"model": name, "prompt": prompt, **GREEDY})
                    if response.status_code == 200:
                        right = response.json()["choices"][0]["text"] in expected[name, prompt]
                        outcomes["right" if right else f"WRONG {name} {prompt}"] += 1
                    else:
                        outcomes[f"{response.status_code} {response.json()['error']['code']}"] += 1

        def change_adapters() -> None:
            chooser = random.Random(0)
            while time.monotonic() < end:
                name, action = (
                    chooser.choice(NAMES),
                    chooser.choice(["replace", "replace", "break", "remove"]),
                )
                removed, new = tmp_path / f"gone{changes.total()}", adapters_dir / ".new"
                shutil.copytree(tmp_path / chooser.choice("01") / name, new)
                if action == "break":
                    weights = new / adapter.WEIGHTS_FILE
                    weights.write_bytes(weights.read_bytes()[:-100])
                if (adapters_dir / name).exists():
                    (adapters_dir / name).rename(removed)
                shutil.rmtree(new) if action == "remove" else new.rename(adapters_dir / name)
                changes[action] += 1
                time.sleep(0.02)

        with concurrent.futures.ThreadPoolExecutor(17) as pool:
            for future in [
                pool.submit(change_adapters),
                *(pool.submit(send_requests, client) for client in range(16)),
            ]:
                future.result()
        assert set(changes) == {"replace", "break", "remove"}
        assert set(outcomes) <= {
            "right",
            "404 model_broken",
            "404 model_not_found",
            "429 rate_limit_exceeded",
        }, outcomes
        assert outcomes["right"] > 20
        assert outcomes["404 model_broken"]
        assert outcomes["404 model_not_found"]
        assert len(served.generator.loaded_adapters) <= 5
        shutil.rmtree(adapters_dir)
        shutil.copytree(tmp_path / "1", adapters_dir)
        assert (
            served.post("/v1/completions", model="a0", prompt="so", **GREEDY).json()["choices"][0]["text"]
            in expected["a0", "so"]
        )
