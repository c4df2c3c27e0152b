"""The tab Chat: its generators of updates, and in a real browser."""

import contextlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from html import unescape

import pytest
from playwright.sync_api import expect

from lora_tuner.server.metrics import Metrics

from ...api_server import HOSTILE
from .browser import (
    choose,
    focused,
    format_token,
    message_of,
    open_tab,
    run_async,
    tab_to,
    token_probabilities,
    wait_for_answer,
    wait_for_stream_end,
    waiting_for_events,
)

GREEDY = (12, 0.8, 0.95, 50, 0.0, 1.0, 0.0, 0.0, "", "", True)
RANDOM = (12, 0.8, 0.95, 50, 0.0, 1.0, 0.0, 0.0, "", "", False)


class Visitor:
    """A visitor of the tab, without a browser."""

    def __init__(self, served):
        from lora_tuner.server.playground.conversation import Conversation
        from lora_tuner.server.playground.page import Page  # gradio takes seconds to import

        self.tab = Page(served.service, Metrics(served.service)).chat
        self.conversation = Conversation()

    def ask(self, question, model="noir", system="", probabilities=False, settings=GREEDY, action=None):
        """Ask, or regenerate; return the last turn as it is shown, and all updates before that."""
        return run_async(self._ask(question, model, system, probabilities, settings, action))

    async def _ask(self, question, model, system, probabilities, settings, action):
        before = ""
        inputs = (question, self.conversation, model, system, probabilities)
        async with contextlib.aclosing(self.tab.answer(event(action), *inputs, *settings)) as updates:
            async for update in updates:
                before += str(update)
        shown = (await self.tab.show(self.conversation))[2]
        return str(shown), before

    def regenerate(self, **settings):
        return self.ask("", action="regenerate", **settings)

    def act(self, action, turn):
        return [str(update) for update in run_async(self.tab.act(self.conversation, event(action, turn)))]

    @property
    def answers(self):
        return [(turn.question, turn.answer.model, turn.answer.text) for turn in self.conversation.turns]


def event(action=None, turn=None):
    import gradio as gr

    return gr.EventData(None, {"action": action, "turn": turn} if action else None)


@pytest.fixture
def visitor(served):
    return Visitor(served)


def feedback_path(served):
    return served.service.config.runs_dir / "feedback.jsonl"


@pytest.fixture
def feedback(served):
    """Return a function that reads the stored thumbs."""
    path = feedback_path(served)
    path.unlink(missing_ok=True)
    yield lambda: [json.loads(line) for line in path.read_text().splitlines()]
    path.unlink(missing_ok=True)


def api_answer(served, model, messages, **settings):
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 12}
    return served.post("/v1/chat/completions", **body | settings).json()["choices"][0]


def test_conversation_equals_api_across_adapters(served, visitor):
    """Each answer has the whole conversation before it, whoever gave it."""
    messages = [{"role": "system", "content": "be brief"}]
    for question, model in (("so?", "noir"), ("and?", "verse"), ("then?", "gpt2")):
        shown, _ = visitor.ask(question, model, "be brief")
        messages.append({"role": "user", "content": question})
        expected = api_answer(served, model, messages)["message"]["content"]
        assert visitor.answers[-1] == (question, model, expected)
        assert f"<h2>{model}</h2>" in shown
        assert "12 tokens, cut off" in shown
        messages.append({"role": "assistant", "content": expected})


def test_auto_keeps_model_of_conversation(visitor):
    assert visitor.tab.model_names()[-1] == "auto"
    first, _ = visitor.ask("so?", "auto")
    model = visitor.answers[0][1]
    assert model in ("noir", "verse", "gpt2")
    assert f"auto: {'the base' if model == 'gpt2' else model}," in first
    later, _ = visitor.ask("and?", "auto")
    assert visitor.answers[1][1] == model
    assert "as before in this conversation" in later


def test_regenerate_keeps_earlier_answers(visitor):
    visitor.ask("so?", settings=RANDOM)
    visitor.ask("and?", settings=RANDOM)
    first = visitor.answers[-1]
    shown, _ = visitor.regenerate(model="verse", settings=RANDOM)
    assert "2 of 2" in shown
    assert visitor.answers[-1][1] == "verse"
    assert "1 of 2" in visitor.act("previous", 2)[2]
    assert visitor.answers[-1] == first
    visitor.act("previous", 1)  # its answer is a part of what follows
    visitor.ask("then?")
    *_, answer, question = visitor.conversation.turns[-1].answer.messages
    assert (answer["content"], question["content"]) == (first[2], "then?")


def test_edited_question_is_asked_anew(served, visitor):
    for question in ("so?", "and?", "then?"):
        visitor.ask(question)
    message, *_, said = visitor.act("edit", 2)
    assert (message, "Editing question 2" in said) == ("and?", True)
    assert visitor.act("cancel", 2)[0] == ""
    visitor.act("edit", 2)
    visitor.ask("or?", "verse")
    assert [question for question, *_ in visitor.answers] == ["so?", "or?"]
    messages = [
        {"role": "user", "content": "so?"},
        {"role": "assistant", "content": visitor.answers[0][2]},
        {"role": "user", "content": "or?"},
    ]
    assert visitor.answers[1][2] == api_answer(served, "verse", messages)["message"]["content"]


def test_errors_keep_conversation(visitor):
    visitor.ask("so?")
    before = visitor.answers
    wrong = (12, 0.8, 0, 50, 0.0, 1.0, 0.0, 0.0, "", "", False)
    for question, settings, line in (
        (" \n", GREEDY, "Enter a question"),
        ("and\0?", GREEDY, "A null byte"),
        ("and?", wrong, "Input should be greater than 0"),
    ):
        _, updates = visitor.ask(question, settings=settings)
        assert line in updates
        assert visitor.answers == before
    for question, model, line in (
        ("x " * 300, "noir", "has a context of 128"),
        ("and?", "gone", "no model 'gone'"),
    ):
        shown, _ = visitor.ask(question, model)
        assert re.search(f'role="alert">[^<]*{line}', unescape(shown))
    visitor.ask("then?")
    assert [question for question, *_ in visitor.answers] == ["so?", "then?"]
    assert len(visitor.conversation.turns[-1].answer.messages) == 3


def test_stopped_answer_stays(served, visitor):
    async def stop():
        settings = (visitor.conversation, "noir", "", True, *GREEDY)
        updates = visitor.tab.answer(event(), "so?", *settings)
        async for _ in updates:
            if visitor.conversation.turns[-1].answer.text:
                break
        second = [update async for update in visitor.tab.answer(event(), "and?", *settings)]
        await updates.aclose()
        return second, str((await visitor.tab.show(visitor.conversation))[2])

    with served.held_steps(pause=0.02):
        second, shown = run_async(stop())
        served.wait(lambda: served.scheduler.idle)
    assert second == []  # one at a time
    assert "stopped" in shown
    assert 'class="likely"' in shown
    assert 'aria-busy="false"' in shown
    assert len(visitor.answers) == 1
    visitor.ask("and?")
    assert len(visitor.answers) == 2


def test_reload_restores_only_its_conversation(visitor, monkeypatch):
    monkeypatch.setattr("lora_tuner.server.playground.chat_tab.MAX_KEPT", 2)
    keys = ["0" * 32, "1" * 32, "2" * 32]

    def restore(key):
        visitor.conversation, *_, shown = run_async(visitor.tab.restore(key))
        return shown

    assert "Ask a question" in restore(keys[0])
    visitor.ask("so?")
    assert "so?" not in restore(keys[1])
    assert "so?" in restore(keys[0])
    restore(keys[2])  # drops the one that was not used for longest
    assert "so?" in restore(keys[0])
    restore(keys[1])
    restore(keys[2])
    assert "so?" not in restore(keys[0])
    for wrong in ("", None, "so", "../../etc"):
        assert "Ask a question" in restore(wrong)


def test_probabilities_equal_api(served, visitor):
    shown, _ = visitor.ask("so?", probabilities=True)
    choice = api_answer(served, "noir", [{"role": "user", "content": "so?"}], logprobs=True, top_logprobs=5)
    spans, listed = token_probabilities(shown)
    assert "".join(text for _, text in spans) == choice["message"]["content"]
    tokens = choice["logprobs"]["content"]
    assert len(listed) == len(tokens) == 12
    for (chosen, others), token in zip(listed, tokens, strict=True):
        assert chosen == format_token(token)
        alternatives = [other for other in token["top_logprobs"] if other["token"] != token["token"]]
        assert others == ", ".join(map(format_token, alternatives))
        assert any(chosen in title for title, _ in spans)


def test_hostile_question_is_escaped(visitor):
    shown, _ = visitor.ask(HOSTILE, probabilities=True)
    assert "<img" not in shown
    assert "<script" not in shown
    assert HOSTILE in unescape(shown)


def test_thumbs_are_stored_as_preferences(visitor, feedback):
    """As TRL reads them: https://huggingface.co/docs/trl/dataset_formats#preference."""
    visitor.ask("so?")
    *_, said = visitor.act("up", 1)
    assert "Saved to feedback.jsonl" in said
    prompt = [{"role": "user", "content": "so?"}]
    good = [{"role": "assistant", "content": visitor.answers[0][2]}]
    (row,) = feedback()
    assert (row["prompt"], row["chosen"], row["rejected"]) == (prompt, good, None)
    assert (row["chosen_by"], row["rejected_by"], row["base"]) == ("noir", None, "gpt2")
    visitor.regenerate(model="verse")
    visitor.act("down", 1)
    bad = [{"role": "assistant", "content": visitor.answers[0][2]}]
    (row,) = feedback()
    assert (row["prompt"], row["chosen"], row["rejected"]) == (prompt, good, bad)
    assert (row["chosen_by"], row["rejected_by"]) == ("noir", "verse")
    visitor.regenerate(model="gpt2", system="be brief")  # another prompt: no pair with the others
    visitor.act("down", 1)
    assert [(bool(row["chosen"]), bool(row["rejected"])) for row in feedback()] == [(True, True), (False, True)]
    visitor.ask("and?")
    visitor.act("up", 2)
    assert [message["role"] for message in feedback()[-1]["prompt"]] == ["user", "assistant", "user"]
    *_, said = visitor.act("up", 2)  # once more removes it
    assert "Removed" in said
    assert len(feedback()) == 2
    for action, turn in (("up", 3), ("up", 0), ("up", "1"), ("up", [1]), ("purge", 1), (7, 1)):
        visitor.act(action, turn)
    assert len(feedback()) == 2


def test_thumbs_need_room_and_permission(served, visitor, feedback, monkeypatch):
    from lora_tuner.server.playground import feedback as module

    shown, _ = visitor.ask("so?")
    assert 'aria-label="Good answer 1"' in shown
    visitor.act("up", 1)
    visitor.ask("and?")
    monkeypatch.setattr(module, "MAX_BYTES", 400)
    *_, current, said = visitor.act("up", 2)
    assert "feedback.jsonl has reached 400 bytes: move it elsewhere" in said
    assert 'aria-pressed="true"' not in current
    assert len(feedback()) == 1
    monkeypatch.setattr(served.service, "config", served.service.config.model_copy(update={"host": "0.0.0.0"}))
    *_, current, _ = visitor.act("down", 1)
    assert "Good answer" not in current
    assert len(feedback()) == 1


def test_concurrent_thumbs_lose_nothing(tmp_path):
    from lora_tuner.server.playground.feedback import save

    (tmp_path / "feedback.jsonl").write_text('{"of": "somebody else"}\nno json')
    with ThreadPoolExecutor(8) as pool:
        list(
            pool.map(
                lambda number: save(tmp_path, f"{number:x}", [{"id": f"{number:x}", "n": number}]), range(24)
            )
        )
    lines = (tmp_path / "feedback.jsonl").read_text().splitlines()
    assert lines[:2] == ['{"of": "somebody else"}', "no json"]
    assert sorted(json.loads(line)["n"] for line in lines[2:]) == list(range(24))


def test_base_without_template_points_to_write(served, visitor, adapters, monkeypatch):
    monkeypatch.setattr(served.service.base.tokenizer, "chat_template", None)
    refresh = visitor.tab.refresh
    model, missing, controls = run_async(refresh(None))
    assert (model["choices"], missing["visible"], controls["visible"]) == ([], True, False)
    template = adapters / "verse" / "chat_template.jinja"
    template.write_text("{{ messages[-1].content }}")
    try:
        model, missing, controls = run_async(refresh(None))
    finally:
        template.unlink()
    assert (model["choices"], missing["visible"], controls["visible"]) == (["verse"], False, True)


@pytest.mark.slow
def test_chat_by_keyboard_in_browser(visit, feedback):
    page = visit()
    open_tab(page, "Chat")
    choose(page, "Answered by", "noir")
    tab_to(page, "Message")
    page.keyboard.type("so")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("what?")
    page.keyboard.press("Enter")
    wait_for_answer(page)
    expect(page.locator(".asked .text")).to_have_text("so\nwhat?")
    expect(page.locator(".chat h2").last).to_have_text("noir")
    expect(message_of(page)).to_have_value("")
    page.get_by_role("button", name="Good answer 1").focus()
    with waiting_for_events(page):
        page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Good answer 1")).to_have_attribute("aria-pressed", "true")
    assert focused(page) == "Good answer 1"
    expect(page.get_by_text("Saved to feedback.jsonl")).to_be_visible()
    assert len(feedback()) == 1
    page.get_by_role("checkbox", name="Token probabilities").check()
    page.get_by_role("button", name="Regenerate answer 1").focus()
    with waiting_for_events(page):
        page.keyboard.press("Enter")
    page.locator(".likely").first.wait_for()
    wait_for_answer(page)
    assert focused(page) == "Regenerate answer 1"
    page.locator("summary:visible", has_text="Token probabilities").press("Enter")
    expect(page.locator(".probabilities li").first).to_be_visible()
    page.get_by_role("button", name="Edit question 1").focus()
    with waiting_for_events(page):
        page.keyboard.press("Enter")
    expect(message_of(page)).to_have_value("so\nwhat?")
    assert focused(page) == "Message"
    page.reload()  # the conversation is still there, and goes on
    expect(page.locator(".asked .text:visible")).to_have_text("so\nwhat?")
    message_of(page).fill("and then?")
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".asked .text:visible")).to_have_text(["so\nwhat?", "and then?"])
    wait_for_answer(page)


@pytest.mark.slow
def test_stop_leave_or_restart_cancels_answer(visit, served):
    page = visit()
    open_tab(page, "Chat")
    empty = page.get_by_text("Ask a question.")
    restart = page.get_by_role("button", name="New conversation")

    def begin():
        message_of(page).fill("so?")
        page.get_by_role("button", name="Send").click()
        expect(page.locator(".chat[aria-busy=true] .facts")).to_have_text(re.compile("[1-9]\\d* tokens"))
        assert not served.scheduler.idle

    def leave(button, shown):
        button.click()
        expect(shown).to_be_visible()
        wait_for_stream_end(page)
        served.wait(lambda: served.scheduler.idle, 5)

    with served.held_steps(pause=0.5):  # a minute for an answer, like a large model
        begin()
        leave(restart, empty)
        begin()
        leave(page.get_by_role("button", name="Stop"), page.get_by_text("stopped"))
        leave(restart, empty)
        begin()
        page.close()
        served.wait(lambda: served.app.state.metrics.streams == 0)
        served.wait(lambda: served.scheduler.idle, 5)
