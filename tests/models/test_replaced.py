"""Adapters that replace weights of the base compute what PEFT computes, or are refused by name."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_tuner import Generator, Library, ModelOptions, SamplingParams, blend, compress, evaluate, merge, to_gguf
from lora_tuner.adapters.adapter import CONFIG_FILE, WEIGHTS_FILE, load_adapter_folder
from lora_tuner.adapters.compatibility import check_compatibility
from lora_tuner.convert.export_vllm import to_vllm
from lora_tuner.data.eval_sets import EvalSet
from lora_tuner.errors import AdapterError
from lora_tuner.inference.multi_lora import MultiLora, blend_loaded
from lora_tuner.models.loading import load_base
from lora_tuner.models.resolve import find_base

from .. import model_families, tiny_models
from ..parameters import sampled

ROWS = 320  # of the tiny bases
IDS = torch.tensor([[5, 7, 40, 300, 7, 9, 319, 2]])


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "untied"
    return model_families.save_family(folder, "llama", tie_word_embeddings=False)


@pytest.fixture
def bases(gpt2, llama, untied):
    return {"gpt2": gpt2, "llama": llama, "untied": untied}


CASES = {  # name -> base, rows after a resize, settings of PEFT, embeddings saved as well
    "rows of tied embeddings": ("llama", None, {"trainable_token_indices": [7, 300, 5]}, False),
    "rows of gpt2": ("gpt2", None, {"trainable_token_indices": [7, 300]}, False),
    "rows of the embedding alone": ("untied", None, {"trainable_token_indices": [7, 300]}, False),
    "rows of embedding and head": (
        "untied",
        322,
        {"trainable_token_indices": {"embed_tokens": [320, 7, 321], "lm_head": [320, 321]}},
        False,
    ),
    "new rows of gpt2": ("gpt2", 322, {"trainable_token_indices": [320, 321]}, False),
    "new rows and resized embeddings": ("llama", 324, {"trainable_token_indices": [320, 321]}, True),
    "resized embeddings": ("llama", 323, {}, True),
    "fewer embeddings": ("untied", 310, {}, True),
    "trained head of tied embeddings": ("llama", None, {"modules_to_save": ["lm_head"]}, False),
    "trained embedding of tied embeddings": ("gpt2", None, {"modules_to_save": ["wte"]}, False),
    "embedding and head": ("untied", 322, {"modules_to_save": ["embed_tokens", "lm_head"]}, False),
    "norms": ("llama", None, {"modules_to_save": ["norm", "input_layernorm"]}, False),
    "whole layers": ("gpt2", None, {"modules_to_save": ["mlp", "ln_f"]}, False),
}


def save_adapter(folder, base, resize=None, settings=None, with_embeddings=False):
    """Save an adapter with random weights as PEFT does."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base)
    if resize:
        model.resize_token_embeddings(resize)
    names = ["c_attn"] if model.config.model_type == "gpt2" else ["q_proj", "v_proj"]
    config = LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=names, init_lora_weights=False, **(settings or {}),
        fan_in_fan_out=names == ["c_attn"],
    )  # fmt: skip
    wrapped = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
        if with_embeddings and resize:
            model.get_input_embeddings().weight.mul_(1.1)
    wrapped.save_pretrained(folder, save_embedding_layers=with_embeddings)
    return load_adapter_folder(folder)


def peft_logits(base, folder, resize=None, ids=IDS):
    model = AutoModelForCausalLM.from_pretrained(base)
    if resize:
        model.resize_token_embeddings(resize)
    with torch.no_grad():
        return PeftModel.from_pretrained(model, folder).eval()(ids).logits


def open_base(folder, **options):
    return load_base(find_base(str(folder)), ModelOptions(device="cpu", **options))


@pytest.mark.parametrize("case", sampled(CASES, 3))
def test_replaced_weights_compute_as_in_peft(case, bases, tmp_path):
    kind, resize, settings, with_embeddings = CASES[case]
    adapter = save_adapter(tmp_path / "a", bases[kind], resize, settings, with_embeddings)
    rows = resize or ROWS
    ids = IDS.clamp(max=rows - 1).clone()
    ids[0, -2:] = torch.tensor([rows - 1, rows - 2])
    expected = peft_logits(bases[kind], tmp_path / "a", resize, ids)
    base = open_base(bases[kind])
    lora = MultiLora(base)
    loaded = lora.load(adapter)
    both = torch.cat([ids, IDS])
    with torch.no_grad():
        plain = base.model(IDS).logits
        with lora.apply_hooks(lora.hooks([loaded])):
            alone = base.model(ids).logits
        with lora.apply_hooks(lora.hooks([loaded, None])):
            mixed = base.model(both).logits
    torch.testing.assert_close(alone, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mixed[0, :, :rows], expected[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mixed[1, :, :ROWS], plain[0], atol=1e-5, rtol=1e-5)
    merged = merge(adapter, tmp_path / "m", options=ModelOptions(base=str(bases[kind])))
    model = AutoModelForCausalLM.from_pretrained(merged.path)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)


def rewrite(folder, tensors=None, **settings):
    """Change tensors and settings of an adapter on disk."""
    path = folder / WEIGHTS_FILE
    save_file(load_file(path) | (tensors or {}), path)
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(config | settings))
    return load_adapter_folder(folder)


@pytest.fixture
def token_rows(llama, tmp_path):
    return save_adapter(tmp_path / "adapters" / "rows", llama, None, {"trainable_token_indices": [7, 300]})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trainable_token_indices": None}, "of which trainable_token_indices does not tell the ids"),
        ({"trainable_token_indices": [7, "x"]}, "of which trainable_token_indices does not tell the ids"),
        ({"trainable_token_indices": [7, -1]}, "of which trainable_token_indices does not tell the ids"),
        ({"trainable_token_indices": [7, 7]}, "trainable_token_indices names none, or one twice"),
        ({"trainable_token_indices": [7, 8, 9]}, "shape (2, 32), but trainable_token_indices has 3 ids"),
        (
            {"trainable_token_indices": {"lm_head": [7, 8]}},
            "of which trainable_token_indices does not tell the ids",
        ),
    ],
)
def test_rows_without_their_ids_are_refused(token_rows, settings, message):
    with pytest.raises(AdapterError, match="trainable_tokens_delta has") as error:
        rewrite(token_rows.path, **settings)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "shape", "settings", "message"),
    [
        ("model.layers.0.self_attn.token_adapter.trainable_tokens_delta", (1, 32), {"self_attn": [1]}, "is not the input"),
        ("score.weight", (2, 32), ["score"], "has no module score (a classifier, and this base writes text)"),
        ("model.norm.weight", (33,), ["norm"], "model.norm.weight has sizes 32 and 33 in base and adapter"),
        ("model.norm.bias", (32,), ["norm"], "model.norm has no bias in the base"),
        ("model.rotary_emb.weight", (32,), ["rotary_emb"], "of a LlamaRotaryEmbedding the base may use weights"),
        ("lm_head.weight", (320, 31), ["lm_head"], "lm_head.weight has sizes 320 x 32 and 320 x 31"),
        ("lm_head.weight", (330, 32), ["lm_head"], "resized to 330 rows, and it lacks row 320 of model.embed_tokens"),
    ],
)  # fmt: skip
def test_replaced_module_of_other_base_is_refused(token_rows, llama, name, shape, settings, message):
    key = "trainable_token_indices" if isinstance(settings, dict) else "modules_to_save"
    if key == "trainable_token_indices":
        settings["embed_tokens"] = [7, 300]
    adapter = rewrite(token_rows.path, {f"base_model.model.{name}": torch.ones(shape)}, **{key: settings})
    with pytest.raises(AdapterError) as error:
        MultiLora(open_base(llama)).load(adapter)
    assert message in str(error.value)


def test_whole_weight_that_peft_would_skip_is_refused(token_rows):
    tensors = {"base_model.model.model.norm.weight": torch.ones(32)}
    with pytest.raises(AdapterError, match=r"model\.norm\.weight is not a LoRA tensor"):
        rewrite(token_rows.path, tensors)
    name = "base_model.model.model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(AdapterError, match="q_proj has LoRA and is replaced"):
        rewrite(token_rows.path, {name: torch.ones(32, 32)}, modules_to_save=["norm", "q_proj"])


def test_replaced_router_is_refused(tmp_path):
    """It gives more than one tensor."""
    base = model_families.save_family(tmp_path / "base", "llama4_text")
    adapter = save_adapter(tmp_path / "a", base, None, {"modules_to_save": ["router"]})
    with pytest.raises(AdapterError, match="of a Llama4Router the base may use weights without running it"):
        MultiLora(open_base(base)).load(adapter)


def test_row_that_head_lacks_is_refused(untied, tmp_path):
    adapter = save_adapter(tmp_path / "a", untied, 322, {"trainable_token_indices": [320, 321]})
    with pytest.raises(AdapterError, match=r"resized to 322 rows, and it lacks row 320 of lm_head"):
        MultiLora(open_base(untied)).load(adapter)


def test_rows_under_head_with_bias_are_refused(tmp_path):
    base = model_families.save_family(tmp_path / "gptj", "gptj")
    settings = {"trainable_token_indices": {"wte": [7], "lm_head": [7]}}
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig("CAUSAL_LM", target_modules=["q_proj"], **settings)
    )
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(AdapterError, match="PEFT leaves out the bias of lm_head where single rows are replaced"):
        MultiLora(open_base(base)).load(load_adapter_folder(tmp_path / "a"))


def test_commands_refuse_replaced_weights_by_name(token_rows, llama, tmp_path):
    library, options = Library(tmp_path / "adapters"), ModelOptions(base=str(llama))
    message = r"rows replaces weights of the base \(2 rows of embed_tokens\), .* merge it instead"
    with pytest.raises(AdapterError, match=message):
        blend([(token_rows, 1.0)], "new", library, options=options)
    with pytest.raises(AdapterError, match=message):
        compress(token_rows, "new", library, options=options)
    with pytest.raises(
        AdapterError, match=r"llama.cpp does not load what replaces .*\(2 rows of embed_tokens\): merge"
    ):
        to_gguf(token_rows, tmp_path / "new.gguf", options=options)
    with pytest.raises(
        AdapterError, match=r"vLLM does not load what replaces .*\(2 rows of embed_tokens\): merge"
    ):
        to_vllm(token_rows, tmp_path / "vllm", options=options)
    loaded = MultiLora(open_base(llama)).load(token_rows)
    with pytest.raises(AdapterError, match="replaces weights of the base, such as rows of new tokens"):
        blend_loaded([(1.0, loaded)])


def test_check_names_replaced_weights(token_rows):
    token_rows = rewrite(token_rows.path, init_lora_weights=True)
    (vllm,) = check_compatibility(token_rows, "vllm", base_config={"model_type": "llama"}).errors
    assert vllm.startswith(
        "vLLM does not load what replaces weights of the base (2 rows of embed_tokens): merge it"
    )
    report = check_compatibility(token_rows, "peft", base_config={"vocab_size": 320})
    assert (report.errors, report.notes) == ([], [])
    report = check_compatibility(token_rows, "peft", base_config={"vocab_size": 300})
    assert report.notes == ["first resize the base: base.resize_token_embeddings(301)"]


@pytest.mark.parametrize(
    ("kind", "case"),
    [
        ("gpt2", {"modules_to_save": ["attn.c_proj", "mlp.c_fc"]}),  # transposed, and not when quantized
        *(
            pytest.param("llama", CASES[case][2], marks=pytest.mark.slow)
            for case in ("new rows of gpt2", "trained head of tied embeddings", "norms")
        ),
    ],
)
def test_replaced_weights_on_quantized_base(bases, tmp_path, kind, case):
    base = open_base(bases[kind], load_in="8bit")
    lora = MultiLora(base)
    resize = 322 if "trainable_token_indices" in case else None
    loaded = lora.load(save_adapter(tmp_path / "a", bases[kind], resize, case))
    with torch.no_grad(), lora.apply_hooks(lora.hooks([loaded])):
        logits = base.model(IDS).logits
    expected = peft_logits(bases[kind], tmp_path / "a", resize)
    assert logits.shape == expected.shape
    assert (logits - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.slow
def test_evaluation_measures_replaced_head(untied, tmp_path):
    """The loss in chunks uses the head of the adapter, with the rows of its tokens."""
    sets = [EvalSet("reviews", tiny_models.reviews(4))]
    for case in ("embedding and head", "rows of embedding and head"):
        _, resize, settings, _ = CASES[case]
        adapter = save_adapter(tmp_path / case[-4:], untied, resize, settings)
        ((cell,),) = evaluate([adapter], sets, options=ModelOptions(base=str(untied))).cells
        tokenizer = tiny_models.tokenizer()
        total = 0.0
        for text in sets[0].texts:
            ids = torch.tensor(
                [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id][: model_families.CONTEXT]]
            )
            logits = peft_logits(untied, adapter.path, resize, ids)[0, :-1]
            total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        assert cell.loss == pytest.approx(total / cell.tokens, abs=1e-4)


def test_rows_of_mixed_batch_equal_solo(bases, tmp_path):
    """Sampled with a seed, beside rows whose adapters have more or fewer logits."""
    for case in ("resized embeddings", "new rows of gpt2", "norms"):
        save_adapter(tmp_path / "adapters" / case[:4].strip(), bases["llama"], *CASES[case][1:])
    names = ["resi", "new", "norm", None]
    generator = Generator(options=ModelOptions(base=str(bases["llama"])), adapters_dir=tmp_path / "adapters")
    sampling = SamplingParams(seed=5, max_new_tokens=6, repetition_penalty=1.0)
    mixed = generator.generate_batch([("the actor", name) for name in names], sampling)
    solo = [generator.generate_batch([("the actor", name)], sampling)[0] for name in names]
    assert [output.text for output in mixed] == [output.text for output in solo]
    assert len({output.text for output in mixed}) == 4
