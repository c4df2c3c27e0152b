"""Many clients at once, while adapters are replaced, broken and removed on disk."""

import concurrent.futures
import random
import shutil
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest

from lora_tuner.adapters import adapter

from .. import api_server

NAMES = [f"a{number}" for number in range(8)]
PROMPTS = ["the actor", "so", "this film never drags. the story"]
TOKENS = 24
GREEDY = {"max_tokens": TOKENS, "temperature": 0}


@pytest.mark.parametrize("seconds", [3, pytest.param(60, marks=pytest.mark.slow)])
def test_load_while_adapters_change(gpt2: Path, tmp_path: Path, seconds: int) -> None:
    """Each text is that of one version of its adapter, whole; what is refused is refused for the state that it was in."""
    for version in (0, 1):
        for number, name in enumerate(NAMES):
            api_server.write_adapter(tmp_path / str(version), name, gpt2, 10 * version + number)
    either = {
        (name, prompt): {
            api_server.greedy(gpt2, tmp_path / str(version), name, prompt, TOKENS).text for version in (0, 1)
        }
        for name in NAMES
        for prompt in PROMPTS
    }
    shelf, seen, changes = tmp_path / "adapters", Counter[str](), Counter[str]()
    shutil.copytree(tmp_path / "0", shelf)
    with api_server.serving(gpt2, shelf, max_batch=8, max_waiting=24, max_resident=5) as served:
        end = time.monotonic() + seconds

        def ask(client: int) -> None:
            draw = random.Random(client)
            with httpx.Client(base_url=served.url, timeout=60) as http:
                while time.monotonic() < end:
                    name, prompt = draw.choice(NAMES), draw.choice(PROMPTS)
                    answer = http.post("/v1/completions", json={"model": name, "prompt": prompt, **GREEDY})
                    if answer.status_code == 200:
                        right = answer.json()["choices"][0]["text"] in either[name, prompt]
                        seen["right" if right else f"WRONG {name} {prompt}"] += 1
                    else:
                        seen[f"{answer.status_code} {answer.json()['error']['code']}"] += 1

        def spoil() -> None:
            draw = random.Random(0)
            while time.monotonic() < end:
                name, way = draw.choice(NAMES), draw.choice(["replace", "replace", "break", "remove"])
                gone, new = tmp_path / f"gone{changes.total()}", shelf / ".new"
                shutil.copytree(tmp_path / draw.choice("01") / name, new)
                if way == "break":
                    weights = new / adapter.WEIGHTS_FILE
                    weights.write_bytes(weights.read_bytes()[:-100])
                if (shelf / name).exists():
                    (shelf / name).rename(gone)
                shutil.rmtree(new) if way == "remove" else new.rename(shelf / name)
                changes[way] += 1
                time.sleep(0.02)

        with concurrent.futures.ThreadPoolExecutor(17) as pool:
            for work in [pool.submit(spoil), *(pool.submit(ask, client) for client in range(16))]:
                work.result()
        assert set(changes) == {"replace", "break", "remove"}
        assert set(seen) <= {"right", "404 model_broken", "404 model_not_found", "429 rate_limit_exceeded"}, seen
        assert seen["right"] > 20
        assert seen["404 model_broken"]
        assert seen["404 model_not_found"]
        assert len(served.generator.loaded_adapters) <= 5
        shutil.rmtree(shelf)
        shutil.copytree(tmp_path / "1", shelf)
        assert (
            served.post("/v1/completions", model="a0", prompt="so", **GREEDY).json()["choices"][0]["text"]
            in either["a0", "so"]
        )
