"""A report: rows that a run has seen, texts that are generated once, all parts, and what is kept."""

import dataclasses
import itertools
import json
import re
import shutil

import pytest

from lora_tuner import (
    EvalSet,
    Generator,
    Library,
    ModelOptions,
    Notice,
    SamplingParams,
    TrainConfig,
    train,
)
from lora_tuner.adapters.adapter import (
    CARD_FILE,
    CONFIG_FILE,
    MANIFEST_FILE,
    RUN_FILE,
    load_adapter_folder,
)
from lora_tuner.adapters.report import REPORT_FILE, TITLES, Doubling, GrowthFigures
from lora_tuner.analysis import forgetting
from lora_tuner.analysis import report as reports
from lora_tuner.analysis import subject as subjects
from lora_tuner.analysis.report import keep_report, make_report, sections
from lora_tuner.analysis.report_page import is_report_page, render_page
from lora_tuner.analysis.report_time import Pace, estimate_seconds
from lora_tuner.analysis.subject import generate_cached, load_subject
from lora_tuner.data import chat, general_text, tokenization
from lora_tuner.errors import AdapterError, Progress, ignore_events
from lora_tuner.evaluation import gain_matrix, held_out_loss
from lora_tuner.inference.batch import GenerationEngine
from lora_tuner.training.trainer import LoraTrainer

from .. import tiny_models
from .test_data_page import Elements

OPTIONS = ModelOptions(device="cpu")
SAMPLING = SamplingParams(temperature=1, top_p=1, top_k=0, repetition_penalty=1, max_new_tokens=5, seed=7)


def read_subject(adapter, options=OPTIONS):
    generator = Generator(adapter.path, options=options)
    return load_subject(adapter, generator, options)


# Rows that were trained on


@pytest.mark.parametrize("weights", [False, True])
def test_training_rows_are_those_of_the_steps(settings, tmp_path, monkeypatch, weights):
    """In a part of an epoch; rows in chunks, packed; of one source or two with weights."""
    trained, take_step = [], LoraTrainer.training_step

    def recorded(trainer, model, inputs, *arguments):
        for ids, positions in zip(inputs["input_ids"], inputs["position_ids"], strict=True):
            starts = [*(positions == 0).nonzero()[:, 0], len(ids)]
            trained.extend(ids[start:end].tolist() for start, end in itertools.pairwise(starts))
        return take_step(trainer, model, inputs, *arguments)

    monkeypatch.setattr(LoraTrainer, "training_step", recorded)
    changes = {}
    if weights:
        for number in range(2):
            texts = tiny_models.reviews(40, seed=number + 1)
            (tmp_path / f"{number}.jsonl").write_text(
                "".join(json.dumps({"text": text}) + "\n" for text in texts)
            )
        changes["dataset"] = ["0.jsonl=0.8", "1.jsonl=0.2"]
    adapter = train(settings(max_length=32, max_steps=4, **changes), None)
    tokenizer = Generator(adapter.path, options=OPTIONS).tokenizer_of(adapter.name)
    found = read_subject(adapter)
    assert found.train_missing is None
    owners = {}
    for text in found.train_texts:
        for piece in tokenization.encode_rows(tokenizer, [text], 32)[0]:
            owners[tuple(piece.tolist())] = text
    # The last row of a sequence has its padding.
    seen = {next(text for piece, text in owners.items() if tuple(row[: len(piece)]) == piece) for row in trained}
    assert seen == {*found.train_texts}
    assert len(found.train_texts) < adapter.manifest.data.counts["train"]
    assert not {*found.train_texts} & {*found.held_out.texts}


@pytest.mark.parametrize("objective", ["orpo", pytest.param("kto", marks=pytest.mark.slow)])
def test_training_rows_of_preferences_are_known(settings, tmp_path, objective):
    texts = tiny_models.reviews(40)
    rows = [{"prompt": f"film {n}", "chosen": text, "rejected": "a plot"} for n, text in enumerate(texts)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {
        "dataset": "pairs.jsonl",
        "objective": objective,
        "max_length": 32,
        "max_steps": 4,
        "batch_size": 1,
    }
    found = read_subject(train(settings(**changes), None))
    assert found.train_missing is None
    read = [chat.decode_row(text)["completion"] for text in (*found.train_texts, *found.held_out.texts)]
    assert {*read} < {*texts}
    assert len(found.train_texts) > 2
    assert not {*found.train_texts} & {*found.held_out.texts}


def test_missing_training_rows_have_a_reason(adapter, tmp_path):
    assert len(read_subject(adapter).train_texts) > 10
    (tmp_path / "reviews.csv").open("a").write("another row of text,0\n")
    changed = read_subject(adapter)
    assert changed.train_texts == []
    assert changed.train_missing == f"{tmp_path}/reviews.csv has changed since it was trained"
    (tmp_path / "reviews.csv").unlink()
    assert "There is no dataset" in read_subject(adapter).train_missing
    settings_file = adapter.path / RUN_FILE
    settings_file.write_text(settings_file.read_text().replace("streaming: false", "streaming: true"))
    assert "streamed" in read_subject(adapter).train_missing
    settings_file.unlink()
    assert read_subject(adapter).train_missing == "it has no run.yaml, so its training rows are unknown"


def test_rows_of_a_stranger_are_not_loaded(adapter, monkeypatch, tmp_path):
    """Without its held-out rows in the cache an adapter was trained elsewhere."""
    monkeypatch.setenv("LORA_TUNER_CACHE", str(tmp_path / "empty"))
    found = read_subject(adapter)
    assert "not in the cache" in found.held_out.missing
    assert found.train_missing == found.held_out.missing


# Texts


@pytest.fixture
def generator(adapter, tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_TUNER_CACHE", str(tmp_path / "cache"))
    return Generator(adapter.path, options=OPTIONS)


def prompts(generator, count=3):
    return [generator.encode_prompt(text) for text in tiny_models.reviews(count, seed=3)]


def test_cached_texts_are_generated_texts(generator):
    encoded = prompts(generator)
    for name in (generator.current_adapter, None):
        for _ in range(2):
            outputs = generate_cached(generator, name, encoded, SAMPLING, "texts")
            for number, (prompt, output) in enumerate(zip(encoded, outputs, strict=True)):
                sampling = SAMPLING.model_copy(update={"seed": 7 + number})
                (alone,) = generator.generate_batch([(prompt, name)], sampling, chat=False)
                assert output == dataclasses.replace(alone, prompt=prompt.text)


def test_interrupted_texts_go_on(generator, monkeypatch):
    """Whole batches are kept; what is kept is generated no more."""
    monkeypatch.setattr(subjects, "BATCH", 2)
    encoded, steps, step = prompts(generator, 5), [], GenerationEngine.step

    def interrupt(engine):
        steps.append(len(engine.sequences))
        if len(steps) == 8:  # in the second batch
            raise KeyboardInterrupt
        step(engine)

    monkeypatch.setattr(GenerationEngine, "step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate_cached(generator, "reviews", encoded, SAMPLING, "texts")
    assert generator.engine.sequences == []
    events = []
    outputs = generate_cached(generator, "reviews", encoded, SAMPLING, "texts", events.append)
    total = 5 * SAMPLING.max_new_tokens
    assert [event for event in events if event.done < 2 * SAMPLING.max_new_tokens] == []
    assert events[-1] == Progress("texts", total, total)
    monkeypatch.setattr(GenerationEngine, "step", None)  # all is kept
    assert generate_cached(generator, "reviews", encoded, SAMPLING, "texts", ignore_events) == outputs


def test_texts_are_of_these_weights(generator, adapter, monkeypatch):
    encoded = prompts(generator)
    first = generate_cached(generator, "reviews", encoded, SAMPLING, "texts")
    config = json.loads((adapter.path / CONFIG_FILE).read_text())
    (adapter.path / CONFIG_FILE).write_text(json.dumps(config | {"lora_alpha": 50 * config["lora_alpha"]}))
    manifest = json.loads((adapter.path / MANIFEST_FILE).read_text())
    manifest["weights"]["config"] = None
    (adapter.path / MANIFEST_FILE).write_text(json.dumps(manifest))
    again = Generator(adapter.path, options=OPTIONS)
    assert [output.text for output in generate_cached(again, "reviews", encoded, SAMPLING, "texts")] != [
        output.text for output in first
    ]


# The whole report


@pytest.fixture(scope="module")
def reported(gpt2, tmp_path_factory):
    """A folder with an adapter and the cache of its report; the report, and the events of making it."""
    folder, events = tmp_path_factory.mktemp("reported"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_TUNER_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        patch.setattr(forgetting, "general_texts", few_general_texts)
        rows = [json.dumps({"text": text}) + "\n" for text in tiny_models.reviews(120)]
        (folder / "rows.jsonl").write_text("".join(rows))
        config = {
            "rank": 2,
            "max_steps": 8,
            "max_length": 64,
            "batch_size": 4,
            "learning_rate": 0.01,
        }
        config |= {"dataset": "rows.jsonl", "base": str(gpt2), "device": "cpu", "name": "film"}
        adapter = train(TrainConfig(**config), None)
        options = dataclasses.replace(OPTIONS, notify=events.append)
        report = make_report(adapter, options, guards=[EvalSet("letters.txt", tiny_models.reviews(4, seed=8))])
    return folder, report, events


def few_general_texts():
    return general_text.general_texts(subset=True)


@pytest.fixture
def film(reported, tmp_path, monkeypatch):
    """The adapter, with the cache of its report."""
    shutil.copytree(reported[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("LORA_TUNER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(forgetting, "general_texts", few_general_texts)
    return Library().get("film")


def test_report_has_all_parts(reported):
    _, report, _ = reported
    assert report.missing == {"growth": reports.NO_SWEEP}
    assert report.weights == report.figures.weights
    assert [name for name, _ in report.figures.parts()] == ["style", "memorization", "forgetting"]
    assert [section.title for section in sections(report)] == [*TITLES.values()]
    assert "letters.txt" in report.forgetting.figures.guards
    facts = json.loads(json.dumps(report.to_dict()))
    assert facts["missing"].keys() == {"growth"}
    assert facts["growth"] is None
    assert facts["style"] is not None


def test_time_is_told_before(reported):
    _, _, events = reported
    first = next(number for number, event in enumerate(events) if isinstance(event, Progress))
    (told,) = [
        number for number, event in enumerate(events) if isinstance(event, Notice) and "takes about" in event.text
    ]
    assert told < first
    parts = r"style \S+ s, memorization \S+ s, forgetting \S+ s; .* Ctrl-C keeps what is finished\."
    assert re.fullmatch(rf"This takes about \S+ (s|min): {parts}", events[told].text)


def test_estimate_follows_the_pace(reported, film):
    fast, slow = (estimate_seconds(film, Pace(0.001 * factor, 0.0001 * factor)) for factor in (1, 10))
    assert fast.keys() == slow.keys() == {"style", "memorization", "forgetting"}
    assert slow["forgetting"] == pytest.approx(10 * fast["forgetting"])
    more = estimate_seconds(film, Pace(0.001, 0.0001), [EvalSet("mine", ["word " * 800])])
    assert more["forgetting"] == pytest.approx(fast["forgetting"] + 2 * 1000 * 0.0001)


def test_kept_report_has_no_text_of_rows(reported, film):
    _, report, _ = reported
    keep_report(film, report)
    kept = load_adapter_folder(film.path)
    assert {name for name, _ in kept.report.parts()} == {"style", "memorization", "forgetting"}
    text = (film.path / REPORT_FILE).read_text()
    for row in tiny_models.reviews(120):
        words = row.split()
        assert not [start for start in range(len(words) - 3) if " ".join(words[start : start + 4]) in text]
    card = (film.path / CARD_FILE).read_text()
    assert report.style.figures.sentences[0].replace("<", "&lt;") in card
    assert card.index("## What it learned") < card.index("## Limitations")


def test_skipped_parts_are_kept(reported, film):
    keep_report(film, reported[1])
    before = load_adapter_folder(film.path)
    again = make_report(before, OPTIONS, skip=["style", "memorization"])
    assert (again.style, again.memorization) == (None, None)
    keep_report(before, again)
    after = load_adapter_folder(film.path).report
    assert (after.style, after.memorization) == (before.report.style, before.report.memorization)
    assert after.forgetting.guards == {}
    (film.path / REPORT_FILE).write_text("damaged")
    keep_report(load_adapter_folder(film.path), again)
    assert load_adapter_folder(film.path).report.style is None


@pytest.mark.parametrize("name", ["style", "memorization", "forgetting", "growth"])
def test_each_part_can_be_skipped(film, name):
    report = make_report(film, OPTIONS, skip=[name])
    assert name not in report.missing
    assert {section.name for section in sections(report)} == TITLES.keys() - {name}


def test_report_without_measuring_loads_no_base(film, monkeypatch):
    monkeypatch.setattr(reports, "Generator", None)
    monkeypatch.setattr(gain_matrix, "open_base_of", None)
    report = make_report(film, OPTIONS, skip=["style", "memorization", "forgetting"])
    assert report.missing.keys() == {"growth"}


def test_repeated_report_measures_nothing(reported, film, monkeypatch):
    """Texts and losses are in the cache, and the figures are the same."""
    monkeypatch.setattr(reports, "measure_pace", lambda generator: Pace(1, 1))
    monkeypatch.setattr(GenerationEngine, "step", None)
    monkeypatch.setattr(held_out_loss, "measure_loss", lambda *arguments, **settings: 1 / 0)
    again = make_report(film, OPTIONS)
    figures = reported[1].figures
    assert again.figures.style == figures.style
    assert again.figures.memorization == figures.memorization


def test_adapter_without_rows_is_measured_on_general_text(film, monkeypatch, tmp_path):
    """As one of another tool, or one that was trained elsewhere."""
    monkeypatch.setenv("LORA_TUNER_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(reports, "Generator", None)
    report = make_report(film, OPTIONS)
    assert report.missing["style"] == report.missing["memorization"]
    assert "not in the cache" in report.missing["style"]
    assert report.forgetting is not None


def test_report_needs_a_manifest(film):
    (film.path / MANIFEST_FILE).unlink()
    with pytest.raises(AdapterError, match="has no manifest: write one with `adapters adopt`"):
        make_report(load_adapter_folder(film.path), OPTIONS)


def test_folder_that_cannot_be_written_is_told(reported, film, monkeypatch):
    def full(path, text):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(reports.atomic_io, "atomic_write_text", full)
    events = []
    keep_report(film, reported[1], events.append)
    (notice,) = events
    assert notice.text.startswith(
        "The report is not kept with the adapter. adapters/film/report.json: No space left"
    )


def test_personal_data_is_masked(reported):
    _, report, _ = reported
    example = dataclasses.replace(report.style.examples[0], you="write to john.smith@example.com")
    style = dataclasses.replace(report.style, examples=[example])
    masked = reports.mask_examples(style)
    assert masked.examples[0].you == "write to [EMAIL]"


def test_growth_of_a_sweep_is_shown(reported, film, monkeypatch):
    doubling = Doubling(
        quantity="rows",
        values=[100, 200, 400],
        gains=[0.1, 0.15, 0.19],
        gain=0.03,
        standard_error=0.01,
        low=0.017,
        high=0.043,
    )
    growth = GrowthFigures(sentences=["Twice the rows: +0.030 ± 0.010."], doublings=[doubling])
    monkeypatch.setattr(reports, "find_growth", lambda adapter, library: growth)
    report = make_report(film, OPTIONS, skip=["style", "memorization", "forgetting"])
    assert report.missing == {}
    assert report.to_dict()["growth"] == growth.model_dump()
    (section,) = sections(report)
    assert section.tables["Gain by size"][1] == [
        "rows",
        "100: 0.100, 200: 0.150, 400: 0.190",
        "+0.030 ± 0.010",
        "+0.017 to +0.043",
    ]
    page = render_page(report)
    assert "Twice the rows: +0.030 ± 0.010." in page
    assert "twice the rows: +0.030 ± 0.010" in page  # in the chart


# The page


def test_page_has_all_parts(reported, tmp_path):
    _, report, _ = reported
    page = render_page(report)
    for title in TITLES.values():
        assert f"<h2>{title}</h2>" in page
    assert f"Not measured: {reports.NO_SWEEP.replace('`', '`')}." in page
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    assert is_report_page(tmp_path / "page.html")


def test_page_of_report_loads_nothing(reported):
    elements = Elements(render_page(reported[1]))
    assert not {"script", "img", "link", "iframe", "object", "base", "form"} & set(elements.names)
    for name, value in elements.attributes:
        assert name not in ("src", "style", "srcset", "action")
        assert name != "href" or value.startswith("#")


def test_page_escapes_texts(reported):
    _, report, _ = reported
    example = dataclasses.replace(
        report.style.examples[0], adapter="<script>alert(1)</script>\x1b[31m{{ 7 * 7 }}"
    )
    page = render_page(dataclasses.replace(report, style=dataclasses.replace(report.style, examples=[example])))
    assert "<script" not in page
    assert "\x1b" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "{{ 7 * 7 }}" in page
