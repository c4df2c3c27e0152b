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
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_tuner import Generator, ModelOptions, SamplingParams, atomic_io
from lora_tuner.adapters.adapter import CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE
from lora_tuner.adapters.manifest import WeightsInfo
from lora_tuner.errors import AdapterError, ConfigError, ContextLengthError, GenerationError, WrongBaseError
from lora_tuner.settings_files import resolve_settings

from .. import adapter_files, tiny_models
from .conftest import save_random_adapter

GREEDY = SamplingParams(greedy=True, max_new_tokens=20)


def transformers_text(model, folder, prompt, **options):
    """Generate with transformers' own `generate`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, do_sample=False, max_new_tokens=20, pad_token_id=0, **options)[0]
    return tokenizer.decode(output[inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def patch_logits(generator, change, monkeypatch):
    """Apply `change` to the logits of either decoder."""
    decoder = generator.engine.cpu_decoder
    if decoder is not None:
        forward = decoder.forward
        monkeypatch.setattr(decoder, "forward", lambda *args, **kwargs: change(forward(*args, **kwargs)))
    else:
        head = generator.base.model.get_output_embeddings()
        forward = head.forward
        monkeypatch.setattr(head, "forward", lambda hidden: change(forward(hidden)))


def test_plain_base_matches_transformers(model_folder, decoder_kind):
    generator = Generator(options=ModelOptions(base=str(model_folder), device="cpu"))
    expected = transformers_text(AutoModelForCausalLM.from_pretrained(model_folder), model_folder, "the actor")
    assert generator.generate("the actor", GREEDY).text == expected


def test_adapter_matches_peft(adapter, gpt2, decoder_kind):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(gpt2), adapter.path)
    output = Generator("reviews", options=ModelOptions(device="cpu")).generate("the actor", GREEDY)
    assert output.text == transformers_text(model, gpt2, "the actor")
    assert (
        output.text
        != Generator(options=ModelOptions(base=str(gpt2), device="cpu")).generate("the actor", GREEDY).text
    )
    assert output.adapter == "reviews"


def test_swapping_adapters_keeps_base_weights(settings, train_once):
    for name, rate in (("a", 1e-2), ("b", 3e-2)):
        train_once(settings(name=name, learning_rate=rate))
    solo = {
        name: Generator(name, options=ModelOptions(device="cpu")).generate("the actor", GREEDY).text
        for name in ("a", "b")
    }
    generator = Generator("a", "b", options=ModelOptions(device="cpu"))
    assert generator.current_adapter == "a"
    solo[None] = (
        Generator(options=ModelOptions(base=generator.base.files.name, device="cpu"))
        .generate("the actor", GREEDY)
        .text
    )
    weights = generator.base.model.get_input_embeddings().weight.data_ptr()
    for name in ("a", None, "b", "a", "b", None, None, "a"):
        generator.set_adapter(name)
        assert generator.generate("the actor", GREEDY).text == solo[name]
    assert generator.base.model.get_input_embeddings().weight.data_ptr() == weights
    generator.unload("a")
    assert generator.current_adapter is None
    assert generator.generate("the actor", GREEDY).text == solo[None]
    generator.set_adapter("b")
    generator.unload("b")
    assert generator.generate("the actor", GREEDY).text == solo[None]
    generator.set_adapter("a")
    assert generator.generate("the actor", GREEDY).text == solo["a"]


def test_failed_swap_changes_nothing(adapter, tmp_path):
    generator = Generator("reviews", options=ModelOptions(device="cpu"))
    before = generator.generate("the actor", GREEDY).text
    with pytest.raises(
        AdapterError, match=r"There is no adapter 'nothing', neither in adapters .reviews. nor as a path"
    ):
        generator.set_adapter("nothing")
    assert generator.current_adapter == "reviews"
    assert generator.generate("the actor", GREEDY).text == before


def test_streamed_pieces_join_to_text(adapter, decoder_kind):
    generator = Generator("reviews", options=ModelOptions(device="cpu"))
    for sampling in (
        GREEDY,
        SamplingParams(seed=3, max_new_tokens=30),
        SamplingParams(seed=3, max_new_tokens=30, stop=["e"]),
    ):
        pieces = []
        output = generator.generate("the actor ☕", sampling, on_text=pieces.append)
        assert "".join(pieces) == output.text
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


def test_stop_string_cuts_text(model_folder, decoder_kind):
    generator = Generator(options=ModelOptions(base=str(model_folder), device="cpu"))
    full_text = generator.generate("the actor", GREEDY).text
    stop = full_text[8:10]
    output = generator.generate("the actor", GREEDY.model_copy(update={"stop": [stop]}))
    assert output.text == full_text[: full_text.index(stop)]
    assert output.finished


def test_eos_ends_generation(model_folder, monkeypatch, decoder_kind):
    generator = Generator(options=ModelOptions(base=str(model_folder), device="cpu"))
    eos = generator.base.tokenizer.eos_token_id

    def prefer_eos(logits):
        logits[..., eos] = 1e4
        return logits

    with monkeypatch.context() as patch:
        patch_logits(generator, prefer_eos, patch)
        output = generator.generate("the actor", GREEDY)
    assert (output.text, output.tokens, output.finished) == ("", 0, True)
    assert generator.generate("the actor", GREEDY).finished is False


def test_several_outputs_differ(model_folder):
    outputs = Generator(options=ModelOptions(base=str(model_folder), device="cpu")).generate_all(
        "the", SamplingParams(seed=1, n=4)
    )
    assert len({output.text for output in outputs}) == 4


def test_temperature_zero_is_greedy(model_folder):
    generator = Generator(options=ModelOptions(base=str(model_folder), device="cpu"))
    cold = GREEDY.model_copy(update={"greedy": False, "temperature": 0.0})
    assert generator.generate("the", cold).text == generator.generate("the", GREEDY).text


def test_prompts_near_context_limit(model_folder, decoder_kind):
    generator = Generator(options=ModelOptions(base=str(model_folder), device="cpu"))
    with pytest.raises(
        GenerationError, match=f"tokens, but .* has a context of {tiny_models.CONTEXT}: shorten it"
    ):
        generator.generate("w " * 400)
    assert generator.generate("", GREEDY).prompt == ""
    nearly = "w " * 60
    length = len(generator.base.tokenizer(nearly)["input_ids"])
    output = generator.generate(nearly, GREEDY.model_copy(update={"max_new_tokens": 1000}))
    assert output.tokens <= tiny_models.CONTEXT - length


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


def test_threads_take_turns(settings, train_once):
    for name, rate in (("a", 1e-2), ("b", 3e-2)):
        train_once(settings(name=name, learning_rate=rate))
    generator = Generator("a", "b", options=ModelOptions(device="cpu"))
    expected = {}
    for name in ("a", "b"):
        generator.set_adapter(name)
        expected[name] = generator.generate("the actor", GREEDY).text
    wrong = []

    def ask(name):
        for _ in range(4):
            output = generator.generate("the actor", GREEDY)
            if output.text != expected[output.adapter]:
                wrong.append(output)
            generator.set_adapter(name)

    threads = [threading.Thread(target=ask, args=(name,)) for name in "abab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_adapter_used_while_another_loads(settings, train_once, monkeypatch):
    for name, rate in (("a", 1e-2), ("b", 3e-2)):
        train_once(settings(name=name, learning_rate=rate))
    shutil.copytree("adapters/a", "adapters/c")
    generator = Generator("b", "a", options=ModelOptions(device="cpu"), max_resident=2)
    generator.set_adapter(None)

    def current_adapter(generator):  # read between two steps of the load, where another thread may run
        generator.get_loaded("b")

    monkeypatch.setattr(Generator, "current_adapter", property(current_adapter), raising=False)
    generator.get_or_load("c")
    assert generator.loaded_adapters == ["b", "c"]


def test_stop_string_across_prompt_is_ignored(model_folder, decoder_kind):
    generator = Generator(options=ModelOptions(base=str(model_folder), device="cpu"))
    full_text = generator.generate("the actor", GREEDY).text
    across = "r" + full_text[:1]
    output = generator.generate("the actor", GREEDY.model_copy(update={"stop": [across]}))
    assert (
        output.text == full_text[: full_text.index(across)] if across in full_text else output.text == full_text
    )


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
        AdapterError, match=r"reviews is damaged: adapter_model\.safetensors does not match its hash in manifest"
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
    notices = []
    Generator("reviews", options=ModelOptions(base=str(other), device="cpu", force=True, notify=notices.append))
    assert len([notice for notice in notices if notice.text.startswith("FORCED: ")]) == 1


# mixed batches


LONG = " ".join(tiny_models.reviews(80))
PROMPTS = ["", "so", "the actor", "71: her voice never", LONG[:60], LONG[:110], LONG[:160], "☕ é"]


def prompt_of_length(tokenizer, length):
    """Return a prompt of `length` tokens."""
    texts = (LONG[:end] for end in range(length, len(LONG)))
    return next(text for text in texts if len(tokenizer(text)["input_ids"]) == length)


# sampling


def test_n_outputs_use_consecutive_seeds(model_folder, eight_adapters):
    generator = Generator("one", options=ModelOptions(device="cpu"))
    sampling = SamplingParams(seed=5, max_new_tokens=10)
    expected = {}
    for prompt, name in (("so", "one"), ("the actor", "six"), ("the actor", None)):
        generator.set_adapter(name)
        outputs = [generator.generate(prompt, SamplingParams(seed=seed, max_new_tokens=10)) for seed in (5, 6, 7)]
        assert [output.seed for output in outputs] == [5, 6, 7]
        assert len({output.text for output in outputs}) == 3
        assert generator.generate_all(prompt, sampling.model_copy(update={"n": 3})) == outputs
        expected[prompt, name] = outputs
    together = generator.generate_batch(list(expected), sampling.model_copy(update={"n": 3}))
    assert together == list(itertools.chain(*expected.values()))


def test_reported_seed_reproduces_output(model_folder, eight_adapters):
    generator = Generator("one", options=ModelOptions(device="cpu"))
    free = SamplingParams(max_new_tokens=10)
    outputs = [
        generator.generate("so", free),
        *generator.generate_all("so", free.model_copy(update={"n": 3})),
        *generator.generate_batch([("so", "one"), (PROMPTS[5], "six")], free.model_copy(update={"n": 2})),
    ]
    for output in outputs:
        generator.set_adapter(output.adapter)
        assert generator.generate(output.prompt, free.model_copy(update={"seed": output.seed})) == output
    seeds = [output.seed for output in outputs]
    assert len({*seeds[:4], *seeds[4:6]}) == 6
    assert seeds[1:4] == [seeds[1], seeds[1] + 1, seeds[1] + 2]
    assert seeds[4:6] == seeds[6:8]  # each request has the same seeds
    assert generator.generate("so", GREEDY).seed is None


def test_global_random_states_are_kept(model_folder, eight_adapters):
    generator = Generator("one", options=ModelOptions(device="cpu"))
    before = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    generator.generate_batch([("so", name) for name in eight_adapters], SamplingParams(max_new_tokens=4, n=2))
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


# adapters that change on disk


def damage_adapter(path, kind):
    """Damage an adapter in one of the ways of DAMAGE."""
    weights = path / WEIGHTS_FILE
    if kind == "cut":
        weights.write_bytes(weights.read_bytes()[:-5])
    elif kind == "not finite":
        tensors = load_file(weights)
        next(iter(tensors.values()))[0, 0] = float("nan")
        save_file(tensors, weights)
    elif kind == "no config":
        (path / CONFIG_FILE).unlink()
    elif kind == "other base":
        facts = WeightsInfo(sha256=atomic_io.sha256_file(weights), bytes=weights.stat().st_size, parameters=1)
        (path / MANIFEST_FILE).write_text(adapter_files.manifest(weights=facts).to_json())


DAMAGE = ("cut", "not finite", "no config", "other base", "other width")


@pytest.fixture(scope="module")
def versions(gpt2, shared_folder):
    """Folder of three versions of an adapter, and one for each kind of damage."""
    folder = shared_folder / "versions"
    save_random_adapter(gpt2, "v1", 3, seed=1, folder=folder)
    save_random_adapter(gpt2, "v2", 5, "attention", seed=2, folder=folder)
    save_random_adapter(gpt2, "v3", 2, seed=3, dora=True, folder=folder)
    save_random_adapter(
        tiny_models.save_model(shared_folder / "wider", "gpt2", width=48), "other width", folder=folder
    )
    for kind in DAMAGE[:-1]:
        damage_adapter(shutil.copytree(folder / "v1", folder / kind), kind)
    return folder


SHORT = SamplingParams(greedy=True, max_new_tokens=6, repetition_penalty=1.0)


@pytest.fixture(scope="module")
def texts(gpt2, versions):
    """Text that a fresh generator generates with each version; None is the plain base."""
    texts = {}
    for version in ("v1", "v2", "v3", None):
        fresh = Generator(
            *[versions / version] if version else [],
            adapters_dir=versions,
            options=ModelOptions(base=str(gpt2), device="cpu"),
        )
        texts[version] = fresh.generate("the actor", SHORT).text
    assert len(set(texts.values())) == 4
    return texts


def install(versions, version, path):
    if path.exists():
        shutil.rmtree(path)
    if version != "missing":
        shutil.copytree(versions / version, path)


def test_replaced_adapter_is_reloaded_unless_broken(versions, texts):
    path = Path("adapters/a")
    install(versions, "v1", path)
    generator = Generator("a", options=ModelOptions(device="cpu"))
    install(versions, "v2", path)
    assert generator.generate("the actor", SHORT).text == texts["v1"]  # until it is selected again
    generator.set_adapter("a")
    assert generator.generate("the actor", SHORT).text == texts["v2"]
    install(versions, "v3", path)
    assert generator.generate_batch([("the actor", "a")], SHORT)[0].text == texts["v3"]
    for kind in (*DAMAGE, "missing"):
        install(versions, kind, path)
        with pytest.raises(AdapterError):
            generator.set_adapter("a")
        with pytest.raises(AdapterError):
            generator.generate_batch([("the actor", None), ("the actor", "a")], SHORT)
        assert (generator.current_adapter, generator.loaded_adapters) == ("a", ["a"])
        assert generator.generate("the actor", SHORT).text == texts["v3"]
    install(versions, "v1", path)
    generator.set_adapter("a")
    assert generator.generate("the actor", SHORT).text == texts["v1"]


def test_edited_adapter_config_is_reloaded(versions, texts):
    install(versions, "v1", Path("adapters/a"))
    generator = Generator("a", options=ModelOptions(device="cpu"))
    config = Path("adapters/a") / CONFIG_FILE
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 1}))
    expected = Generator("a", options=ModelOptions(device="cpu")).generate("the actor", SHORT).text
    assert expected != texts["v1"]
    generator.set_adapter("a")
    assert generator.generate("the actor", SHORT).text == expected


@pytest.mark.parametrize("kind", [*DAMAGE, "missing"])
def test_batch_with_broken_adapter_loads_nothing(versions, texts, kind):
    for name, version in (("a", "v1"), ("b", "v2"), ("c", kind)):
        install(versions, version, Path("adapters") / name)
    generator = Generator("a", options=ModelOptions(device="cpu"))
    with pytest.raises(AdapterError):
        generator.generate_batch([("the actor", name) for name in (None, "b", "c", "a")], SHORT)
    assert (generator.current_adapter, generator.loaded_adapters) == ("a", ["a"])
    assert generator.generate("the actor", SHORT).text == texts["v1"]


def test_batch_with_long_prompt_loads_nothing(versions):
    for name in "ab":
        install(versions, "v1", Path("adapters") / name)
    generator = Generator("a", options=ModelOptions(device="cpu"))
    with pytest.raises(GenerationError, match="shorten it"):
        generator.generate_batch([("the actor", "b"), ("w " * 400, None)], SHORT)
    assert (generator.current_adapter, generator.loaded_adapters) == ("a", ["a"])


@pytest.mark.parametrize("bad_request", [("w " * 400, None), ("the actor", "nothing")])
def test_failed_batch_keeps_current_weights(versions, texts, bad_request):
    install(versions, "v1", Path("adapters/a"))
    generator = Generator("a", options=ModelOptions(device="cpu"))
    install(versions, "v2", Path("adapters/a"))
    with pytest.raises((AdapterError, GenerationError)):
        generator.generate_batch([("the actor", "a"), bad_request], SHORT)
    assert generator.generate("the actor", SHORT).text == texts["v1"]


class History:
    """A generator, with the versions of adapters expected on disk and in memory."""

    def __init__(self, base, versions, texts, adapters):
        self.versions, self.texts, self.adapters = versions, texts, adapters
        self.on_disk, self.in_memory, self.current = {}, {}, None
        self.generator = Generator(adapters_dir=adapters, options=ModelOptions(base=str(base), device="cpu"))

    def usable(self, name):
        return name is None or self.on_disk.get(name) in ("v1", "v2", "v3")

    def install(self, name, version):
        install(self.versions, version, self.adapters / name)
        self.on_disk[name] = version

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
        requests = [("the actor", name) for name in names] + [("w " * 400, None)] * too_long
        if not too_long and all(map(self.usable, names)):
            outputs = self.generator.generate_batch(requests, SHORT)
            self.in_memory |= {name: self.on_disk[name] for name in names if name}
            assert [output.text for output in outputs] == [self.texts[self.in_memory.get(name)] for name in names]
        else:
            with pytest.raises((AdapterError, GenerationError)):
                self.generator.generate_batch(requests, SHORT)

    def check(self):
        assert self.generator.loaded_adapters == sorted(self.in_memory)
        assert self.generator.current_adapter == self.current
        output = self.generator.generate("the actor", SHORT)
        assert (output.text, output.adapter) == (self.texts[self.in_memory.get(self.current)], self.current)


NAMES = st.sampled_from("aab")
STEPS = st.one_of(
    st.tuples(st.just("install"), NAMES, st.sampled_from(["v1", "v2", "v3"])),
    st.tuples(st.just("install"), NAMES, st.sampled_from([*DAMAGE, "missing"])),
    st.tuples(st.just("use"), NAMES | st.none(), st.booleans()),
    st.tuples(st.just("unload"), NAMES),
    st.tuples(st.just("batch"), st.lists(NAMES | st.none(), min_size=1, max_size=4), st.booleans()),
)


@pytest.mark.slow
@hypothesis_settings(
    max_examples=20,
    deadline=None,
    database=None,
    phases=[Phase.generate],  # shrinking a failing history takes minutes
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(STEPS, min_size=8, max_size=25))
def test_random_history_matches_fresh_generator(gpt2, versions, texts, tmp_path, steps):
    history = History(gpt2, versions, texts, Path(tempfile.mkdtemp(dir=tmp_path)))
    for step in (("install", "a", "v1"), ("install", "b", "v2"), ("use", "a", False), *steps):
        getattr(history, step[0])(*step[1:])
        history.check()


# adapters of a batch


def test_batch_loads_adapters_keeps_current(versions, texts):
    for name, version in (("a", "v1"), ("b", "v2"), ("c", "v3")):
        install(versions, version, Path("adapters") / name)
    generator = Generator("a", options=ModelOptions(device="cpu"))
    requests = [("the actor", adapter) for adapter in ("b", None, Path("adapters/c"), "a", "b")]
    outputs = generator.generate_batch(requests, SHORT)
    assert [(output.adapter, output.text) for output in outputs] == [
        ("b", texts["v2"]),
        (None, texts[None]),
        ("c", texts["v3"]),
        ("a", texts["v1"]),
        ("b", texts["v2"]),
    ]
    assert (generator.current_adapter, generator.loaded_adapters) == ("a", ["a", "b", "c"])
    assert generator.generate("the actor", SHORT).text == texts["v1"]
    assert generator.generate_batch([], SHORT) == []


# errors


def test_long_prompt_error_states_length(gpt2):
    generator = Generator(options=ModelOptions(base=str(gpt2), device="cpu"))
    for length in (tiny_models.CONTEXT, 1000):
        prompt = prompt_of_length(generator.base.tokenizer, length)
        with pytest.raises(GenerationError) as error:
            generator.generate_all(prompt)
        assert (
            str(error.value) == f"The prompt has {length:,} tokens, but {gpt2} has a context of 128: shorten it."
        )
    assert (
        generator.generate(prompt_of_length(generator.base.tokenizer, tiny_models.CONTEXT - 1), GREEDY).tokens
        <= 1
    )


def test_huge_prompt_is_rejected_before_tokenizing(gpt2, monkeypatch):
    generator = Generator(options=ModelOptions(base=str(gpt2), device="cpu"))
    monkeypatch.setattr(generator.base, "tokenizer", None)
    with pytest.raises(
        ContextLengthError, match=f"The prompt has 1,000,000 characters, but {gpt2} has a context of 128 tokens"
    ):
        generator.encode_prompt("w" * 1_000_000)


def test_unload_of_unknown_adapter_fails(gpt2, versions):
    generator = Generator(options=ModelOptions(base=str(gpt2), device="cpu"))
    with pytest.raises(GenerationError) as error:
        generator.unload("nothing")
    assert str(error.value) == "No adapter named nothing is loaded. Loaded: none."
    generator.set_adapter(versions / "v1")
    generator.set_adapter(versions / "v2")
    with pytest.raises(GenerationError) as error:
        generator.unload("nothing")
    assert str(error.value) == "No adapter named nothing is loaded. Loaded: v1, v2."
    assert (generator.current_adapter, generator.loaded_adapters) == ("v2", ["v1", "v2"])


def test_same_name_from_two_folders_fails(versions, texts, tmp_path):
    here, there = Path("adapters/a"), tmp_path / "elsewhere" / "a"
    install(versions, "v1", here)
    install(versions, "v2", there)
    message = f"An adapter named a is already loaded from {here.resolve()}: unload it first."
    with pytest.raises(GenerationError) as error:
        Generator("a", there, options=ModelOptions(device="cpu"))
    assert str(error.value) == message
    generator = Generator("a", options=ModelOptions(device="cpu"))
    for call in (generator.set_adapter, lambda path: generator.generate_batch([("the actor", path)], SHORT)):
        with pytest.raises(GenerationError) as error:
            call(there)
        assert str(error.value) == message
        assert generator.generate("the actor", SHORT).text == texts["v1"]
    generator.unload("a")
    assert generator.set_adapter(there) == "a"
    assert generator.generate("the actor", SHORT).text == texts["v2"]


def test_seeds_wrap_at_maximum(gpt2):
    generator = Generator(options=ModelOptions(base=str(gpt2), device="cpu"))
    outputs = generator.generate_all("so", SamplingParams(seed=2**63 - 1, n=2, max_new_tokens=4))
    for output in outputs:
        again = resolve_settings(SamplingParams, {"seed": output.seed, "max_new_tokens": 4})
        assert generator.generate("so", again) == output


def test_changed_manifest_base_is_rejected(versions):
    install(versions, "v1", Path("adapters/a"))
    generator = Generator("a", options=ModelOptions(device="cpu"))
    install(versions, "other base", Path("adapters/a"))
    with pytest.raises(WrongBaseError):
        generator.set_adapter("a")


def test_unloaded_adapter_is_freed(eight_adapters):
    import gc
    import weakref

    generator = Generator(eight_adapters[0], options=ModelOptions(device="cpu"))
    generator.generate("the actor", GREEDY)
    tensors = [
        weakref.ref(layer_lora.B) for layer_lora in generator.get_or_load(eight_adapters[0])[1].layers.values()
    ]
    generator.unload(eight_adapters[0])
    gc.collect()
    assert not any(tensor() is not None for tensor in tensors)
