"""Labels of texts: log-probabilities over a shared prefix, equal to those of plain transformers."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_tuner import Generator, Library, ModelOptions, classify
from lora_tuner.data import chat, tokenization
from lora_tuner.errors import AdapterError, GenerationError, RequestError
from lora_tuner.inference import classification
from lora_tuner.inference.classification import Classification, LabelPrompts
from lora_tuner.inference.hf_decoder import HFDecoder

from .. import adapter_files, api_server, tiny_models
from .conftest import save_random_adapter
from .test_hf_decoder import save_model

TEXTS = ["the actor never works. " * 12, "so", "her voice shines. this film drags", "a"]
NAMES = ["works", "works well", "really", "it drags somehow"]


def label_info(**changes):
    return adapter_files.labels(names=NAMES, counts=[1] * 4, max_length=48, **changes)


def plain_logprobs(base, adapter, prompts, text):
    """Log-probabilities of the labels of a text, each as a whole row, by transformers and PEFT."""
    model = AutoModelForCausalLM.from_pretrained(base)
    model = PeftModel.from_pretrained(model, adapter).eval() if adapter else model.eval()
    prefix, scores = prompts.encode({"text": text}), []
    for ending in prompts.endings:
        ids = torch.tensor([[*prefix, *ending]])
        with torch.inference_mode():
            logprobs = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        scores.append(float(logprobs[len(prefix) - 1 :].sum()))
    return torch.tensor(scores, dtype=torch.float64)


@pytest.mark.usefixtures("decoder_kind")
@pytest.mark.parametrize("rows", [32, 3])
def test_logprobs_equal_transformers(model_folder, rows, monkeypatch):
    monkeypatch.setattr(classification, "LABEL_ROWS", rows)
    path = save_random_adapter(model_folder, "a")
    generator = Generator(
        path,
        options=ModelOptions(base=str(model_folder), device="cpu", dtype="float32", force=True),
    )
    _, loaded = generator.get_or_load("a")
    prompts = LabelPrompts("a", label_info(), generator.base.tokenizer, 128)
    prefixes = [prompts.encode({"text": text}) for text in TEXTS]
    assert len(prefixes[0]) == 48 - max(map(len, prompts.endings)), "the middle is left out"
    found = classification.score_texts(generator.engine, loaded, prefixes, prompts.endings)
    for text, scores in zip(TEXTS, found, strict=True):
        expected = plain_logprobs(model_folder, path, prompts, text)
        torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["OPT", "Qwen3Next", pytest.param("Mamba", marks=pytest.mark.slow), "no cache"])
def test_any_base_tells_labels(kind, tmp_path, gpt2, monkeypatch):
    folder = gpt2 if kind == "no cache" else save_model(kind, tmp_path / kind)
    if kind == "no cache":
        monkeypatch.setattr(HFDecoder, "_matches_solo_logits", lambda self: False)
    generator = Generator(options=ModelOptions(base=str(folder), device="cpu"))
    prompts = LabelPrompts("base", label_info(), generator.base.tokenizer, 128)
    prefixes = [prompts.encode({"text": text}) for text in TEXTS]
    decoder = generator.engine.hf_decoder
    found = classification.label_logprobs(generator.base, decoder, None, prefixes, prompts.endings)
    for text, scores in zip(TEXTS, found, strict=True):
        torch.testing.assert_close(scores, plain_logprobs(folder, None, prompts, text), atol=1e-3, rtol=1e-3)


def test_endings_are_those_of_whole_rows(gpt2):
    tokenizer = AutoTokenizer.from_pretrained(gpt2)
    prompts = LabelPrompts("a", label_info(), tokenizer, 128)
    for text in ("so", "it drags", "x\n\nLabel: works", "☕ <|endoftext|>"):
        for name, ending in zip(NAMES, prompts.endings, strict=True):
            filled = f"{text.replace(chr(10), ' ').replace('  ', ' ')}\n\nLabel: "
            row = chat.encode_answer(filled + name, (len(filled), len(filled) + len(name)), keep=True)
            (whole,) = tokenization.encode_texts(tokenizer, [row])
            assert [*prompts.encode({"text": text}), *ending] == tokenization.token_ids(whole).tolist()
            assert ending[-1] == tokenizer.eos_token_id


def test_texts_have_probabilities_of_their_own(gpt2, tmp_path):
    path = api_server.write_adapter(tmp_path, "a", gpt2, 0, labels=label_info())
    generator = Generator(path, options=ModelOptions(base=str(gpt2), device="cpu"))
    seen = []
    told = classify(generator, TEXTS, seen.append)
    assert [{*each.probabilities} for each in told] == [{*NAMES}] * 4
    assert all(sum(each.probabilities.values()) == pytest.approx(1) for each in told)
    assert seen[-1].done == seen[-1].total == 4
    (alone,) = classify(generator, [{"text": TEXTS[2]}])
    assert alone.probabilities == pytest.approx(told[2].probabilities, abs=1e-4)
    generator.set_adapter(None)
    with pytest.raises(AdapterError, match="The base tells no labels"):
        classify(generator, TEXTS)


def test_temperature_divides_logprobs():
    logprobs = torch.tensor([-1.0, -3.0, -9.0, -9.0], dtype=torch.float64)
    sharp, soft = (Classification.of_logprobs(label_info(temperature=value), logprobs) for value in (1.0, 4.0))
    assert sharp.label == soft.label == "works"
    assert sharp.probabilities["works"] > soft.probabilities["works"]
    assert soft.probabilities["works"] / soft.probabilities["works well"] == pytest.approx(torch.e**0.5)


def test_fitted_temperature_is_least_loss():
    torch.manual_seed(0)
    logits = torch.randn(4000, 3, dtype=torch.float64)
    truth = torch.multinomial(logits.softmax(-1), 1)[:, 0].tolist()
    assert classification.fit_temperature(logits, truth) == pytest.approx(1.0, abs=0.1)
    assert classification.fit_temperature(logits * 5, truth) == pytest.approx(5.0, abs=0.5)
    sure = torch.tensor([[0.0, -1.0]] * 10, dtype=torch.float64)
    assert 0.2 < classification.fit_temperature(sure, [0] * 10) < 1, "few rows that are right are no certainty"


@pytest.mark.parametrize(
    "template",
    ["{label}: {text}", "{label}", "Label: {label}", "{text}{label}", "{text}", ""],
)
def test_template_of_stranger_is_refused(gpt2, template):
    tokenizer = AutoTokenizer.from_pretrained(gpt2)
    with pytest.raises(AdapterError, match="a: its template does not end with its label behind a text"):
        LabelPrompts("a", label_info(template=template), tokenizer, 128)


def test_text_has_to_fit_beside_labels(gpt2):
    tokenizer = AutoTokenizer.from_pretrained(gpt2)
    with pytest.raises(
        AdapterError,
        match="no text fits beside the label 'it drags somehow' within 8 tokens",
    ):
        LabelPrompts("a", label_info(), tokenizer, 8)


def test_unfit_input_is_named():
    with pytest.raises(RequestError, match="a text is empty"):
        classification.text_values("a", label_info(), " <br> ")
    several = label_info(template="{title}\n{text}\n\nLabel: {label}")
    with pytest.raises(RequestError, match=r"a tells labels from several columns \(title, text\)"):
        classification.text_values("a", several, "so")
    given = {"title": "", "text": "so"}
    assert classification.text_values("a", several, given) == given
    for text, message in (
        ({"text": "so"}, "a reads title, text: a text has text."),
        (given | {"body": "so"}, "a reads title, text: a text has title, text, body."),
        ({}, "a reads title, text: a text has nothing."),
        ({"title": " ", "text": ""}, "a text is empty"),
    ):
        with pytest.raises(RequestError, match=message):
            classification.text_values("a", several, text)


def test_adapter_without_labels_is_refused():
    adapter_files.write(Path("adapters/a"), facts=adapter_files.manifest())
    with pytest.raises(
        AdapterError,
        match="a tells no labels: only an adapter that was trained with --label-column",
    ):
        classification.labels_of(Library().get("a"))


def test_damaged_weights_tell_no_label(gpt2):
    generator = Generator(options=ModelOptions(base=str(gpt2), device="cpu"))
    with torch.no_grad():
        generator.base.model.transformer.ln_f.weight.fill_(torch.nan)
    prompts = LabelPrompts("a", label_info(), tiny_models.tokenizer(), 128)
    prefixes = [prompts.encode({"text": "so"})]
    with pytest.raises(GenerationError, match="not finite"):
        classification.label_logprobs(
            generator.base, generator.engine.hf_decoder, None, prefixes, prompts.endings
        )
