import itertools
import json
import random
import shutil
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_tuner import Generator, ModelOptions, SamplingParams, TrainConfig, atomic_io, train
from lora_tuner.adapters.adapter import CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE
from lora_tuner.adapters.manifest import WeightsInfo
from lora_tuner.config import resolve_settings
from lora_tuner.errors import AdapterError, ConfigError, ContextLengthError, GenerationError, WrongBaseError
from lora_tuner.inference.cpu_decoder import CpuDecoder
from lora_tuner.models import lora
from lora_tuner.models.loading import load_base
from lora_tuner.models.resolve import find_base

from .. import adapter_files, tiny_models
from .test_multi_lora import save_opt

GREEDY = SamplingParams(greedy=True, max_new_tokens=20, repetition_penalty=1.0)


def plain(model, folder, prompt, **options):
    """What transformers alone writes."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, do_sample=False, max_new_tokens=20, pad_token_id=0, **options)[0]
    return tokenizer.decode(output[inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.fixture(params=["our own way", "transformers"])
def way(request, monkeypatch):
    """Both ways through a base, in turn."""
    if request.param == "transformers":
        monkeypatch.setattr(CpuDecoder, "for_base", lambda base: None)


def disturb(generator, change, monkeypatch):
    """Change the logits of a generator, whichever way they come."""
    if generator.engine.cpu_decoder is not None:
        step = generator.engine.cpu_decoder.forward
        monkeypatch.setattr(
            generator.engine.cpu_decoder, "forward", lambda *args, **kwargs: change(step(*args, **kwargs))
        )
    else:
        head = generator.base.model.get_output_embeddings()
        forward = head.forward
        monkeypatch.setattr(head, "forward", lambda hidden: change(forward(hidden)))


def test_plain_base_matches_transformers(model_folder, way):
    generator = Generator(options=ModelOptions(base=str(model_folder), device="cpu"))
    expected = plain(AutoModelForCausalLM.from_pretrained(model_folder), model_folder, "the actor")
    assert generator.generate("the actor", GREEDY).text == expected


def test_adapter_matches_peft(adapter, gpt2, way):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(gpt2), adapter.path)
    answer = Generator("reviews", options=ModelOptions(device="cpu")).generate("the actor", GREEDY)
    assert answer.text == plain(model, gpt2, "the actor")
    assert (
        answer.text != Generator(options=ModelOptions(base=str(gpt2), device="cpu")).generate("the actor", GREEDY).text
    )
    assert answer.adapter == "reviews"


def test_swapping_adapters_keeps_base_weights(settings):
    for name, rate in (("a", 1e-2), ("a2", 3e-2)):
        train(settings(name=name, learning_rate=rate))
    alone = {
        name: Generator(name, options=ModelOptions(device="cpu")).generate("the actor", GREEDY).text
        for name in ("a", "a2")
    }
    generator = Generator("a", "a2", options=ModelOptions(device="cpu"))
    assert generator.current_adapter == "a"
    alone[None] = (
        Generator(options=ModelOptions(base=generator.base.files.name, device="cpu")).generate("the actor", GREEDY).text
    )
    weights = generator.base.model.get_input_embeddings().weight.data_ptr()
    for name in ("a", None, "a2", "a", "a2", None, None, "a"):
        generator.set_adapter(name)
        assert generator.generate("the actor", GREEDY).text == alone[name]
    assert generator.base.model.get_input_embeddings().weight.data_ptr() == weights
    generator.unload("a")
    assert generator.current_adapter is None
    assert generator.generate("the actor", GREEDY).text == alone[None]
    generator.set_adapter("a2")
    generator.unload("a2")
    assert generator.generate("the actor", GREEDY).text == alone[None]
    generator.set_adapter("a")
    assert generator.generate("the actor", GREEDY).text == alone["a"]


def test_failed_swap_changes_nothing(adapter, tmp_path):
    generator = Generator("reviews", options=ModelOptions(device="cpu"))
    before = generator.generate("the actor", GREEDY).text
    with pytest.raises(
        AdapterError, match=r"There is no adapter 'nothing', neither in adapters .reviews. nor as a path"
    ):
        generator.set_adapter("nothing")
    assert generator.current_adapter == "reviews"
    assert generator.generate("the actor", GREEDY).text == before


def test_streamed_pieces_join_to_text(adapter, way):
    generator = Generator("reviews", options=ModelOptions(device="cpu"))
    for sampling in (
        GREEDY,
        SamplingParams(seed=3, max_new_tokens=30),
        SamplingParams(seed=3, max_new_tokens=30, stop=["e"]),
    ):
        pieces = []
        answer = generator.generate("the actor ☕", sampling, on_text=pieces.append)
        assert "".join(pieces) == answer.text
    assert len(pieces) >= 1


def test_same_seed_gives_same_text(model_folder):
    generator = Generator(options=ModelOptions(base=str(model_folder), device="cpu"))
    state = torch.random.get_rng_state()
    texts = [generator.generate("so", SamplingParams(seed=seed)).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.random.get_rng_state(), state)
    first, second = generator.generate("so", SamplingParams()), generator.generate("so", SamplingParams())
    assert first.text != second.text
    assert generator.generate("so", SamplingParams(seed=first.seed)).text == first.text


def test_stop_string_cuts_text(model_folder, way):
    generator = Generator(options=ModelOptions(base=str(model_folder), device="cpu"))
    whole = generator.generate("the actor", GREEDY).text
    stop = whole[8:10]
    answer = generator.generate("the actor", GREEDY.model_copy(update={"stop": [stop]}))
    assert answer.text == whole[: whole.index(stop)]
    assert answer.finished


def test_eos_ends_generation(model_folder, monkeypatch, way):
    generator = Generator(options=ModelOptions(base=str(model_folder), device="cpu"))
    eos = generator.base.tokenizer.eos_token_id

    def favour_the_end(logits):
        logits[..., eos] = 1e4
        return logits

    with monkeypatch.context() as patch:
        disturb(generator, favour_the_end, patch)
        answer = generator.generate("the actor", GREEDY)
    assert (answer.text, answer.tokens, answer.finished) == ("", 0, True)
    assert generator.generate("the actor", GREEDY).finished is False


def test_several_outputs_differ(model_folder):
    answers = Generator(options=ModelOptions(base=str(model_folder), device="cpu")).generate_all(
        "the", SamplingParams(seed=1, n=4)
    )
    assert len({answer.text for answer in answers}) == 4


def test_temperature_zero_is_greedy(model_folder):
    generator = Generator(options=ModelOptions(base=str(model_folder), device="cpu"))
    cold = GREEDY.model_copy(update={"greedy": False, "temperature": 0.0})
    assert generator.generate("the", cold).text == generator.generate("the", GREEDY).text


def test_prompts_near_context_limit(model_folder, way):
    generator = Generator(options=ModelOptions(base=str(model_folder), device="cpu"))
    with pytest.raises(GenerationError, match=f"tokens, but .* has a context of {tiny_models.CONTEXT}: shorten it"):
        generator.generate("w " * 400)
    assert generator.generate("", GREEDY).prompt == ""
    nearly = "w " * 60
    length = len(generator.base.tokenizer(nearly)["input_ids"])
    answer = generator.generate(nearly, GREEDY.model_copy(update={"max_new_tokens": 1000}))
    assert answer.tokens <= tiny_models.CONTEXT - length


def test_greedy_with_several_outputs_is_rejected():
    with pytest.raises(ConfigError, match="n above 1 needs sampling"):
        resolve_settings(SamplingParams, {"greedy": True, "n": 2})


def test_each_prompt_is_tokenized_once(gpt2, monkeypatch):
    generator = Generator(options=ModelOptions(base=str(gpt2), device="cpu"))
    kind = type(generator.base.tokenizer)
    tokenize, texts = kind.__call__, []
    monkeypatch.setattr(
        kind, "__call__", lambda self, text, **options: texts.extend(text) or tokenize(self, text, **options)
    )
    sampling = SamplingParams(greedy=False, n=3, max_new_tokens=2)
    generator.generate("one", sampling)
    generator.generate_all("two", sampling)
    generator.generate_batch([("three", None), ("four", None)], sampling)
    encoded = generator.encode_prompt("five")
    for name in (None, None):
        generator.generate_batch([(encoded, name)], sampling)
    assert generator.generate(encoded, GREEDY) == generator.generate("five", GREEDY)
    assert texts == ["one", "two", "three", "four", "five", "five"]


def test_threads_take_turns(settings):
    for name, rate in (("a", 1e-2), ("b", 3e-2)):
        train(settings(name=name, learning_rate=rate))
    generator = Generator("a", "b", options=ModelOptions(device="cpu"))
    expected = {}
    for name in ("a", "b"):
        generator.set_adapter(name)
        expected[name] = generator.generate("the actor", GREEDY).text
    wrong = []

    def ask(name):
        for _ in range(4):
            answer = generator.generate("the actor", GREEDY)
            if answer.text != expected[answer.adapter]:
                wrong.append(answer)
            generator.set_adapter(name)

    threads = [threading.Thread(target=ask, args=(name,)) for name in "abab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_stop_string_across_prompt_is_ignored(model_folder, way):
    generator = Generator(options=ModelOptions(base=str(model_folder), device="cpu"))
    whole = generator.generate("the actor", GREEDY).text
    across = "r" + whole[:1]
    answer = generator.generate("the actor", GREEDY.model_copy(update={"stop": [across]}))
    assert answer.text == whole[: whole.index(across)] if across in whole else answer.text == whole


def test_generation_config_of_base_is_ignored(tmp_path, gpt2):
    expected = Generator(options=ModelOptions(base=str(gpt2), device="cpu")).generate("the actor", GREEDY).text
    shutil.copytree(gpt2, tmp_path / "base")
    own = {"num_beams": 3, "no_repeat_ngram_size": 1, "min_new_tokens": 5, "eos_token_id": 0}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(own))
    pieces = []
    assert (
        Generator(options=ModelOptions(base="base", device="cpu"))
        .generate("the actor", GREEDY, on_text=pieces.append)
        .text
        == expected
    )
    assert "".join(pieces) == expected


def test_damaged_adapter_is_rejected(adapter):
    path = adapter.path / WEIGHTS_FILE
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        AdapterError, match=r"reviews is damaged: adapter_model\.safetensors is not the file that manifest"
    ):
        Generator("reviews", options=ModelOptions(device="cpu"))
    (adapter.path / MANIFEST_FILE).unlink()
    tensors = load_file(path)
    tensors[sorted(tensors)[0]][0, 0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(AdapterError, match=r"reviews is damaged: .* has values that are not finite"):
        Generator("reviews", options=ModelOptions(device="cpu"))


def test_wrong_base_needs_force(adapter, tmp_path):
    other = tiny_models.save_model(tmp_path / "other", "gpt2", seed=7)
    with pytest.raises(WrongBaseError, match=r"reviews was trained on .*, not on .*other"):
        Generator("reviews", options=ModelOptions(base=str(other), device="cpu"))
    told = []
    Generator("reviews", options=ModelOptions(base=str(other), device="cpu", force=True, notify=told.append))
    assert len([notice for notice in told if notice.text.startswith("FORCED: ")]) == 1


# rows through adapters of their own


def write(base_folder, name, rank=4, targets="auto", seed=0, dora=False, folder="adapters"):
    """An adapter with random weights, which nobody had to train."""
    base = load_base(find_base(str(base_folder)), ModelOptions(device="cpu"))
    if dora:
        names = lora.resolve_target_modules(base.model, targets)
        kind = {"task_type": "CAUSAL_LM", "use_dora": True, "fan_in_fan_out": "gpt2" in str(base_folder)}
        model = get_peft_model(base.model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names, **kind))
    else:
        model = lora.add_lora(base, TrainConfig(rank=rank, target_modules=targets))
    torch.manual_seed(seed)
    tensors = {
        name: tensor * (torch.rand_like(tensor) + 0.5) if "magnitude" in name else torch.randn_like(tensor) * 0.3
        for name, tensor in lora.adapter_state_dict(model).items()
    }
    path = Path(folder) / name
    lora.save_adapter_files(tensors, model.peft_config["default"], path)
    return path


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Where adapters are kept that more than one test takes."""
    return tmp_path_factory.mktemp("written")


@pytest.fixture
def eight(model_folder, written):
    """Eight adapters in `adapters`, no two of one rank and targets, one with DoRA."""
    some, few = {"gpt2": ("c_attn,c_fc", "mlp.c_proj"), "llama": ("q_proj,up_proj", "down_proj")}[model_folder.name]
    sorts = {
        "one": (1, "auto"),
        "two": (2, "attention"),
        "three": (3, some),
        "four": (4, few),
        "five": (5, "all-linear"),
        "six": (6, "attention"),
        "eight": (8, some),
        "nine": (9, "auto"),
    }
    folder = written / model_folder.name
    if not folder.exists():
        for name, (rank, targets) in sorts.items():
            write(model_folder, name, rank, targets, seed=rank, dora=name == "six", folder=folder)
    shutil.copytree(folder, "adapters")
    return list(sorts)


LONG = " ".join(tiny_models.reviews(80))
PROMPTS = ["", "so", "the actor", "71: her voice never", LONG[:60], LONG[:110], LONG[:160], "☕ é"]


def of_length(tokenizer, length):
    """A prompt of so many tokens."""
    texts = (LONG[:end] for end in range(length, len(LONG)))
    return next(text for text in texts if len(tokenizer(text)["input_ids"]) == length)


def decided(model, tokenizer, prompt, sampling):
    """The greedy text that plain PEFT writes, up to where its two best tokens are as good as equal; and whether at all.

    There rounding decides, which differs with the shape of a batch.
    """
    ids = tokenizer(prompt)["input_ids"] or [tokenizer.bos_token_id]
    output = model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        do_sample=False,
        max_new_tokens=sampling.max_new_tokens,
        repetition_penalty=sampling.repetition_penalty,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    best = torch.cat(output.scores).topk(2).values
    close = ((best[:, 0] - best[:, 1]) < 1e-3).nonzero().flatten().tolist()
    end = len(ids) + (close[0] if close else len(best))
    before = tokenizer.decode(ids, skip_special_tokens=True)
    text = tokenizer.decode(output.sequences[0, :end], skip_special_tokens=True)[len(before) :]
    return (text.rstrip("\ufffd"), False) if close else (text, True)


@pytest.mark.parametrize("penalty", [pytest.param(1.0, marks=pytest.mark.slow), 1.3])
def test_mixed_batch_matches_solo_and_peft(model_folder, eight, penalty, way):
    sampling = SamplingParams(greedy=True, max_new_tokens=10, repetition_penalty=penalty)
    asked = list(itertools.product(PROMPTS, eight))
    random.Random(0).shuffle(asked)
    answers = Generator(options=ModelOptions(base=str(model_folder), device="cpu")).generate_batch(asked, sampling)
    together = dict(zip(asked, answers, strict=True))
    certain = 0
    for name in eight:
        fresh = Generator(name, options=ModelOptions(device="cpu"))
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), f"adapters/{name}")
        for prompt in PROMPTS:
            alone = fresh.generate(prompt, sampling)
            text, whole = decided(plain.eval(), fresh.base.tokenizer, prompt, sampling)
            if whole:
                assert (alone.text, together[prompt, name]) == (text, alone)
            assert alone.text.startswith(text)
            assert together[prompt, name].text.startswith(text)
            certain += whole
    assert certain >= 48
    assert all(len({together[prompt, name].text for name in eight}) >= 6 for prompt in PROMPTS if prompt)


def test_padding_gets_no_repetition_penalty(model_folder, monkeypatch, way):
    generator = Generator(options=ModelOptions(base=str(model_folder), device="cpu"))
    eos = generator.base.tokenizer.eos_token_id  # which is what rows are padded with

    def end_by_a_little(logits):
        logits[:] = 0
        logits[..., 5], logits[..., eos] = 1, 1.15
        return logits

    disturb(generator, end_by_a_little, monkeypatch)
    sampling = SamplingParams(greedy=True, max_new_tokens=3, repetition_penalty=1.3)
    answers = generator.generate_batch([(PROMPTS[6], None), ("so", None), ("", None)], sampling)
    assert [answer.tokens for answer in answers] == [
        0,
        0,
        1,
    ]  # an empty prompt is an end of text, so one is a repetition


def test_sequences_at_context_limit_match_solo(model_folder, eight):
    generator = Generator(*eight[:3], options=ModelOptions(device="cpu"))
    sampling = SamplingParams(greedy=True, max_new_tokens=12, repetition_penalty=1.0)
    lengths = [3, *(tiny_models.CONTEXT - room for room in (13, 12, 11, 4, 1))]
    prompts = [of_length(generator.base.tokenizer, length) for length in lengths]
    asked = list(itertools.product(prompts, [*eight[:3], None]))
    answers = dict(zip(asked, generator.generate_batch(asked, sampling), strict=True))
    for name in (*eight[:3], None):
        fresh = Generator(*[name] if name else [], options=ModelOptions(base=str(model_folder), device="cpu"))
        for prompt in prompts:
            assert answers[prompt, name] == fresh.generate(prompt, sampling)
    assert {answer.tokens for answer in answers.values() if not answer.finished} == {12, 11, 4, 1}


# drawn rows


def test_sampling_is_independent_of_batch(model_folder, eight):
    sampling = SamplingParams(seed=11, max_new_tokens=10)
    asked = [("so", "one"), (PROMPTS[5], "six"), ("the actor", None), ("so", "nine"), ("so", None), ("", "two")]
    alone = {}
    for pair in asked:
        (alone[pair],) = Generator(options=ModelOptions(base=str(model_folder), device="cpu")).generate_batch(
            [pair], sampling
        )
    assert len({answer.text for answer in alone.values()}) == 6
    generator = Generator(options=ModelOptions(base=str(model_folder), device="cpu"))
    draw = random.Random(0)
    for size in (1, 2, 3, 6, 6, 9):
        batch = draw.sample(asked, min(size, 6)) + draw.choices(asked, k=max(size - 6, 0))
        assert generator.generate_batch(batch, sampling) == [alone[pair] for pair in batch]


def test_n_outputs_use_consecutive_seeds(model_folder, eight):
    generator = Generator("one", options=ModelOptions(device="cpu"))
    sampling = SamplingParams(seed=5, max_new_tokens=10)
    expected = {}
    for prompt, name in (("so", "one"), ("the actor", "six"), ("the actor", None)):
        generator.set_adapter(name)
        answers = [generator.generate(prompt, SamplingParams(seed=seed, max_new_tokens=10)) for seed in (5, 6, 7)]
        assert [answer.seed for answer in answers] == [5, 6, 7]
        assert len({answer.text for answer in answers}) == 3
        assert generator.generate_all(prompt, sampling.model_copy(update={"n": 3})) == answers
        expected[prompt, name] = answers
    together = generator.generate_batch(list(expected), sampling.model_copy(update={"n": 3}))
    assert together == list(itertools.chain(*expected.values()))


def test_reported_seed_reproduces_output(model_folder, eight):
    generator = Generator("one", options=ModelOptions(device="cpu"))
    free = SamplingParams(max_new_tokens=10)
    answers = [
        generator.generate("so", free),
        *generator.generate_all("so", free.model_copy(update={"n": 3})),
        *generator.generate_batch([("so", "one"), (PROMPTS[5], "six")], free.model_copy(update={"n": 2})),
    ]
    for answer in answers:
        generator.set_adapter(answer.adapter)
        assert generator.generate(answer.prompt, free.model_copy(update={"seed": answer.seed})) == answer
    seeds = [answer.seed for answer in answers]
    assert len({*seeds[:4], *seeds[4:6]}) == 6
    assert seeds[1:4] == [seeds[1], seeds[1] + 1, seeds[1] + 2]
    assert seeds[4:6] == seeds[6:8]  # each asked gets the same luck
    assert generator.generate("so", GREEDY).seed is None


def test_global_random_states_are_kept(model_folder, eight):
    generator = Generator("one", options=ModelOptions(device="cpu"))
    before = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    generator.generate_batch([("so", name) for name in eight], SamplingParams(max_new_tokens=4, n=2))
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


# what may go wrong between


def is_damaged(path, how):
    """Spoil an adapter in one of the ways in which one can be spoilt."""
    weights = path / WEIGHTS_FILE
    if how == "cut":
        weights.write_bytes(weights.read_bytes()[:-5])
    elif how == "not finite":
        tensors = load_file(weights)
        next(iter(tensors.values()))[0, 0] = float("nan")
        save_file(tensors, weights)
    elif how == "no config":
        (path / CONFIG_FILE).unlink()
    elif how == "other base":
        facts = WeightsInfo(sha256=atomic_io.sha256_file(weights), bytes=weights.stat().st_size, parameters=1)
        (path / MANIFEST_FILE).write_text(adapter_files.manifest(weights=facts).to_json())


DAMAGE = ("cut", "not finite", "no config", "other base", "other width")


@pytest.fixture(scope="module")
def stock(gpt2, written):
    """Adapters to be put in place: three versions, and one for each kind of damage."""
    folder = written / "stock"
    write(gpt2, "v1", 3, seed=1, folder=folder)
    write(gpt2, "v2", 5, "attention", seed=2, folder=folder)
    write(gpt2, "v3", 2, seed=3, dora=True, folder=folder)
    write(tiny_models.save_model(written / "wider", "gpt2", width=48), "other width", folder=folder)
    for how in DAMAGE[:-1]:
        is_damaged(shutil.copytree(folder / "v1", folder / how), how)
    return folder


SHORT = SamplingParams(greedy=True, max_new_tokens=6, repetition_penalty=1.0)


@pytest.fixture(scope="module")
def texts(gpt2, stock):
    """What each version writes in a fresh generator, by its name; None is the plain base."""
    found = {}
    for version in ("v1", "v2", "v3", None):
        fresh = Generator(
            *[stock / version] if version else [],
            adapters_dir=stock,
            options=ModelOptions(base=str(gpt2), device="cpu"),
        )
        found[version] = fresh.generate("the actor", SHORT).text
    assert len(set(found.values())) == 4
    return found


def put(stock, what, path):
    if path.exists():
        shutil.rmtree(path)
    if what != "missing":
        shutil.copytree(stock / what, path)


def test_replaced_adapter_is_reloaded_unless_broken(stock, texts):
    path = Path("adapters/a")
    put(stock, "v1", path)
    generator = Generator("a", options=ModelOptions(device="cpu"))
    put(stock, "v2", path)
    assert generator.generate("the actor", SHORT).text == texts["v1"]  # until it is asked for
    generator.set_adapter("a")
    assert generator.generate("the actor", SHORT).text == texts["v2"]
    put(stock, "v3", path)
    assert generator.generate_batch([("the actor", "a")], SHORT)[0].text == texts["v3"]
    for how in (*DAMAGE, "missing"):
        put(stock, how, path)
        with pytest.raises(AdapterError):
            generator.set_adapter("a")
        with pytest.raises(AdapterError):
            generator.generate_batch([("the actor", None), ("the actor", "a")], SHORT)
        assert (generator.current_adapter, generator.loaded_adapters) == ("a", ["a"])
        assert generator.generate("the actor", SHORT).text == texts["v3"]
    put(stock, "v1", path)
    generator.set_adapter("a")
    assert generator.generate("the actor", SHORT).text == texts["v1"]


def test_edited_adapter_config_is_reloaded(stock, texts):
    put(stock, "v1", Path("adapters/a"))
    generator = Generator("a", options=ModelOptions(device="cpu"))
    config = Path("adapters/a") / CONFIG_FILE
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 1}))
    expected = Generator("a", options=ModelOptions(device="cpu")).generate("the actor", SHORT).text
    assert expected != texts["v1"]
    generator.set_adapter("a")
    assert generator.generate("the actor", SHORT).text == expected


@pytest.mark.parametrize("how", [*DAMAGE, "missing"])
def test_batch_with_broken_adapter_loads_nothing(stock, texts, how):
    for name, what in (("a", "v1"), ("b", "v2"), ("c", how)):
        put(stock, what, Path("adapters") / name)
    generator = Generator("a", options=ModelOptions(device="cpu"))
    with pytest.raises(AdapterError):
        generator.generate_batch([("the actor", name) for name in (None, "b", "c", "a")], SHORT)
    assert (generator.current_adapter, generator.loaded_adapters) == ("a", ["a"])
    assert generator.generate("the actor", SHORT).text == texts["v1"]


def test_batch_with_long_prompt_loads_nothing(stock):
    for name in "ab":
        put(stock, "v1", Path("adapters") / name)
    generator = Generator("a", options=ModelOptions(device="cpu"))
    with pytest.raises(GenerationError, match="shorten it"):
        generator.generate_batch([("the actor", "b"), ("w " * 400, None)], SHORT)
    assert (generator.current_adapter, generator.loaded_adapters) == ("a", ["a"])


@pytest.mark.parametrize("wrong", [("w " * 400, None), ("the actor", "nothing")])
def test_failed_batch_keeps_current_weights(stock, texts, wrong):
    put(stock, "v1", Path("adapters/a"))
    generator = Generator("a", options=ModelOptions(device="cpu"))
    put(stock, "v2", Path("adapters/a"))
    with pytest.raises((AdapterError, GenerationError)):
        generator.generate_batch([("the actor", "a"), wrong], SHORT)
    assert generator.generate("the actor", SHORT).text == texts["v1"]


class History:
    """A generator, and what should be in memory by now: the version of each adapter."""

    def __init__(self, base, stock, texts, adapters):
        self.stock, self.texts, self.adapters = stock, texts, adapters
        self.on_disk, self.in_memory, self.current = {}, {}, None
        self.generator = Generator(adapters_dir=adapters, options=ModelOptions(base=str(base), device="cpu"))

    def usable(self, name):
        return name is None or self.on_disk.get(name) in ("v1", "v2", "v3")

    def put(self, name, what):
        put(self.stock, what, self.adapters / name)
        self.on_disk[name] = what

    def use(self, name, by_path):
        adapter = self.adapters / name if name and by_path else name
        if self.usable(name):
            assert self.generator.set_adapter(adapter) == name
            self.current = name
            if name:
                self.in_memory[name] = self.on_disk[name]
        else:
            with pytest.raises(AdapterError):
                self.generator.set_adapter(adapter)

    def unload(self, name):
        if name in self.in_memory:
            self.generator.unload(name)
            del self.in_memory[name]
            self.current = None if self.current == name else self.current
        else:
            with pytest.raises(GenerationError):
                self.generator.unload(name)

    def batch(self, names, too_long):
        asked = [("the actor", name) for name in names] + [("w " * 400, None)] * too_long
        if not too_long and all(map(self.usable, names)):
            answers = self.generator.generate_batch(asked, SHORT)
            self.in_memory |= {name: self.on_disk[name] for name in names if name}
            assert [answer.text for answer in answers] == [self.texts[self.in_memory.get(name)] for name in names]
        else:
            with pytest.raises((AdapterError, GenerationError)):
                self.generator.generate_batch(asked, SHORT)

    def check(self):
        assert self.generator.loaded_adapters == sorted(self.in_memory)
        assert self.generator.current_adapter == self.current
        answer = self.generator.generate("the actor", SHORT)
        assert (answer.text, answer.adapter) == (self.texts[self.in_memory.get(self.current)], self.current)


NAMES = st.sampled_from("aab")
STEPS = st.one_of(
    st.tuples(st.just("put"), NAMES, st.sampled_from(["v1", "v2", "v3"])),
    st.tuples(st.just("put"), NAMES, st.sampled_from([*DAMAGE, "missing"])),
    st.tuples(st.just("use"), NAMES | st.none(), st.booleans()),
    st.tuples(st.just("unload"), NAMES),
    st.tuples(st.just("batch"), st.lists(NAMES | st.none(), min_size=1, max_size=4), st.booleans()),
)


@hypothesis_settings(
    max_examples=20,
    deadline=None,
    database=None,
    phases=[Phase.generate],  # to shorten a history that fails takes minutes
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(STEPS, min_size=8, max_size=25))
def test_random_history_matches_fresh_generator(gpt2, stock, texts, tmp_path, steps):
    history = History(gpt2, stock, texts, Path(tempfile.mkdtemp(dir=tmp_path)))
    for step in (("put", "a", "v1"), ("put", "b", "v2"), ("use", "a", False), *steps):
        getattr(history, step[0])(*step[1:])
        history.check()


# the adapters of a batch


def test_batch_loads_adapters_keeps_current(stock, texts):
    for name, what in (("a", "v1"), ("b", "v2"), ("c", "v3")):
        put(stock, what, Path("adapters") / name)
    generator = Generator("a", options=ModelOptions(device="cpu"))
    asked = [("the actor", adapter) for adapter in ("b", None, Path("adapters/c"), "a", "b")]
    answers = generator.generate_batch(asked, SHORT)
    assert [(answer.adapter, answer.text) for answer in answers] == [
        ("b", texts["v2"]),
        (None, texts[None]),
        ("c", texts["v3"]),
        ("a", texts["v1"]),
        ("b", texts["v2"]),
    ]
    assert (generator.current_adapter, generator.loaded_adapters) == ("a", ["a", "b", "c"])
    assert generator.generate("the actor", SHORT).text == texts["v1"]
    assert generator.generate_batch([], SHORT) == []


ONE_BY_ONE = "This base flattens the rows of a batch, so each adapter runs in its own batch."


def test_dora_in_mixed_batch(model_folder, eight):
    told = []
    generator = Generator(
        options=ModelOptions(base=str(model_folder), device="cpu", notify=lambda notice: told.append(notice.text))
    )
    answers = generator.generate_batch([("the actor", name) for name in ("six", "two", None, "six")], SHORT)
    assert told == [
        f"{name} has no manifest, so only its shapes can be compared with {model_folder}." for name in ("six", "two")
    ]
    for answer in answers:
        generator.set_adapter(answer.adapter)
        assert generator.generate("the actor", SHORT) == answer


@pytest.mark.parametrize("sampling", [SHORT, SamplingParams(seed=3, max_new_tokens=6, n=2)], ids=["greedy", "drawn"])
def test_flattened_base_runs_adapters_separately(tmp_path, sampling):
    opt = save_opt(tmp_path / "opt")
    write(opt, "a", 3, seed=1)
    write(opt, "b", 2, "fc1,fc2", seed=2, dora=True)
    told = []
    generator = Generator(
        options=ModelOptions(base=str(opt), device="cpu", notify=lambda notice: told.append(notice.text))
    )
    asked = [(prompt, name) for name in ("a", None, "b", "a") for prompt in ("the actor", "so")]
    answers = generator.generate_batch(asked, sampling)
    assert [text for text in told if "no manifest" not in text] == [ONE_BY_ONE]
    assert (generator.current_adapter, generator.loaded_adapters) == (None, ["a", "b"])
    expected = []
    for prompt, name in asked:
        fresh = Generator(*[name] if name else [], options=ModelOptions(base=str(opt), device="cpu"))
        expected += fresh.generate_all(prompt, sampling)
    assert answers == expected
    assert len({answer.text for answer in answers}) >= 5
    told.clear()
    generator.generate_batch([("so", "a"), ("the actor", "b")], sampling)
    assert told == []  # it was said


# errors


def test_long_prompt_error_states_length(gpt2):
    generator = Generator(options=ModelOptions(base=str(gpt2), device="cpu"))
    for length in (tiny_models.CONTEXT, 1000):
        prompt = of_length(generator.base.tokenizer, length)
        with pytest.raises(GenerationError) as error:
            generator.generate_all(prompt)
        assert str(error.value) == f"The prompt has {length:,} tokens, but {gpt2} has a context of 128: shorten it."
    assert generator.generate(of_length(generator.base.tokenizer, tiny_models.CONTEXT - 1), GREEDY).tokens <= 1


def test_huge_prompt_is_rejected_before_tokenizing(gpt2, monkeypatch):
    generator = Generator(options=ModelOptions(base=str(gpt2), device="cpu"))
    monkeypatch.setattr(generator.base, "tokenizer", None)
    with pytest.raises(
        ContextLengthError, match=f"The prompt has 1,000,000 characters, but {gpt2} has a context of 128 tokens"
    ):
        generator.encode_prompt("w" * 1_000_000)


def test_unload_of_unknown_adapter_fails(gpt2, stock):
    generator = Generator(options=ModelOptions(base=str(gpt2), device="cpu"))
    with pytest.raises(GenerationError) as error:
        generator.unload("nothing")
    assert str(error.value) == "No adapter named nothing is loaded. Loaded: none."
    generator.set_adapter(stock / "v1")
    generator.set_adapter(stock / "v2")
    with pytest.raises(GenerationError) as error:
        generator.unload("nothing")
    assert str(error.value) == "No adapter named nothing is loaded. Loaded: v1, v2."
    assert (generator.current_adapter, generator.loaded_adapters) == ("v2", ["v1", "v2"])


def test_same_name_from_two_folders_fails(stock, texts, tmp_path):
    here, there = Path("adapters/a"), tmp_path / "elsewhere" / "a"
    put(stock, "v1", here)
    put(stock, "v2", there)
    message = f"An adapter named a is already loaded from {here.resolve()}: unload it first."
    with pytest.raises(GenerationError) as error:
        Generator("a", there, options=ModelOptions(device="cpu"))
    assert str(error.value) == message
    generator = Generator("a", options=ModelOptions(device="cpu"))
    for call in (generator.set_adapter, lambda it: generator.generate_batch([("the actor", it)], SHORT)):
        with pytest.raises(GenerationError) as error:
            call(there)
        assert str(error.value) == message
        assert generator.generate("the actor", SHORT).text == texts["v1"]
    generator.unload("a")
    assert generator.set_adapter(there) == "a"
    assert generator.generate("the actor", SHORT).text == texts["v2"]


def test_seeds_wrap_at_maximum(gpt2):
    generator = Generator(options=ModelOptions(base=str(gpt2), device="cpu"))
    answers = generator.generate_all("so", SamplingParams(seed=2**63 - 1, n=2, max_new_tokens=4))
    for answer in answers:
        again = resolve_settings(SamplingParams, {"seed": answer.seed, "max_new_tokens": 4})
        assert generator.generate("so", again) == answer


def test_changed_manifest_base_is_rejected(stock):
    put(stock, "v1", Path("adapters/a"))
    generator = Generator("a", options=ModelOptions(device="cpu"))
    put(stock, "other base", Path("adapters/a"))
    with pytest.raises(WrongBaseError):
        generator.set_adapter("a")


# Written ahead, and then decided


@pytest.fixture
def guessing(monkeypatch):
    """Guess for small models too, and count how often."""
    from lora_tuner.inference import batch as inference_batch
    from lora_tuner.inference import cpu_decoder, speculative

    rounds = []
    guess = speculative.DraftDecoder.propose
    monkeypatch.setattr(cpu_decoder, "MIN_DRAFT_HEAD", 0)
    monkeypatch.setattr(inference_batch, "MIN_DRAFT_TOKENS", 1)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(
        speculative.DraftDecoder, "propose", lambda self, *args: rounds.append(guess(self, *args)) or rounds[-1]
    )
    return rounds


@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        SamplingParams(greedy=True, max_new_tokens=20, repetition_penalty=1.3),
        SamplingParams(seed=5, max_new_tokens=20),
        SamplingParams(seed=6, max_new_tokens=20, top_k=0, top_p=1.0, temperature=1.5),
    ],
)
@pytest.mark.parametrize("good", [True, False])
def test_speculative_decoding_keeps_text(model_folder, eight, guessing, monkeypatch, sampling, good):
    """Good ones and bad ones, on the base and on an adapter, streamed and not."""
    slow = Generator(eight[0], options=ModelOptions(device="cpu"))
    monkeypatch.setattr(slow.engine.cpu_decoder, "draft_model", None)
    expected = {name: slow.generate_batch([("the actor", name)], sampling)[0] for name in (None, eight[0])}
    assert not any(guessing)
    guessing.clear()
    generator = Generator(eight[0], options=ModelOptions(device="cpu"))
    if not good:
        draft = generator.engine.cpu_decoder.draft_model
        monkeypatch.setattr(draft, "embed", torch.nn.Embedding.from_pretrained(draft.embed.weight.flip(0)))
    pieces = []
    for name, answer in expected.items():
        generator.set_adapter(name)
        assert generator.generate("the actor", sampling, pieces.append) == answer
        assert "".join(pieces) == answer.text
        pieces.clear()
    assert any(guessing)
    assert not good or len(guessing) < 2 * 19


def test_speculative_decoding_respects_limits(model_folder, guessing):
    generator = Generator(options=ModelOptions(base=str(model_folder), device="cpu"))
    whole = generator.generate("the actor", GREEDY).text
    for length in range(1, 8):
        answer = generator.generate("the actor", GREEDY.model_copy(update={"max_new_tokens": length}))
        assert (answer.tokens, answer.finished) == (length, False)
        assert whole.startswith(answer.text.removesuffix("\ufffd"))
    stop = whole[len(whole) // 2 :][:2]
    assert generator.generate("the actor", GREEDY.model_copy(update={"stop": [stop]})).text == whole[: whole.find(stop)]


def test_unloaded_adapter_is_freed(eight, guessing):
    import gc
    import weakref

    generator = Generator(eight[0], options=ModelOptions(device="cpu"))
    generator.generate("the actor", GREEDY)
    tensors = [weakref.ref(update.B) for update in generator.get_or_load(eight[0])[1].layers.values()]
    assert any(guessing)
    generator.unload(eight[0])
    gc.collect()
    assert not any(tensor() is not None for tensor in tensors)
