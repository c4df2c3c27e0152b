"""Tiny bases for llama.cpp: random adapters, float32 GGUF files, and llama.cpp itself."""

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from lora_tuner.convert.gguf_model import write_model_gguf
from lora_tuner.models import lora
from lora_tuner.models.targets import resolve_target_modules

from . import tiny_models

SEEDS = {
    "gpt2": 50,
    "llama": 67,
    "mistral": 195,
    "qwen2": 55,
}  # of adapters for which greedy decoding has no near ties
LAYERS = dict.fromkeys(SEEDS, ("q_proj", "layers.1.mlp.down_proj")) | {"gpt2": ("attn.c_attn", "1.mlp.c_proj")}
SHAPE = {
    "vocab_size": 320,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def save(folder, kind):
    """Save a random base whose greedy text is printable ASCII: llama.cpp joins tokens of one character."""
    if kind in ("gpt2", "llama"):
        tiny_models.save_model(folder, kind)
    else:
        torch.manual_seed(0)
        if kind == "qwen2":
            model = Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=True, **SHAPE))
        else:
            model = MistralForCausalLM(MistralConfig(tie_word_embeddings=False, head_dim=16, **SHAPE))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(0, 0.5)
                elif parameter.dim() > 1:
                    parameter.mul_(4)
        model.save_pretrained(folder)
        tiny_models.tokenizer().save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    heads = ("lm_head.weight", "transformer.wte.weight", "model.embed_tokens.weight")
    head = next(name for name in heads if name in weights)
    weights[head][list(set(range(320)) - set(printable_ids()))] = 0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def printable_ids():
    """Ids whose text is printable ASCII: llama.cpp reports no log-probabilities of incomplete characters."""
    texts = tiny_models.tokenizer().batch_decode([[number] for number in range(320)])
    return [number for number, text in enumerate(texts) if number and text.isascii() and text.isprintable()]


def adapt(folder, out, **settings):
    """Save a random adapter on all layers. Values of patterns come without keys: those are LAYERS."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    for key in ("rank_pattern", "alpha_pattern"):
        if key in settings:
            settings[key] = dict(zip(LAYERS[folder.name], settings[key], strict=False))
    config = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=resolve_target_modules(model, "auto").names,
        fan_in_fan_out=model.config.model_type == "gpt2",
        **{"r": 4, "lora_alpha": 8} | settings,
    )
    wrapped = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(SEEDS.get(folder.name, 1))
    tensors = {
        name: 0.2 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in lora.adapter_state_dict(wrapped).items()
    }
    lora.save_adapter_files(tensors, wrapped.peft_config[lora.ADAPTER_NAME], out)
    return out


def convert(folder, out):
    """Write a base folder as float32 GGUF."""
    write_model_gguf(folder, out, "float32")
    return out


class LlamaCpp:
    """llama.cpp with a base and at most one adapter, in float32 and without flash attention."""

    def __init__(self, base, adapter=None, context=tiny_models.CONTEXT):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(base)
        params.n_ctx, params.n_parallel, params.verbosity = context, 1, -1
        params.warmup = params.fit_params = False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if adapter is not None:
            loaded = xllamacpp.CommonAdapterLoraInfo()
            loaded.path, loaded.scale = str(adapter), 1.0
            params.lora_adapters = [loaded]
        self.server = xllamacpp.Server(params)  # raises RuntimeError for unsupported files

    def greedy(self, prompt, tokens, *, scale=1.0, top=1):
        """The text, and for each token its id and the log-probabilities of the `top` most likely ids."""
        request = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "logprobs": top}
        response = self.server.handle_completions(request | {"lora": [{"id": 0, "scale": scale}]})["choices"][0]
        tokens_with_top = []
        for token in response["logprobs"]["content"]:
            top_logprobs = {candidate["id"]: candidate["logprob"] for candidate in token["top_logprobs"]}
            tokens_with_top.append((token["id"], top_logprobs))
        return response["text"], tokens_with_top

    def greedy_ids(self, prompt, tokens, allowed):
        """The likeliest ids among the allowed ones, and the log-probabilities of all at each step."""
        banned = [[number, False] for number in set(range(320)) - set(allowed)]
        request = {
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "logprobs": 320,
            "logit_bias": banned,
        }
        steps = self.server.handle_completions(request)["choices"][0]["logprobs"]["content"]
        top = [{candidate["id"]: candidate["logprob"] for candidate in step["top_logprobs"]} for step in steps]
        return [step["id"] for step in steps], [[logprobs[number] for number in range(320)] for logprobs in top]
