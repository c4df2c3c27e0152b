"""Kernels compute what transformers and PEFT compute, within rounding."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, GemmaConfig, GemmaForCausalLM, MistralConfig, MistralForCausalLM

from lora_tuner import ModelOptions, TrainConfig
from lora_tuner.data import packing
from lora_tuner.models import kernels, lm_head, lora
from lora_tuner.models.loading import load_base
from lora_tuner.models.resolve import find_base
from lora_tuner.training.setup import prepare_training

from ..model_families import FAMILIES, make_family

STEPS = 50


@pytest.fixture
def base(model_folder):
    return load_base(find_base(str(model_folder)), ModelOptions(device="cpu", dtype="float32"))


def random_rows(count, seed=0):
    """Token ids of rows of 3 to 29 tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(3, 30, (1,), generator=generator))
        rows.append(torch.randint(1, 300, (length,), generator=generator).int().numpy())
    return rows


def test_loss_curve_matches_transformers_and_peft(model_folder, reviews_csv):
    """The same batches through unchanged transformers and PEFT; both learn."""
    config = TrainConfig(
        base=str(model_folder),
        dataset=str(reviews_csv),
        max_length=64,
        rank=4,
        batch_size=2,
        max_steps=1,
        eval_rows=8,
    )
    setup = prepare_training(config)
    assert setup.varlen_attention
    assert setup.base.lm_head.skipped
    lora.save_adapter_files(
        lora.adapter_state_dict(setup.model),
        setup.model.peft_config[lora.ADAPTER_NAME],
        reviews_csv.parent / "start",
    )
    stock = AutoModelForCausalLM.from_pretrained(model_folder)
    for module in stock.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    plain = PeftModel.from_pretrained(stock, reviews_csv.parent / "start", is_trainable=True).train()
    model = setup.model.train()
    items = [setup.sequences[i] for i in range(len(setup.sequences))]
    curves = []
    for trained in (model, plain):
        optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=5e-3)
        curve = []
        for step in range(STEPS):
            step_items = [items[(2 * step + i) % len(items)] for i in range(2)]
            batch = setup.collate(step_items) if trained is model else packing.collate(step_items, 0)
            labels = batch.pop("labels")
            if trained is model:
                with setup.base.lm_head.skip_lm_head():
                    output = trained(**batch, use_cache=False).logits
                nll = setup.base.lm_head.nll(output, labels)
            else:
                logits = trained(**batch, use_cache=False).logits
                nll = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
            loss = nll.sum() / (labels != packing.IGNORE_INDEX).sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
        curves.append(torch.tensor(curve))
    curve, expected = curves
    assert curve[-5:].mean() < curve[:5].mean() - 0.1
    torch.testing.assert_close(curve, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("chunk", [7, 64, 512])
def test_chunked_loss_matches_full_cross_entropy(base, monkeypatch, chunk):
    monkeypatch.setattr(lm_head, "CHUNK", chunk)
    torch.manual_seed(0)
    head = lm_head.ChunkedLMHead(base.model)
    weight = head.module.weight
    labels = torch.randint(0, len(weight), (3, 25))
    labels[:, 0] = labels[1, 10:] = packing.IGNORE_INDEX
    loss_weights = torch.rand(3, 25)
    hidden = torch.randn(3, 25, weight.shape[1], requires_grad=True)
    expected_hidden = hidden.detach().clone().requires_grad_()
    nll = head.nll(hidden, labels)
    (nll * loss_weights).sum().backward()
    next_tokens = F.pad(labels[:, 1:], (0, 1), value=packing.IGNORE_INDEX)
    expected = F.cross_entropy(
        (expected_hidden @ weight.T).flatten(0, 1), next_tokens.flatten(), reduction="none"
    ).view(3, 25)
    (expected * loss_weights).sum().backward()
    torch.testing.assert_close(nll, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(hidden.grad, expected_hidden.grad, atol=1e-6, rtol=1e-5)
    assert (nll == 0).sum() >= (next_tokens == packing.IGNORE_INDEX).sum()


def test_tiny_probability_has_exact_loss(base):
    head = lm_head.ChunkedLMHead(base.model)
    hidden = (head.module.weight[7] * 1e5)[None, None].repeat(1, 2, 1)
    logits = hidden[0, 0] @ head.module.weight.T
    least_likely = int(logits.argmin())
    nll = head.nll(hidden, torch.tensor([[packing.IGNORE_INDEX, least_likely]]))
    assert nll[0, 0].item() == pytest.approx((logits.max() - logits.min()).item(), rel=1e-5)
    assert nll[0, 0] > 200


def test_custom_head_is_not_skipped(base):
    class ScaledLinear(nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden) * 2

    head = base.model.get_output_embeddings()
    scaled = ScaledLinear(head.in_features, head.out_features, bias=False)
    scaled.weight = head.weight
    ids = torch.arange(1, 20)[None]
    for custom in (scaled, nn.Linear(head.in_features, head.out_features)):
        base.model.set_output_embeddings(custom)
        chunked_head = lm_head.ChunkedLMHead(base.model)
        assert not chunked_head.skipped
        with chunked_head.skip_lm_head(), torch.no_grad():
            nll = chunked_head.nll(base.model(ids).logits, ids)
        logits = base.model(ids).logits[0, :-1]
        torch.testing.assert_close(nll[0, :-1], F.cross_entropy(logits, ids[0, 1:], reduction="none"))


def test_capped_logits_keep_the_head(base, monkeypatch):
    """Soft caps as in Gemma 2; Cohere scales its logits."""
    model_class = type(base.model)
    forward = model_class.forward

    def capped(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = 3 * torch.tanh(output.logits / 3)
        return output

    monkeypatch.setattr(model_class, "forward", capped)
    assert not lm_head.ChunkedLMHead(base.model).skipped


def test_error_restores_lm_head(base):
    head = lm_head.ChunkedLMHead(base.model)
    with pytest.raises(KeyError), head.skip_lm_head():
        raise KeyError
    assert base.model(torch.tensor([[1, 2]])).logits.shape[-1] == 320


def test_head_probe_leaves_model_unchanged(model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder).train()  # dropout is active
    torch.manual_seed(3)
    assert lm_head.ChunkedLMHead(model).skipped
    assert model.training
    after_probe = torch.rand(1)
    torch.manual_seed(3)
    assert after_probe == torch.rand(1)


def test_varlen_attention_matches_masked_attention(model_folder):
    """Several rows per sequence, several sequences, forward and backward, against transformers' mask."""
    config = TrainConfig(base=str(model_folder), rank=4)
    items = [random_rows(3), random_rows(2, seed=1), random_rows(4, seed=2)]
    results = []
    for varlen in (True, False):
        base = load_base(find_base(str(model_folder)), ModelOptions(device="cpu", dtype="float32"))
        torch.manual_seed(0)
        model = lora.add_lora(base, config)
        assert not varlen or kernels.enable_varlen_attention(base.model)
        batch = packing.collate(items, 0, cu_seqlens=varlen)
        labels = batch.pop("labels")
        logits = model(**batch, use_cache=False).logits
        logits[labels != packing.IGNORE_INDEX].logsumexp(-1).sum().backward()
        gradients = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
        results.append((logits[labels != packing.IGNORE_INDEX], gradients))
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-4)


def test_collate_returns_row_boundaries():
    batch = packing.collate([random_rows(2), random_rows(3, seed=1)], 0, cu_seqlens=True)
    lengths = [len(row) for row in (*random_rows(2), *random_rows(3, seed=1))]
    width = batch["input_ids"].shape[1]
    starts = [0, lengths[0], width, width + lengths[2], width + lengths[2] + lengths[3], 2 * width]
    assert batch["cu_seq_lens_q"].tolist() == starts
    assert batch["position_ids"].flatten()[starts[:-1]].tolist() == [0] * 5


def test_sliding_window_disables_varlen_attention():
    size = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    assert not kernels.enable_varlen_attention(
        MistralForCausalLM(MistralConfig(sliding_window=8, **size, **heads))
    )
    model = MistralForCausalLM(MistralConfig(sliding_window=None, **size, **heads))
    assert kernels.enable_varlen_attention(model)
    kernels.enable_varlen_attention(model, on=False)
    assert model.config._attn_implementation == "sdpa"


def test_fused_modules_give_same_logits(model_folder):
    stock = AutoModelForCausalLM.from_pretrained(model_folder)
    fused = load_base(find_base(str(model_folder)), ModelOptions(device="cpu", dtype="float32")).model
    classes = {type(module).__name__ for module in fused.modules()}
    assert not classes & {"LlamaRMSNorm", "NewGELUActivation"}
    ids = torch.arange(1, 40)[None]
    torch.testing.assert_close(fused(ids).logits, stock.eval()(ids).logits, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(fused.train()(ids).logits, fused.eval()(ids).logits, atol=0, rtol=0)  # no dropout
    assert {name for name, _ in fused.named_parameters()} == {name for name, _ in stock.named_parameters()}


def test_gemma_norm_is_not_fused():
    """Gemma multiplies by 1 + weight."""
    size = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 8}
    model = GemmaForCausalLM(GemmaConfig(num_attention_heads=4, num_key_value_heads=2, **size)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    ids = torch.arange(1, 20)[None]
    before = model(ids).logits
    kernels.fuse_modules(model)
    torch.testing.assert_close(model(ids).logits, before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_fused_lora_matches_peft(model_folder, dropout):
    config = TrainConfig(base=str(model_folder), rank=4, dropout=dropout)
    ids = torch.arange(1, 30)[None]
    results = []
    for fused in (True, False):
        base = load_base(find_base(str(model_folder)), ModelOptions(device="cpu", dtype="float32"))
        torch.manual_seed(0)
        model = lora.add_lora(base, config).train()
        patched = [layer for layer in model.modules() if "forward" in vars(layer)]
        assert bool(patched) == (dropout == 0)
        if not fused:
            for layer in patched:
                del layer.forward
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.05)
        torch.manual_seed(1)
        logits = model(ids).logits
        logits.square().mean().backward()
        results.append((logits, [p.grad for p in model.parameters() if p.requires_grad]))
        with model.disable_adapter():
            plain = model(ids).logits
        reloaded = load_base(base.files, ModelOptions(device="cpu", dtype="float32"))
        torch.testing.assert_close(plain, reloaded.model(ids).logits)
        assert (plain - logits).abs().max() > 1e-3
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)


def test_bfloat16_gradients_match_float32(model_folder):
    """The loss, and the direction of every gradient."""
    items = [random_rows(3), random_rows(2, seed=1)]
    results = []
    for dtype in ("bfloat16", "float32"):
        base = load_base(find_base(str(model_folder)), ModelOptions(device="cpu", dtype=dtype))
        torch.manual_seed(0)
        model = lora.add_lora(base, TrainConfig(base=str(model_folder), rank=4)).train()
        assert kernels.enable_varlen_attention(base.model)
        batch = packing.collate(items, 0, cu_seqlens=True)
        labels = batch.pop("labels")
        with base.lm_head.skip_lm_head():
            output = model(**batch, use_cache=False).logits
        loss = base.lm_head.nll(output, labels).sum() / (labels != packing.IGNORE_INDEX).sum()
        loss.backward()
        results.append((loss.item(), [p.grad.flatten() for n, p in model.named_parameters() if "lora_B" in n]))
    (loss, gradients), (expected_loss, expected_gradients) = results
    assert loss == pytest.approx(expected_loss, rel=0.02)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == torch.float32
        assert F.cosine_similarity(gradient, expected, 0) > 0.98


def test_collate_follows_varlen_setting(model_folder, reviews_csv):
    setup = prepare_training(
        TrainConfig(base=str(model_folder), dataset=str(reviews_csv), max_length=64, max_steps=1, eval_rows=4)
    )
    assert "cu_seq_lens_q" in setup.collate([setup.sequences[0]])
    assert "cu_seq_lens_q" not in dataclasses.replace(setup, varlen_attention=False).collate([setup.sequences[0]])


def test_gated_and_head_norms_stay():
    class GatedNorm(nn.Module):
        def __init__(self, shape):
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.ones(shape)), 1e-6

        def forward(self, hidden, gate=None):
            return F.rms_norm(hidden, (hidden.shape[-1],), eps=self.variance_epsilon) * (
                1 if gate is None else gate
            )

    class HeadNorm(GatedNorm):
        def forward(self, hidden):
            return F.rms_norm(hidden, (hidden.shape[-1],), eps=self.variance_epsilon) * self.weight

    for norm in (GatedNorm(8), HeadNorm((2, 8))):
        model = nn.Sequential(norm)
        kernels.fuse_modules(model)
        assert model[0] is norm


def test_dropout_attributes_are_zeroed(tmp_path):
    from ..inference.test_multi_lora import save_opt

    model = load_base(
        find_base(str(save_opt(tmp_path / "opt"))), ModelOptions(device="cpu", dtype="float32")
    ).model.train()
    ids = torch.arange(1, 20)[None]
    torch.testing.assert_close(model(ids).logits, model(ids).logits, atol=0, rtol=0)


def test_upcast_logits_skip_head_in_bfloat16(model_folder, monkeypatch):
    base = load_base(find_base(str(model_folder)), ModelOptions(device="cpu", dtype="bfloat16"))
    model_class = type(base.model)
    forward = model_class.forward

    def upcast(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = output.logits.float()
        return output

    monkeypatch.setattr(model_class, "forward", upcast)
    head, ids = lm_head.ChunkedLMHead(base.model), torch.arange(1, 20)[None]
    with head.skip_lm_head(), torch.no_grad():
        nll = head.nll(base.model(ids).logits, ids)
    expected = F.cross_entropy(base.model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
    torch.testing.assert_close(nll[0, :-1], expected, atol=0.1, rtol=0.02)


def test_window_in_text_config_disables_varlen_attention():
    model = make_family("gemma3")
    assert not kernels.has_full_attention(model)
    assert not kernels.enable_varlen_attention(model)
    full = make_family(
        "gemma3", text_config=FAMILIES["llama"] | {"layer_types": ["full_attention"] * 2, "sliding_window": None}
    )
    assert kernels.has_full_attention(full)
