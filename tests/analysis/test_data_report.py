"""The figures of a report are those of training and evaluation, and it holds no personal data."""

import json

import pytest

from lora_tuner import ModelOptions
from lora_tuner.analysis import data_page, data_report, phones, row_checks, text_checks
from lora_tuner.config import TrainConfig
from lora_tuner.data import tokenization
from lora_tuner.data.dataset import load_dataset
from lora_tuner.errors import BaseModelError, HubError
from lora_tuner.evaluation import held_out_loss
from lora_tuner.models import loading, resolve

from ..data.test_chat import chat_base  # noqa: F401 - a fixture
from ..data_files import TEXTS, jsonl
from .conftest import SECRETS


@pytest.fixture
def make(gpt2, tmp_path):
    def call(name, content, **settings):
        (tmp_path / name).write_text(content, encoding="utf-8")
        options = {"sample_rows": 1000, "loss_rows": 0}
        options = {option: settings.pop(option, default) for option, default in options.items()}
        config = TrainConfig.model_validate({"dataset": name, "base": str(gpt2)} | settings)
        return data_report.make_report(config, **options)

    return call


def test_counts_are_those_of_training(report, dirty):
    counts = load_dataset(TrainConfig(dataset=str(dirty), clean="none", near_duplicates="keep")).counts
    assert report.counts == counts.__dict__
    assert (report.counts["read"], report.counts["empty"], report.counts["duplicates"]) == (60, 1, 1)
    assert report.sampled_rows == 58
    assert not report.is_sample


def test_lengths_are_those_of_training(report, dirty, gpt2):
    dataset = load_dataset(TrainConfig(dataset=str(dirty), clean="none", near_duplicates="keep"))
    tokenizer = loading.load_tokenizer(loading.base_for_adapter(None, ModelOptions(base=str(gpt2))))
    texts = dataset.train + dataset.held_out
    _, use = tokenization.encode_rows(tokenizer, texts, 64)
    assert report.lengths.total == use.tokens == sum(use.row_tokens)
    assert report.lengths.chunked_rows == sum(count > 64 for count in use.row_tokens) > 0
    assert report.lengths.used_share == use.share == 1
    assert (report.long_rows, report.long[0].row) == (1, 31)


def test_losses_are_those_of_evaluation(report, dirty, gpt2):
    losses = report.losses
    base = loading.open_base(None, ModelOptions(base=str(gpt2), device="cpu"), training=True)
    dataset = load_dataset(TrainConfig(dataset=str(dirty), clean="none", near_duplicates="keep"))
    rows = held_out_loss.encode_held_out(base, dataset.train + dataset.held_out)
    measured = held_out_loss.measure_loss(base.model, base, rows)
    each = {
        f"{nll / count:.3f} ({count:,} tokens)"
        for nll, count in zip(measured.nll, measured.predictions, strict=True)
    }
    notes = [example.note for example in (*losses.hardest, *losses.easiest)]
    assert losses.rows == 8
    assert set(notes) <= each
    assert float(losses.hardest[0].note.split()[0]) > losses.loss > float(losses.easiest[0].note.split()[0])


def test_near_duplicates_and_languages_have_examples(report):
    copies = report.near_duplicates
    assert copies.rows - copies.clusters == copies.spare_rows >= 1
    assert [11, 12] in [[example.row for example in cluster] for cluster in copies.examples]
    assert {language.code: language.rows for language in report.languages}["en"] > 40
    assert sum(language.rows for language in report.languages) == 58


def test_personal_data_is_counted_and_masked(report):
    assert report.personal_rows == 1
    for data in report.personal_data:
        assert (data.rows, data.count) == (1, 1)
        assert data.examples[0].row == 3
        assert data.examples[0].note == SECRETS[data.kind][1]
        assert data.examples[0].note in data.examples[0].text
    shown = json.dumps(report.to_dict(), ensure_ascii=False)
    assert not [secret for secret, _ in SECRETS.values() if secret in shown]


def test_conversations_are_read_by_field(make, chat_base):  # noqa: F811
    call = {"type": "function", "function": {"name": "login", "arguments": {"password": "tR7$kkP02q"}}}
    turns = [
        {"role": "user", "content": "Please log in as ann@example.com"},
        {"role": "assistant", "content": "That is done now.", "tool_calls": [call]},
    ]
    rows = [{"messages": turns, "id": number} for number in range(9)]
    rows += [{"messages": [{"role": "user", "content": f"Hi {n}"}, turns[1]]} for n in range(5)]
    report = make("chat.jsonl", jsonl(rows), base=str(chat_base))
    assert {data.kind: data.rows for data in report.personal_data if data.rows} == {"email": 1, "key": 6}
    assert report.lengths.shortest == 0
    assert "The chat template of the base cannot write 6 conversations" in report.hints[0]


def test_preferences_are_read_by_side(make):
    rows = [{"prompt": f"Write to a{n}@x.org", "chosen": "yes " * n, "rejected": "no"} for n in range(1, 31)]
    report = make("a.jsonl", jsonl(rows), objective="dpo", max_length=16, loss_rows=5)
    assert (report.sampled_rows, sum(bar.rows for bar in report.lengths.histogram)) == (30, 30)
    assert any("longer answer" in hint for hint in report.hints)
    assert report.lengths.truncated_rows > 5  # those of which the longer answer is cut
    assert report.lengths.chunked_rows == 0
    emails = next(found for found in report.personal_data if found.kind == "email")
    assert emails.rows == 30
    assert report.losses.rows == 5
    assert report.contents == {"preferences": {"pairs": 30, "prompts": 30}}
    assert "[rejected] no" in report.short[0].text if report.short else True


def test_labels_and_answers_are_counted(make):
    rows = [{"prompt": f"say {n // 2}", "completion": f"yes {n}", "label": n % 3 > 0} for n in range(30)]
    report = make("a.jsonl", jsonl(rows), objective="kto", near_duplicates="keep")
    assert report.contents == {"preferences": {"desired": 20, "undesired": 10, "prompts": 15}}
    text = "text,label\n" + "".join(f"{words},{'ann@x.org' if n % 3 else 'b'}\n" for n, words in enumerate(TEXTS))
    report = make("b.csv", text, label_column="label")
    assert report.contents["labels"]["b"] == 10
    assert "ann@x.org" not in report.contents["labels"]
    page = data_page.render_page(report)
    assert "<h3>Labels</h3>" in page
    assert "<li>10 b</li>" in page


def test_template_rows_are_read_as_text(make):
    text = "question,answer\n" + "".join(f"What is {n}?,It is a{n}@b.de indeed\n" for n in range(9))
    report = make("rows.csv", text, template="Q: {question} A: {answer}", answer_column="answer")
    assert (
        "Training would stop: rows.csv: 9 usable rows of 9 (0 empty, 0 duplicates, 8 near duplicates"
        in report.hints[0]
    )
    assert {data.kind: data.count for data in report.personal_data if data.count} == {"email": 9}
    assert report.personal_data[0].examples[0].text == "Q: What is 0? A: It is a***@***.de indeed"


def test_base_without_template_counts_words(make):
    rows = [{"prompt": f"say {n}", "completion": "one two"} for n in range(9)]
    assert make("pairs.jsonl", jsonl(rows)).lengths.unit == "tokens"
    rows = [
        {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": "ok"}]}
        for n in range(9)
    ]
    report = make("chat.jsonl", jsonl(rows))
    assert report.lengths.unit == "words"
    assert "This base has no chat template" in report.hints[0]


def test_rows_that_base_cannot_read_give_hint(make):
    row = {"messages": [{"role": "user", "content": "say"}, {"role": "assistant", "content": "ok"}]}
    rows = [row | {"messages": [{"role": "user", "content": f"say {n}"}, row["messages"][1]]} for n in range(9)]
    report = make("chat.jsonl", jsonl(rows), loss_rows=4)
    assert report.losses is None
    assert report.hints[-1] == "The loss is not measured, as the base cannot read these rows."


def test_datasets_of_different_cleaning_say_auto(make, tmp_path):
    (tmp_path / "note.md").write_text("# A note\n\nof two lines")
    report = make(
        "rows.txt", "\n".join(f"the story number {n} works" for n in range(20)), dataset=["rows.txt", "note.md"]
    )
    assert report.clean == "auto"


def test_invalid_rows_are_reported(make):
    rows = [{"text": f"the story number {n} works"} for n in range(20)] + [{"text": ["a@example.com"]}] * 5
    report = make("rows.jsonl", jsonl(rows))
    (invalid,) = report.invalid
    assert (invalid.rows, report.counts["invalid"], report.stops_training) == (5, 5, True)
    assert "21" in invalid.first


def test_encoding_trouble_is_searched_in_all_rows(make):
    texts = [f"the story number {n} works for line {n * 7}" for n in range(600)]
    report = make("rows.txt", "\n".join([*texts, "the cafe\u0301 of the last row"]), txt_rows="line")
    assert [(trouble.kind, trouble.rows) for trouble in report.encoding] == [("decomposed accents (NFD)", 1)]


def test_sample_is_stated_and_that_of_max_rows(make, gpt2, tmp_path):
    text = "\n".join(f"the story number {n} works for line {n * 7}" for n in range(200))
    sampled = make("rows.txt", text, sample_rows=40)
    limited = make("rows.txt", text, max_rows=40)
    assert (sampled.sampled_rows, sampled.is_sample, sampled.counts["train"] > 100) == (40, True, True)
    assert (limited.sampled_rows, limited.is_sample) == (40, False)
    assert sampled.lengths == limited.lengths


def test_words_are_counted_without_tokenizer(make, monkeypatch):
    def find_base(name, revision, notify):
        raise HubError("no network.")

    monkeypatch.setattr(resolve, "find_base", find_base)
    text = "\n".join(f"one two three {n}" for n in range(10))
    report = make("rows.txt", text, base=None)
    assert (report.lengths.unit, report.lengths.tokenizer, report.lengths.longest) == ("words", None, 4)
    assert report.hints == ["Lengths are in words: no tokenizer can be read. no network."]
    with pytest.raises(HubError):
        make("rows.txt", text, base="owner/name")


def test_missing_base_is_an_error(make):
    with pytest.raises(BaseModelError, match="no folder"):
        make("rows.txt", "a b\nc d\ne f", base="./missing")


def test_missing_libraries_are_one_line_each(make, monkeypatch):
    monkeypatch.setattr(phones, "_phonenumbers", lambda: None)
    monkeypatch.setattr(text_checks, "_mojibake_pattern", lambda: None)
    monkeypatch.setattr(row_checks.text_checks, "language_guesser", lambda: None)
    text = "\n".join(f"call +1 650-253-0000 for number {n} of these cafÃ© lines" for n in range(10))
    report = make("rows.txt", text)
    assert [hint.split("`")[1] for hint in report.hints] == [
        "pip install py3langid",
        "pip install phonenumbers",
        "pip install ftfy",
    ]
    assert report.languages is None
    assert report.encoding == []
    assert "253-0000" not in json.dumps(report.to_dict())
