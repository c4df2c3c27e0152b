"""Fused decoder blocks compute what transformers and PEFT compute, within rounding."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lora_tuner import ModelOptions
from lora_tuner.data import packing
from lora_tuner.inference.multi_lora import LoadedAdapter, MultiLora, _LayerLora
from lora_tuner.models import fused_blocks, kernels, native, packing_checks
from lora_tuner.models.loading import load_base
from lora_tuner.models.resolve import find_base

from ..model_families import save_family

FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "gpt2": {},
}
TARGETS = {
    "all": {"target_modules": "all-linear"},
    "some": {"target_modules": ["q_proj", "v_proj", "down_proj", "c_attn"]},
    "patterns": {
        "target_modules": "all-linear",
        "use_rslora": True,
        "rank_pattern": {"o_proj": 40, "c_proj": 40, "k_proj": 3},
        "alpha_pattern": {"o_proj": 3, "c_proj": 3},
    },
}
LENGTHS = [[5, 12, 40], [33]]


def load(tmp_path, family="llama", dtype="float32", **changes):
    folder = save_family(tmp_path / family, family, **FAMILIES[family], **changes)
    return load_base(find_base(str(folder)), ModelOptions(device="cpu", dtype=dtype))


def with_lora(base, seed=0, **settings):
    """Add LoRA layers that are not 0."""
    conv1d = type(base.model).__name__ == "GPT2LMHeadModel"
    model = get_peft_model(base.model, LoraConfig(r=4, fan_in_fan_out=conv1d, **{**TARGETS["all"], **settings}))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) / 10
    return model.train()


def make_batch(cu_seqlens=True):
    generator = torch.Generator().manual_seed(1)
    rows = [[torch.randint(1, 200, (n,), generator=generator).int().numpy() for n in row] for row in LENGTHS]
    if not cu_seqlens:
        rows = [row[:1] for row in rows]
    return packing.collate(rows, 0, cu_seqlens=cu_seqlens)


def loss_and_gradients(base, model, *, backward=True, **batch):
    labels = batch.pop("labels")
    model.zero_grad()
    with base.lm_head.skip_lm_head():
        nll = base.lm_head.nll(model(**batch, use_cache=False).logits, labels)
    if backward:
        nll.sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return nll.detach(), gradients


def count_calls(monkeypatch):
    calls = []
    apply = fused_blocks._BlockFunction.apply
    monkeypatch.setattr(
        fused_blocks._BlockFunction, "apply", lambda *inputs: (calls.append(inputs[1]), apply(*inputs))[1]
    )
    return calls


def assert_same(found, expected, tolerance):
    assert found[1].keys() == expected[1].keys()
    assert (found[0] - expected[0]).abs().max() <= tolerance * expected[0].abs().max()
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= tolerance * gradient.norm(), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("family", "targets"),
    [
        *((family, "all") for family in FAMILIES),
        ("llama", "some"),
        ("llama", "patterns"),
        ("gpt2", "some"),
        ("gpt2", "patterns"),
    ],
)
def test_loss_and_gradients_match(tmp_path, monkeypatch, family, targets, dtype):
    base = load(tmp_path, family, dtype)
    model, batch = with_lora(base, **TARGETS[targets]), make_batch()
    assert kernels.enable_varlen_attention(base.model)
    expected = loss_and_gradients(base, model, **batch)
    assert fused_blocks.enable_fused_blocks(base.model)
    calls = count_calls(monkeypatch)
    found = loss_and_gradients(base, model, **batch)
    assert len(calls) == base.model.config.num_hidden_layers
    assert_same(found, expected, 1e-5 if dtype == "float32" else 5e-2)
    assert torch.equal(loss_and_gradients(base, model, **batch)[0], found[0])
    fused_blocks.disable_fused_blocks(base.model)
    assert torch.equal(loss_and_gradients(base, model, **batch)[0], expected[0])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_large_scores_keep_true_gradients(tmp_path, family):
    """Torch's own attention rounds its log-sums, so its gradients are then wrong by their own size, or infinite."""
    base = load(tmp_path, family)
    model, batch = with_lora(base), packing.collate([[torch.arange(3, 43).int().numpy()]], 0, cu_seqlens=True)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data *= 10_000
    model.double().set_attn_implementation("eager")
    expected = loss_and_gradients(base, model, **{k: v for k, v in batch.items() if not k.startswith("cu_")})
    model.float().set_attn_implementation("sdpa")
    assert kernels.enable_varlen_attention(base.model)
    assert fused_blocks.enable_fused_blocks(base.model)
    found, true = (
        torch.cat([gradient.flatten() for gradient in gradients.values()])
        for _, gradients in (loss_and_gradients(base, model, **batch), expected)
    )
    assert (found - true).norm() < 1e-2 * true.norm()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_variants_of_a_batch_match(tmp_path, monkeypatch, family):
    """Padded sequences, rows whose probabilities are not kept, gradient checkpointing, no LoRA."""
    base = load(tmp_path, family)
    model, padded = with_lora(base), make_batch(cu_seqlens=False)
    kernels.enable_varlen_attention(base.model)
    expected = loss_and_gradients(base, model, **padded)
    packed = make_batch()
    fused_blocks.enable_fused_blocks(base.model)
    assert_same(loss_and_gradients(base, model, **padded), expected, 1e-5)
    before = loss_and_gradients(base, model, **packed)
    monkeypatch.setattr(fused_blocks, "KEPT_LENGTH", 16)
    for found in (loss_and_gradients(base, model, **packed), checkpointed(base, model, packed)):
        assert torch.equal(found[0], before[0])
        assert all(torch.equal(found[1][name], gradient) for name, gradient in before[1].items())
    ids = {name: tensor for name, tensor in packed.items() if name != "labels"}
    with torch.no_grad(), model.disable_adapter():
        without = model(**ids, use_cache=False).logits
        fused_blocks.disable_fused_blocks(base.model)
        assert torch.allclose(without, model(**ids, use_cache=False).logits, atol=1e-5)


def checkpointed(base, model, batch):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = loss_and_gradients(base, model, **batch)
    model.gradient_checkpointing_disable()
    return found


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_dropout": 0.1}, {"lora_bias": True}])
def test_other_than_plain_lora_is_left_to_peft(tmp_path, monkeypatch, settings):
    base = load(tmp_path)
    fused_blocks.enable_fused_blocks(base.model)
    model = with_lora(base, **settings)
    calls = count_calls(monkeypatch)
    loss_and_gradients(base, model, **make_batch(cu_seqlens=False))
    assert not calls


def test_masks_caches_and_hooks_are_left_to_transformers(tmp_path, monkeypatch):
    base = load(tmp_path)
    ids = torch.arange(1, 9)[None]
    mask = torch.ones(1, 8, dtype=torch.long)
    mask[0, :3] = 0
    expected = base.model(input_ids=ids, attention_mask=mask).logits
    text = base.model.generate(ids, max_new_tokens=5, do_sample=False)
    fused_blocks.enable_fused_blocks(base.model)
    calls = count_calls(monkeypatch)
    assert torch.equal(base.model(input_ids=ids, attention_mask=mask).logits, expected)
    assert torch.equal(base.model.generate(ids, max_new_tokens=5, do_sample=False), text)
    seen = []
    hook = base.model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *arguments: seen.append(1))
    base.model(input_ids=ids, use_cache=False)
    assert (len(seen), len(calls)) == (1, base.model.config.num_hidden_layers - 1)
    hook.remove()


def test_other_models_are_unchanged(tmp_path):
    for family, changes in (("llama", {"hidden_act": "gelu"}), ("gpt2", {"activation_function": "relu"})):
        base = load(tmp_path, family, **changes)
        assert not fused_blocks.enable_fused_blocks(base.model)
    base = load(tmp_path, "llama", dtype="float16")
    assert not fused_blocks.enable_fused_blocks(base.model)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weights_are_unchanged(tmp_path, family):
    """A base computes bitwise the same before it had LoRA layers and after."""
    base = load(tmp_path, family)
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    kernels.enable_varlen_attention(base.model)
    assert packing_checks.try_fused_blocks(base) == native.native_kernels().build
    batch = make_batch()
    plain, _ = loss_and_gradients(base, base.model.requires_grad_(False), **batch, backward=False)
    model = with_lora(base)
    loss_and_gradients(base, model, **batch)
    unloaded = model.unload()
    fused_blocks.update_fused_blocks(base.model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in unloaded.state_dict().items())
    assert all(tensor.is_contiguous() or family == "gpt2" for tensor in unloaded.state_dict().values())
    assert torch.equal(loss_and_gradients(base, unloaded, **batch, backward=False)[0], plain)


@pytest.mark.parametrize("dora", [False, True])
def test_hooks_of_one_adapter_match(tmp_path, monkeypatch, dora):
    base = load(tmp_path)
    kernels.enable_varlen_attention(base.model)
    multi_lora, generator = MultiLora(base), torch.Generator().manual_seed(2)

    def random_lora(layer):
        size_out, size_in = layer.weight.shape
        a, b = (torch.randn(size, generator=generator) / 10 for size in ((3, size_in), (size_out, 3)))
        return _LayerLora(a, b, torch.full((size_out,), 0.1) if dora else None)

    loaded = LoadedAdapter({name: random_lora(layer) for name, layer in multi_lora.layers.items()})
    with multi_lora.apply_hooks(multi_lora.hooks([loaded])), torch.no_grad():
        expected, _ = loss_and_gradients(base, base.model, **make_batch(), backward=False)
        fused_blocks.enable_fused_blocks(base.model)
        calls = count_calls(monkeypatch)
        found, _ = loss_and_gradients(base, base.model, **make_batch(), backward=False)
    assert bool(calls) != dora
    assert torch.allclose(found, expected, atol=1e-4)


def test_wrong_kernel_is_not_used(tmp_path, monkeypatch):
    base = load(tmp_path)
    model, batch = with_lora(base), make_batch()
    kernels.enable_varlen_attention(base.model)
    expected = loss_and_gradients(base, model, **batch)
    model = model.unload()
    call = native.NativeKernels.call

    def wrong(self, name, dtype, *arguments):
        if name != "swiglu_backward":
            call(self, name, dtype, *arguments)

    monkeypatch.setattr(native.NativeKernels, "call", wrong)
    assert packing_checks.try_fused_blocks(base) is None
    assert torch.equal(loss_and_gradients(base, with_lora(base), **batch)[0], expected[0])


def test_trains_without_compiler(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "native_kernels", lambda: None)
    monkeypatch.setattr(fused_blocks, "native_kernels", lambda: None)
    base = load(tmp_path)
    assert packing_checks.try_fused_blocks(base) is None
    model = with_lora(base)
    assert loss_and_gradients(base, model, **make_batch(cu_seqlens=False))[0].isfinite().all()


def test_lengths_share_products(tmp_path, monkeypatch):
    """oneDNN compiles and keeps a product for each shape, without end if each length has its own."""
    base = load(tmp_path)
    model, shapes = with_lora(base), []
    assert kernels.enable_varlen_attention(base.model)
    assert fused_blocks.enable_fused_blocks(base.model)
    bmm = torch.bmm
    monkeypatch.setattr(
        torch, "bmm", lambda a, b, **out: (shapes.append((a.shape, b.shape)), bmm(a, b, **out))[1]
    )
    for length in range(33, 49):
        row = torch.arange(1, 1 + length).int().numpy()
        loss_and_gradients(base, model, **packing.collate([[row, row[:7]]], 0, cu_seqlens=True, pad_to_step=True))
    assert len(shapes) >= 16 * 2 * 6
    assert len({*shapes}) == 2 * 3  # rows of up to 32 and of up to 64 tokens


def test_padding_of_rows_is_small():
    lengths = range(32, 5000)
    padded = [fused_blocks._padded_length(length) for length in lengths]
    assert all(
        length <= size <= max(length + 31, length * 9 / 8) for length, size in zip(lengths, padded, strict=True)
    )
    assert len({size for size in padded if size <= 4096}) == 16 + 3 * 8
