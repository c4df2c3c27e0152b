import json
import shutil
import threading

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_tuner import Generator, Sampling, store, train
from lora_tuner.config import resolve
from lora_tuner.errors import AdapterError, ConfigError, GenerationError, WrongBaseError

from . import tiny

GREEDY = Sampling(greedy=True, max_new_tokens=20, repetition_penalty=1.0)


def plain(model, folder, prompt, **options):
    """What transformers alone writes."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, do_sample=False, max_new_tokens=20, pad_token_id=0, **options)[0]
    return tokenizer.decode(output[inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_base_alone_writes_what_transformers_writes(model_folder):
    generator = Generator(base=str(model_folder), device="cpu")
    expected = plain(AutoModelForCausalLM.from_pretrained(model_folder), model_folder, "the actor")
    assert generator.generate("the actor", GREEDY).text == expected


def test_an_adapter_writes_what_plain_peft_writes(adapter, gpt2):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(gpt2), adapter.path)
    answer = Generator("reviews", device="cpu").generate("the actor", GREEDY)
    assert answer.text == plain(model, gpt2, "the actor")
    assert answer.text != Generator(base=str(gpt2), device="cpu").generate("the actor", GREEDY).text
    assert answer.adapter == "reviews"


def test_adapters_and_base_swap_without_reloading(settings):
    for name, rate in (("a", 1e-2), ("a2", 3e-2)):
        train(settings(name=name, learning_rate=rate))
    alone = {name: Generator(name, device="cpu").generate("the actor", GREEDY).text for name in ("a", "a2")}
    generator = Generator("a", "a2", device="cpu")
    assert generator.current == "a"
    alone[None] = Generator(base=generator.base.source.name, device="cpu").generate("the actor", GREEDY).text
    weights = generator.base.model.get_input_embeddings().weight.data_ptr()
    for name in ("a", None, "a2", "a", "a2", None, None, "a"):
        generator.use(name)
        assert generator.generate("the actor", GREEDY).text == alone[name]
    assert generator.base.model.get_input_embeddings().weight.data_ptr() == weights
    generator.unload("a")
    assert generator.current is None
    assert generator.generate("the actor", GREEDY).text == alone[None]
    generator.use("a2")
    generator.unload("a2")
    assert generator.generate("the actor", GREEDY).text == alone[None]
    generator.use("a")
    assert generator.generate("the actor", GREEDY).text == alone["a"]


def test_a_failed_swap_changes_nothing(adapter, tmp_path):
    generator = Generator("reviews", device="cpu")
    before = generator.generate("the actor", GREEDY).text
    with pytest.raises(
        AdapterError, match=r"There is no adapter 'nothing', neither in adapters .reviews. nor as a path"
    ):
        generator.use("nothing")
    assert generator.current == "reviews"
    assert generator.generate("the actor", GREEDY).text == before


def test_text_streams_in_pieces_that_make_up_the_answer(adapter):
    generator = Generator("reviews", device="cpu")
    for sampling in (GREEDY, Sampling(seed=3, max_new_tokens=30), Sampling(seed=3, max_new_tokens=30, stop=["e"])):
        pieces = []
        answer = generator.generate("the actor ☕", sampling, on_text=pieces.append)
        assert "".join(pieces) == answer.text
    assert len(pieces) >= 1


def test_the_same_seed_gives_the_same_text_and_leaves_the_callers_random_state(model_folder):
    generator = Generator(base=str(model_folder), device="cpu")
    state = torch.random.get_rng_state()
    texts = [generator.generate("so", Sampling(seed=seed)).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.random.get_rng_state(), state)
    first, second = generator.generate("so", Sampling()), generator.generate("so", Sampling())
    assert first.text != second.text
    assert generator.generate("so", Sampling(seed=first.seed)).text == first.text


def test_a_stop_string_ends_the_answer_before_itself(model_folder):
    generator = Generator(base=str(model_folder), device="cpu")
    whole = generator.generate("the actor", GREEDY).text
    stop = whole[8:10]
    answer = generator.generate("the actor", GREEDY.model_copy(update={"stop": [stop]}))
    assert answer.text == whole[: whole.index(stop)]
    assert answer.finished


def test_the_answer_ends_with_the_text(model_folder, monkeypatch):
    generator = Generator(base=str(model_folder), device="cpu")
    eos = generator.base.tokenizer.eos_token_id
    head = generator.base.model.get_output_embeddings()

    def favour_the_end(module, args, output):
        output[..., eos] = 1e4
        return output

    hook = head.register_forward_hook(favour_the_end)
    answer = generator.generate("the actor", GREEDY)
    hook.remove()
    assert (answer.text, answer.tokens, answer.finished) == ("", 0, True)
    assert generator.generate("the actor", GREEDY).finished is False


def test_several_answers_differ(model_folder):
    answers = Generator(base=str(model_folder), device="cpu").generate_all("the", Sampling(seed=1, answers=4))
    assert len({answer.text for answer in answers}) == 4


def test_temperature_zero_is_greedy(model_folder):
    generator = Generator(base=str(model_folder), device="cpu")
    cold = GREEDY.model_copy(update={"greedy": False, "temperature": 0.0})
    assert generator.generate("the", cold).text == generator.generate("the", GREEDY).text


def test_prompts_at_the_edge_of_the_context(model_folder):
    generator = Generator(base=str(model_folder), device="cpu")
    with pytest.raises(GenerationError, match=f"tokens, and .* looks back on {tiny.CONTEXT}: cut it"):
        generator.generate("w " * 400)
    assert generator.generate("", GREEDY).prompt == ""
    nearly = "w " * 60
    length = len(generator.base.tokenizer(nearly)["input_ids"])
    answer = generator.generate(nearly, GREEDY.model_copy(update={"max_new_tokens": 1000}))
    assert answer.tokens <= tiny.CONTEXT - length


def test_sampling_settings_that_contradict_each_other():
    with pytest.raises(ConfigError, match="answers above 1 would all be the same"):
        resolve(Sampling, {"greedy": True, "answers": 2})


def test_threads_take_turns(settings):
    for name, rate in (("a", 1e-2), ("b", 3e-2)):
        train(settings(name=name, learning_rate=rate))
    generator = Generator("a", "b", device="cpu")
    expected = {}
    for name in ("a", "b"):
        generator.use(name)
        expected[name] = generator.generate("the actor", GREEDY).text
    wrong = []

    def ask(name):
        for _ in range(4):
            answer = generator.generate("the actor", GREEDY)
            if answer.text != expected[answer.adapter]:
                wrong.append(answer)
            generator.use(name)

    threads = [threading.Thread(target=ask, args=(name,)) for name in "abab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_stop_string_that_begins_in_the_prompt_does_not_end_the_answer(model_folder):
    generator = Generator(base=str(model_folder), device="cpu")
    whole = generator.generate("the actor", GREEDY).text
    across = "r" + whole[:1]
    answer = generator.generate("the actor", GREEDY.model_copy(update={"stop": [across]}))
    assert answer.text == whole[: whole.index(across)] if across in whole else answer.text == whole


def test_the_bases_own_generation_settings_do_not_mix_in(tmp_path, gpt2):
    expected = Generator(base=str(gpt2), device="cpu").generate("the actor", GREEDY).text
    shutil.copytree(gpt2, tmp_path / "base")
    own = {"num_beams": 3, "no_repeat_ngram_size": 1, "min_new_tokens": 5, "eos_token_id": 0}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(own))
    pieces = []
    assert Generator(base="base", device="cpu").generate("the actor", GREEDY, on_text=pieces.append).text == expected
    assert "".join(pieces) == expected


def test_a_damaged_adapter_is_not_used(adapter):
    path = adapter.path / store.WEIGHTS
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        AdapterError, match=r"reviews is damaged: adapter_model\.safetensors is not the file that manifest"
    ):
        Generator("reviews", device="cpu")
    (adapter.path / store.MANIFEST).unlink()
    tensors = load_file(path)
    tensors[sorted(tensors)[0]][0, 0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(AdapterError, match=r"reviews is damaged: .* holds numbers that are not finite"):
        Generator("reviews", device="cpu")


def test_the_wrong_base_is_refused_and_forced_with_one_notice(adapter, tmp_path):
    other = tiny.save_model(tmp_path / "other", "gpt2", seed=7)
    with pytest.raises(WrongBaseError, match=r"reviews was trained on .*, not on .*other"):
        Generator("reviews", base=str(other), device="cpu")
    told = []
    Generator("reviews", base=str(other), device="cpu", force=True, notify=told.append)
    assert len([notice for notice in told if notice.text.startswith("FORCED: ")]) == 1
