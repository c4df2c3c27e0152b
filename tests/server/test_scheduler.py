import threading
import time
from types import SimpleNamespace

import pytest

from lora_tuner import Generator, ModelOptions, SamplingParams
from lora_tuner.errors import (
    ContextLengthError,
    QueueFullError,
    RequestTimeoutError,
    ServerClosingError,
)
from lora_tuner.inference.sequence import Sequence
from lora_tuner.server import scheduler as module
from lora_tuner.server.scheduler import Request, Scheduler

from ..inference.test_multi_lora import save_peft_adapter

GREEDY = SamplingParams(temperature=0, max_new_tokens=8, repetition_penalty=1.0)


@pytest.fixture
def generator(gpt2):
    return Generator(options=ModelOptions(base=str(gpt2), device="cpu"))


@pytest.fixture
def start(generator):
    """Start a scheduler over that base; with a semaphore each step waits for its release."""
    schedulers = []

    def start(steps=None, **settings):
        defaults = {"max_batch": 4, "max_waiting": 8, "max_cache_tokens": 10_000}
        scheduler = Scheduler(generator.engine, **defaults | settings)
        if steps is not None:
            step = generator.engine.step

            def held_step():
                if generator.engine.sequences:
                    steps.acquire()
                step()

            generator.engine.step = held_step
        schedulers.append(scheduler)
        scheduler.start()
        return scheduler

    yield start
    for scheduler in schedulers:
        scheduler.stop()


def make_request(generator, prompt="the actor", count=1, model="a", seconds=60.0, tokens=8):
    sampling = GREEDY.model_copy(update={"max_new_tokens": tokens})
    ids = generator.encode_prompt(prompt).token_ids
    sequences = [Sequence(generator.base, ids, sampling) for _ in range(count)]
    return Request(model, sequences, seconds)


def wait(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_scheduler_output_equals_generator(generator, start):
    expected = generator.generate("the actor", GREEDY).text
    complete, scheduler, request = threading.Event(), start(), make_request(generator, count=6)
    request.wake = lambda: complete.set() if request.complete else None
    scheduler.submit(request)
    assert complete.wait(10)
    assert [sequence.settled_text for sequence in request.sequences] == [expected] * 6
    assert request.started < request.first_token < time.monotonic()
    wait(lambda: scheduler.idle)


def test_models_and_requests_take_turns(generator, start):
    steps = threading.Semaphore(0)
    scheduler = start(steps, max_batch=2)
    requests = [make_request(generator, count=3, model=model) for model in ("a", "a", "b")]
    for request in requests:
        scheduler.submit(request)
    wait(lambda: scheduler.waiting == 7)
    order = []
    for _ in range(200):
        steps.release()
        # The last step may still be under way when the next is released, which then has nothing to do.
        wait(lambda: steps._value == 0 or all(request.complete for request in requests))
        order += [number for number, request in enumerate(requests) if request.complete and number not in order]
        admitted = [request.admitted for request in requests]
        if sum(admitted) == 5:
            assert admitted in ([2, 1, 2], [1, 2, 2], [2, 2, 1], [1, 1, 3])
        if len(order) == 3:
            break
    assert order[0] == 2  # alone on its model, so it has every second turn
    steps.release(100)


def test_full_cache_delays_or_rejects(generator, start):
    steps = threading.Semaphore(0)
    scheduler = start(steps, max_cache_tokens=60)
    length = len(generator.encode_prompt("the actor").token_ids) + 40
    scheduler.submit(make_request(generator, tokens=40))
    scheduler.submit(make_request(generator, tokens=40))
    wait(lambda: scheduler.running == 1)
    steps.release(3)
    wait(lambda: steps._value == 0)
    assert (scheduler.running, scheduler.waiting) == (1, 1)
    assert length < 60 < 2 * length
    with pytest.raises(ContextLengthError, match="the KV cache of this server holds 60: shorten"):
        scheduler.submit(make_request(generator, tokens=80))
    steps.release(500)
    wait(lambda: scheduler.idle)


def test_full_queue_rejects_request(generator, start):
    steps = threading.Semaphore(0)
    scheduler = start(steps, max_batch=2, max_waiting=3)
    scheduler.submit(make_request(generator, count=5))
    with pytest.raises(QueueFullError, match=r"The queue is full, with [345] sequences waiting") as full:
        scheduler.submit(make_request(generator))
    assert full.value.seconds >= 1
    steps.release(500)
    wait(lambda: scheduler.idle)
    scheduler.submit(make_request(generator, count=5))


def test_full_queue_estimates_waiting_time(generator, start, monkeypatch):
    """The estimate holds however long others have waited. Here a step takes a second."""
    steps, clock, step = threading.Semaphore(0), [0.0], generator.engine.step
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def step_of_one_second():
        clock[0] += bool(generator.engine.sequences)
        step()

    generator.engine.step = step_of_one_second
    scheduler, requests = start(steps, max_batch=2, max_waiting=30), []

    def count_open():
        return sum(not request.complete for request in requests)

    def fill():
        while count_open() < 32:
            requests.append(make_request(generator, tokens=4, seconds=1e9))
            requests[-1].started = clock[0]
            scheduler.submit(requests[-1])

    def finish(count):
        """Return the seconds until that many are complete."""
        begun, end = clock[0], count_open() - count
        while count_open() > end:
            steps.release()
            wait(lambda now=clock[0]: clock[0] > now)
        wait(lambda: scheduler.running + scheduler.waiting == count_open())
        return clock[0] - begun

    fill()
    finish(20)
    for excess in (10, 1):
        fill()
        with pytest.raises(QueueFullError) as full:
            scheduler.submit(make_request(generator, count=excess))
        assert full.value.seconds == pytest.approx(finish(excess), rel=0.3, abs=4)
    steps.release(500)


def test_cancelled_requests_are_dropped(generator, start):
    steps = threading.Semaphore(0)
    scheduler = start(steps, max_batch=2)
    running, waiting, other = (
        make_request(generator, count=2),
        make_request(generator, count=2, model="b"),
        make_request(generator, model="c"),
    )
    for request in (running, waiting, other):
        scheduler.submit(request)
    wait(lambda: scheduler.running == 2)
    scheduler.cancel(running)
    scheduler.cancel(waiting)
    steps.release(500)
    wait(lambda: other.complete)
    assert not running.complete
    assert not waiting.complete
    wait(lambda: scheduler.idle)
    assert generator.engine.sequences == []


def test_timeout_ends_running_and_waiting(generator, start):
    steps = threading.Semaphore(0)
    scheduler = start(steps, max_batch=1)
    requests = [make_request(generator, seconds=0.05), make_request(generator, seconds=0.05)]
    for request in requests:
        scheduler.submit(request)
    time.sleep(0.1)
    steps.release(500)
    wait(lambda: all(request.complete for request in requests))
    errors = [type(request.error) for request in requests]
    assert errors == [RequestTimeoutError, RequestTimeoutError]
    wait(lambda: scheduler.idle)


def test_work_runs_between_steps(generator, start):
    scheduler, request = start(), make_request(generator, tokens=100)
    scheduler.submit(request)
    thread = scheduler.run_between_steps(threading.current_thread)
    assert thread.name == "lora_tuner-scheduler"
    with pytest.raises(ZeroDivisionError):
        scheduler.run_between_steps(lambda: 1 / 0)
    wait(lambda: request.complete)
    assert request.error is None


def test_other_work_takes_half_of_time(generator, start, monkeypatch):
    """By a clock of its own: a step takes a second, other work takes five."""
    now, events, step, entered = [0.0], [], generator.engine.step, threading.Event()

    def counted_step():
        if generator.engine.sequences:
            entered.wait(10)  # until all work waits
            now[0] += 1
            events.append("step")
        step()

    def work():
        now[0] += 5
        events.append("work")

    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(generator.engine, "step", counted_step)
    scheduler = start()
    request = make_request(generator, tokens=40, seconds=1000)
    request.started = 0.0
    scheduler.submit(request)
    threads = [threading.Thread(target=scheduler.run_between_steps, args=[work]) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait(lambda: len(scheduler._tasks) >= 3)
    entered.set()
    for thread in threads:
        thread.join(10)
    wait(lambda: request.complete)
    between = "".join(event[0] for event in events).strip("s").split("w")[1:-1]
    assert len(between) == 3
    assert all(len(steps) >= 5 for steps in between)


def test_close_finishes_and_stop_fails(generator, start):
    steps = threading.Semaphore(0)
    scheduler = start(steps)
    assert scheduler.accepting
    request = make_request(generator)
    scheduler.submit(request)
    scheduler.close()
    assert not scheduler.accepting
    with pytest.raises(ServerClosingError):
        scheduler.submit(make_request(generator))
    with pytest.raises(ServerClosingError):
        scheduler.run_between_steps(lambda: None)
    steps.release(500)
    wait(lambda: request.complete)
    assert request.error is None
    stopped = start(steps)
    cut_off = make_request(generator, tokens=100)
    stopped.submit(cut_off)
    threading.Timer(0.1, steps.release, [500]).start()
    stopped.stop()
    assert isinstance(cut_off.error, ServerClosingError)


def test_failed_step_fails_its_batch_alone(generator, start):
    scheduler, step = start(), generator.engine.step

    def fail():
        generator.engine.step = step
        raise RuntimeError("failed step")

    generator.engine.step = fail
    failed, later = make_request(generator), make_request(generator)
    scheduler.submit(failed)
    wait(lambda: failed.complete)
    assert str(failed.error) == "failed step"
    scheduler.submit(later)
    wait(lambda: later.complete)
    assert later.error is None


def test_failed_sequence_fails_its_request_alone(generator, start, gpt2, tmp_path):
    adapter = save_peft_adapter(gpt2, tmp_path / "one", target_modules=["c_attn"])
    loaded = generator.get_or_load(adapter.path)[1]
    layers = {name: type(layer)(layer.A, layer.B * float("nan")) for name, layer in loaded.layers.items()}
    scheduler, bad, good = start(), make_request(generator, count=3), make_request(generator)
    bad.sequences[1].lora, bad.sequences[1].adapter = type(loaded)(layers), "one"
    for request in (bad, good):
        scheduler.submit(request)
    wait(lambda: bad.complete and good.complete and scheduler.idle)  # one thread at a time on the engine
    assert str(bad.error).startswith("one produces logits that are not finite")
    expected = generator.generate("the actor", GREEDY).text
    assert (good.error, good.sequences[0].settled_text) == (None, expected)
    wait(lambda: scheduler.idle)
