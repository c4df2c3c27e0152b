import threading
import time
from types import SimpleNamespace

import pytest

from lora_tuner import Generator, ModelOptions, SamplingParams
from lora_tuner.errors import ContextLengthError, QueueFullError, RequestTimeoutError, ServerClosingError
from lora_tuner.inference.sequence import Sequence
from lora_tuner.server import scheduler as module
from lora_tuner.server.scheduler import Request, Scheduler

from ..inference.test_multi_lora import written

GREEDY = SamplingParams(temperature=0, max_new_tokens=8, repetition_penalty=1.0)


@pytest.fixture
def generator(gpt2):
    return Generator(options=ModelOptions(base=str(gpt2), device="cpu"))


@pytest.fixture
def start(generator):
    """A worker over that base, which makes a step only when it is let."""
    workers = []

    def start(let=None, **settings):
        worker = Scheduler(generator.engine, **{"max_batch": 4, "max_waiting": 8, "room": 10_000} | settings)
        if let is not None:
            step = generator.engine.step

            def slow():
                if generator.engine.rows:
                    let.acquire()
                step()

            generator.engine.step = slow
        workers.append(worker)
        worker.start()
        return worker

    yield start
    for worker in workers:
        worker.stop()


def job(generator, prompt="the actor", count=1, model="a", seconds=60.0, tokens=8):
    sampling = GREEDY.model_copy(update={"max_new_tokens": tokens})
    return Request(
        model,
        [Sequence(generator.base, generator.encode_prompt(prompt).token_ids, sampling) for _ in range(count)],
        seconds,
    )


def wait(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_rows_are_written_as_the_generator_writes_them(generator, start):
    expected = generator.generate("the actor", GREEDY).text
    woken, worker, one = threading.Event(), start(), job(generator, count=6)
    one.wake = lambda: woken.set() if one.complete else None
    worker.submit(one)
    assert woken.wait(10)
    assert [row.settled_text for row in one.sequences] == [expected] * 6
    assert one.started < one.first_token < time.monotonic()
    wait(lambda: worker.idle)


def test_requests_of_one_model_take_turns_and_so_do_models(generator, start):
    let = threading.Semaphore(0)
    worker = start(let, max_batch=2)
    jobs = [job(generator, count=3, model=model) for model in ("a", "a", "b")]
    for it in jobs:
        worker.submit(it)
    wait(lambda: worker.waiting == 7)
    order = []
    for _ in range(200):
        let.release()
        wait(lambda: let._value == 0)
        order += [number for number, it in enumerate(jobs) if it.complete and number not in order]
        begun = [it._next for it in jobs]
        if sum(begun) == 5:
            assert begun in ([2, 1, 2], [1, 2, 2], [2, 2, 1], [1, 1, 3])
        if len(order) == 3:
            break
    assert order[0] == 2  # alone on its model, so every second turn is its own
    let.release(100)


def test_what_has_no_room_waits_and_what_never_has_is_refused(generator, start):
    let = threading.Semaphore(0)
    worker = start(let, room=60)
    long = len(generator.encode_prompt("the actor").token_ids) + 40
    worker.submit(job(generator, tokens=40))
    worker.submit(job(generator, tokens=40))
    wait(lambda: worker.running == 1)
    let.release(3)
    wait(lambda: let._value == 0)
    assert (worker.running, worker.waiting) == (1, 1)
    assert long < 60 < 2 * long
    with pytest.raises(ContextLengthError, match="Prompt and answer may have 60 tokens here"):
        worker.submit(job(generator, tokens=80))
    let.release(500)
    wait(lambda: worker.idle)


def test_only_so_many_wait(generator, start):
    let = threading.Semaphore(0)
    worker = start(let, max_batch=2, max_waiting=3)
    worker.submit(job(generator, count=5))
    with pytest.raises(QueueFullError, match="answers are waiting already") as busy:
        worker.submit(job(generator))
    assert busy.value.seconds >= 1
    let.release(500)
    wait(lambda: worker.idle)
    worker.submit(job(generator, count=5))


def test_who_is_sent_away_is_told_when_there_is_room(generator, start, monkeypatch):
    """However long the others have waited. Here a step takes a second."""
    let, clock, step = threading.Semaphore(0), [0.0], generator.engine.step
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def second():
        clock[0] += bool(generator.engine.rows)
        step()

    generator.engine.step = second
    worker, jobs = start(let, max_batch=2, max_waiting=30), []

    def left():
        return sum(not it.complete for it in jobs)

    def fill():
        while left() < 32:
            jobs.append(job(generator, tokens=4, seconds=1e9))
            jobs[-1].begun = clock[0]
            worker.submit(jobs[-1])

    def finish(count):
        """Seconds until so many are done."""
        begun, end = clock[0], left() - count
        while left() > end:
            let.release()
            wait(lambda now=clock[0]: clock[0] > now)
        wait(lambda: worker.running + worker.waiting == left())
        return clock[0] - begun

    fill()
    finish(20)
    for beyond in (10, 1):
        fill()
        with pytest.raises(QueueFullError) as busy:
            worker.submit(job(generator, count=beyond))
        assert busy.value.seconds == pytest.approx(finish(beyond), rel=0.3, abs=4)
    let.release(500)


def test_what_nobody_waits_for_goes(generator, start):
    let = threading.Semaphore(0)
    worker = start(let, max_batch=2)
    jobs = [job(generator, count=2), job(generator, count=2, model="b"), job(generator, model="c")]
    for it in jobs:
        worker.submit(it)
    wait(lambda: worker.running == 2)
    worker.cancel(jobs[0])
    worker.cancel(jobs[1])
    let.release(500)
    wait(lambda: jobs[2].complete)
    assert not jobs[0].complete
    assert not jobs[1].complete
    wait(lambda: worker.idle)
    assert generator.engine.rows == []


def test_what_takes_too_long_ends_whether_it_runs_or_waits(generator, start):
    let = threading.Semaphore(0)
    worker = start(let, max_batch=1)
    jobs = [job(generator, seconds=0.05), job(generator, seconds=0.05)]
    for it in jobs:
        worker.submit(it)
    time.sleep(0.1)
    let.release(500)
    wait(lambda: all(it.complete for it in jobs))
    assert [type(it.error) for it in jobs] == [RequestTimeoutError, RequestTimeoutError]
    wait(lambda: worker.idle)


def test_a_chore_has_its_turn_between_two_tokens(generator, start):
    worker, one = start(), job(generator, tokens=100)
    worker.submit(one)
    assert worker.do(threading.current_thread).name == "lora_tuner-worker"
    with pytest.raises(ZeroDivisionError):
        worker.do(lambda: 1 / 0)
    wait(lambda: one.complete)
    assert one.error is None


def test_closed_it_finishes_and_stopped_it_ends(generator, start):
    let = threading.Semaphore(0)
    worker = start(let)
    assert worker.answers
    first = job(generator)
    worker.submit(first)
    worker.close()
    assert not worker.answers
    with pytest.raises(ServerClosingError):
        worker.submit(job(generator))
    with pytest.raises(ServerClosingError):
        worker.do(lambda: None)
    let.release(500)
    wait(lambda: first.complete)
    assert first.error is None
    other = start(let)
    second = job(generator, tokens=100)
    other.submit(second)
    threading.Timer(0.1, let.release, [500]).start()
    other.stop()
    assert isinstance(second.error, ServerClosingError)


def test_a_batch_that_fails_takes_only_itself_along(generator, start):
    worker, step = start(), generator.engine.step

    def fail():
        generator.engine.step = step
        raise RuntimeError("out of luck")

    generator.engine.step = fail
    one, two = job(generator), job(generator)
    worker.submit(one)
    wait(lambda: one.complete)
    assert str(one.error) == "out of luck"
    worker.submit(two)
    wait(lambda: two.complete)
    assert two.error is None


def test_a_job_whose_row_cannot_be_written_fails_alone(generator, start, gpt2, tmp_path):
    adapter = written(gpt2, tmp_path / "one", target_modules=["c_attn"])
    whole = generator.find(adapter.path)[1]
    none = {name: type(it)(it.down, it.up * float("nan")) for name, it in whole.layers.items()}
    worker, bad, good = start(), job(generator, count=3), job(generator)
    bad.sequences[1].lora, bad.sequences[1].adapter = type(whole)(none), "one"
    for it in (bad, good):
        worker.submit(it)
    wait(lambda: bad.complete and good.complete)
    assert str(bad.error).startswith("one gives logits that are not finite")
    assert (good.error, good.sequences[0].settled_text) == (None, generator.generate("the actor", GREEDY).text)
    wait(lambda: worker.idle)
