"""HTTP requests to the page, without a browser, and its generators of updates."""

import asyncio
import contextlib
import inspect
import json
import logging
import re
import shutil
import threading
from html import unescape
from types import SimpleNamespace

import httpx
import pytest

from lora_tuner import Generator, ModelOptions, SamplingParams
from lora_tuner.adapters.adapter import MANIFEST_FILE, load_adapter_folder
from lora_tuner.errors import GenerationError
from lora_tuner.evaluation import gain_matrix
from lora_tuner.server.metrics import JsonLines, Metrics

from ...api_server import KEY, PROMPT, add_hostile_adapters, serving, write_adapter
from .browser import run_async


@pytest.fixture(scope="module")
def playground():
    """The page and its tab Blend, with Gradio: each worker imports this file, only one needs seconds for Gradio."""
    from gradio.queueing import Queue

    from lora_tuner.server.playground import blend_tab, page

    return SimpleNamespace(Page=page.Page, blend=blend_tab, Queue=Queue)


@pytest.fixture(scope="module")
def adapters(adapters_dir):
    """Two good adapters, a hostile one and a broken one."""
    add_hostile_adapters(adapters_dir, "a")
    return adapters_dir


@pytest.fixture(scope="module")
def served(base, adapters):
    with serving(base, adapters, page=True, max_tokens=500) as served:
        yield served


def test_unused_gradio_routes_give_404(served):
    url = served.url
    with httpx.Client(base_url=url) as client:
        for path in (
            "upload",
            "file=/etc/passwd",
            "file/etc/passwd",
            "proxy=http://x.hf.space/",
            "info",
            "openapi.json",
        ):
            assert client.get(f"/gradio_api/{path}").status_code == 404, path
            assert client.post(f"/gradio_api/{path}").status_code == 404, path
        for path in (
            "run/write",
            "api/write",
            "call/write",
            "component_server",
            "vibe-edit",
            "deep_link",
            "run-history/connect",
        ):
            assert client.post(f"/gradio_api/{path}", json={"data": []}).status_code == 404, path
        for path in (
            "/monitoring",
            "/monitoring/summary",
            "/gradio_api/mcp/",
            "/gradio_api/deep_link",
            "/v1/nothing",
            "/robots.txt",
        ):
            assert client.get(path).status_code == 404, path
        assert client.get("/health").status_code == 200


def test_other_pages_start_nothing(served):
    """A browser names the origin of each request; only the page itself, or its user, changes anything."""
    body = {"data": [], "fn_index": 0, "session_hash": "s"}
    for path, method in (
        ("/gradio_api/queue/join", "POST"),
        ("/login", "POST"),
        (f"/uploads/{'a' * 32}/a.csv", "PUT"),
    ):
        for site in ("cross-site", "same-site"):
            response = httpx.request(method, f"{served.url}{path}", json=body, headers={"Sec-Fetch-Site": site})
            assert response.status_code == 403, (path, site)
            assert response.json()["error"]["message"] == "Other web pages may not use this one."
    own = httpx.post(f"{served.url}/gradio_api/reset", json={}, headers={"Sec-Fetch-Site": "same-origin"})
    assert own.status_code != 403


CHARSETS = ["undefined", "unicode_escape", "utf-7", "utf-16", "idna", "nothing"]


def test_page_refuses_what_gradio_cannot_read(base, adapters, caplog):
    caplog.set_level(logging.WARNING)
    form = b"".join(
        b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\n\\ud800\xed\xa0\x80\r\n' % name
        for name in (b"username", b"password")
    )
    join, event = "/gradio_api/queue/join", {"data": [], "session_hash": "s"}
    with serving(base, adapters, page=True, api_key=KEY) as served, httpx.Client(base_url=served.url) as client:
        for charset in CHARSETS:
            headers = {"Content-Type": f"multipart/form-data; boundary=x; charset={charset}"}
            response = client.post("/login", content=form + b"--x--", headers=headers)
            assert response.status_code in (400, 422), charset
        assert client.post("/login", data={"username": "x", "password": KEY}).status_code == 200
        for number in (9999, -1, 10**40):
            response = client.post(join, json=event | {"fn_index": number})
            assert response.status_code == 400
            assert response.json()["error"]["message"] == "The page does not understand this request: reload it."
        assert client.get("/", headers={"X-Forwarded-Host": "[::"}).status_code == 400
        caplog.clear()
        assert client.post(join, json=event | {"fn_index": 0}).status_code == 200  # without its inputs
        served.wait(lambda: caplog.records)
    (record,) = caplog.records
    line = JsonLines().format(record)
    assert "didn't receive enough input values" in json.loads(line)["traceback"]
    assert "\n" not in line


def test_measurements_leave_room_for_answers(served, playground, monkeypatch):
    """Twelve visitors measure, one after another; one who leaves the queue is dropped."""
    entered, release = [], threading.Event()

    def held(*arguments, **settings):
        entered.append(arguments)
        release.wait(30)
        raise GenerationError("measured")

    async def visit():
        page = playground.Page(served.service, Metrics(served.service))
        return [update async for update in page.gains.evaluate(["a"], "")]

    async def visit_all():
        visits = [asyncio.create_task(visit()) for _ in range(12)]
        while not entered:
            await asyncio.sleep(0.01)
        answer = await asyncio.to_thread(
            served.post, "/v1/completions", model="a", prompt=PROMPT, logprobs=1, max_tokens=3
        )
        assert (answer.status_code, len(entered)) == (200, 1)
        leaver = visits.pop()
        leaver.cancel()
        await asyncio.gather(leaver, return_exceptions=True)
        await asyncio.sleep(0.05)  # its work is dropped a little later
        release.set()
        return await asyncio.gather(*visits)

    monkeypatch.setattr(gain_matrix, "evaluate_on", held)
    visits = run_async(visit_all())
    assert all("measured" in updates[-1] for updates in visits)
    assert len(entered) == 11


def test_page_names_no_other_host(served):
    url = served.url
    response = httpx.get(url, headers={"Origin": "http://elsewhere.example", "Accept-Encoding": "br"})
    assert response.status_code == 200
    assert set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[\w./-]*", response.text)) <= {url.rpartition(":")[0]}
    assert "default-src 'self'" in response.headers["content-security-policy"]
    assert not [name for name in response.headers if name.startswith("access-control")]
    assert httpx.head(url).status_code == 200


def test_page_outputs_are_counted_and_logged(served, playground, caplog):
    """A visitor who leaves is logged as incomplete."""
    caplog.set_level(logging.INFO, "lora_tuner.server")
    metrics = Metrics(served.service)
    page = playground.Page(served.service, metrics)

    async def consume(updates, count):
        async with contextlib.aclosing(updates):
            async for _ in updates:
                count -= 1
                if not count:
                    break

    settings = [5, 0.8, 0.95, 50, 0.0, 1.1, 0.0, 0.0, "", "", False]
    run_async(consume(page.write.generate(PROMPT, ["a", "b"], False, False, *settings), 1000))
    run_async(consume(page.blend.blend(PROMPT, "a", "b", 0.5, False, playground.blend.SliderState()), 1000))
    with served.held_steps():
        run_async(consume(page.write.generate(PROMPT, [], False, False, *settings), 2))
    text = metrics.text().decode()
    for model, count in (("talker", 2), ("a", 1), ("b", 1), ("", 3)):
        assert f'lora_tuner_requests_total{{endpoint="page",model="{model}",status="200"}} {count}.0' in text
    assert 'lora_tuner_tokens_total{kind="completion",model="a"} 5.0' in text
    lines = [record.msg for record in caplog.records if record.name == "lora_tuner.server"]
    lines = [line for line in lines if line["path"] != "/health"]  # a browser of another test asks for it
    assert {line["path"] for line in lines} == {"page"}
    assert sorted((line["model"] or "", line["completion_tokens"], line["complete"]) for line in lines) == [
        *[("", playground.blend.BLEND_TOKENS, True)] * 3,
        ("a", 5, True),
        ("b", 5, True),
        ("talker", 0, False),
        ("talker", 5, True),
    ]
    assert PROMPT not in str(lines)


def shown(updates):
    """Return by title whether the prompt is marked as a question, and the text after it, and the note below."""

    async def last():
        return [update[0] async for update in updates][-1]

    html = str(run_async(last()))
    articles = re.findall(
        r'<h2>(.*?)</h2><p class="text"><span class="prompt( question)?">.*?</span>(.*?)</p>', html, re.S
    )
    return {name: (bool(is_chat), unescape(text)) for name, is_chat, text in articles}, html


def test_page_asks_chat_adapters(served, playground, base, adapters):
    """As `compare` does: through the template, the base only if all are asked, and bare text on demand."""
    for seed, name in enumerate(("talk", "more")):
        folder = write_adapter(adapters, name, base, seed + 5)
        manifest = load_adapter_folder(folder).manifest
        data = manifest.data.model_copy(update={"format": "messages"})
        (folder / MANIFEST_FILE).write_text(manifest.model_copy(update={"data": data}).to_json())
    page = playground.Page(served.service, Metrics(served.service))
    greedy_settings = [12, 0.8, 0.95, 50, 0.0, 1.0, 0.0, 0.0, "", "", True]
    generator = Generator(adapters_dir=adapters, options=ModelOptions(base=str(base), device="cpu"))
    try:
        for names, bare, asked in (
            (["a", "talk"], False, ["talk"]),
            (["talk", "more"], False, ["talker", "talk", "more"]),
            (["a", "talk"], True, []),
        ):
            columns, html = shown(page.write.generate(PROMPT, names, bare, False, *greedy_settings))
            assert list(columns) == ["talker", *names]
            for name, (is_question, text) in columns.items():
                assert is_question == (name in asked), (names, bare, name)
                (expected,) = generator.generate_batch(
                    [(PROMPT, None if name == "talker" else name)],
                    SamplingParams(greedy=True, max_new_tokens=12),
                    chat=is_question,
                )
                assert text == expected.text
            assert ("Asked through the chat template: " in html) == bool(asked)
        for bare in (False, True):
            columns, _ = shown(page.blend.blend(PROMPT, "talk", "a", 0.5, bare, playground.blend.SliderState()))
            assert [is_question for is_question, _ in columns.values()] == [not bare, not bare, False]
    finally:
        for name in ("talk", "more"):
            shutil.rmtree(adapters / name)


def test_page_fills_learned_template(served, playground, base, adapters):
    """As texts of the adapter began; the base alike, and one with several columns says how to write."""
    template = "Review: {text}\\nVerdict: {verdict}"
    for seed, (name, learned) in enumerate({"one": template, "two": template.replace("Rev", "{a} Rev")}.items()):
        folder = write_adapter(adapters, name, base, seed + 5)
        manifest = load_adapter_folder(folder).manifest
        data = manifest.data.model_copy(update={"template": learned, "answer_column": "verdict"})
        (folder / MANIFEST_FILE).write_text(manifest.model_copy(update={"data": data}).to_json())
    page = playground.Page(served.service, Metrics(served.service))
    settings = [3, 0.8, 0.95, 50, 0.0, 1.0, 0.0, 0.0, "", "", True]
    filled = f"Review: {PROMPT}\nVerdict:"
    try:
        for names, bare, prompts, note in (
            (["one"], False, [filled, filled], "Filled into the template that was learned: one."),
            (["one", "a"], False, [PROMPT, filled, PROMPT], "learned: one."),
            (["one"], True, [PROMPT, PROMPT], ""),
            (
                ["two"],
                False,
                [PROMPT, PROMPT],
                r"two has learned texts of the form “... Review: ...\nVerdict:”: write the prompt so.",
            ),
        ):
            _, html = shown(page.write.generate(PROMPT, names, bare, False, *settings))
            assert re.findall(r'<span class="prompt">(.*?)</span>', html, re.S) == prompts
            assert note in html
    finally:
        for name in ("one", "two"):
            shutil.rmtree(adapters / name)


def test_gradio_computes_no_statistics(served, playground, monkeypatch):
    """It would go through all past events after each event."""
    queue = playground.Page(served.service, Metrics(served.service)).blocks()._queue
    monkeypatch.setattr("gradio.queueing.Queue._get_df", None)
    queue.events_recorded = 10_000
    assert queue.compute_analytics_summary([{"function": "write"}]) == {"functions": {}}


def test_gradio_looks_seldom_for_events(served, playground):
    queue = playground.Page(served.service, Metrics(served.service)).blocks()._queue
    for name in ("sleep_when_free", "progress_update_sleep_when_free"):
        assert f"asyncio.sleep(self.{name})" in inspect.getsource(
            playground.Queue
        )  # else setting it changes nothing
        assert getattr(queue, name) == 0.05
