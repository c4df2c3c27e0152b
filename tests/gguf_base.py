"""Tiny bases for llama.cpp: random adapters, conversion to float32 GGUF, and llama.cpp itself."""

import json

import gguf
import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from lora_tuner.models import lora
from lora_tuner.models.targets import resolve_target_modules

from . import tiny_models

ARCHITECTURES = {"gpt2": "gpt2", "llama": "llama", "mistral": "llama", "qwen2": "qwen2"}
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
    texts = tiny_models.tokenizer().batch_decode([[number] for number in range(320)])
    weights[head][
        [number == 0 or not text.isascii() or not text.isprintable() for number, text in enumerate(texts)]
    ] = 0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def adapt(folder, out, **settings):
    """Save a random adapter on all layers. Values of patterns come without keys: those are LAYERS."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    for key in ("rank_pattern", "alpha_pattern"):
        if key in settings:
            settings[key] = dict(zip(LAYERS[folder.name], settings[key], strict=False))
    config = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=resolve_target_modules(model, "auto").names,
        fan_in_fan_out=folder.name == "gpt2",
        **{"r": 4, "lora_alpha": 8} | settings,
    )
    wrapped = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(SEEDS[folder.name])
    tensors = {
        name: 0.2 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in lora.adapter_state_dict(wrapped).items()
    }
    lora.save_adapter_files(tensors, wrapped.peft_config[lora.ADAPTER_NAME], out)
    return out


def convert(folder, out, turn_end=None):
    """Convert a base folder to float32 GGUF, with its byte-level BPE tokenizer, and the id of a turn end."""
    config = json.loads((folder / "config.json").read_text())
    kind = ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(out, kind)
    _shape(writer, config)
    _tokenizer(writer, json.loads((folder / "tokenizer.json").read_text()), config)
    if turn_end is not None:
        writer.add_eot_token_id(turn_end)
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    names = gguf.get_tensor_name_map(architecture, 2)
    for name, tensor in load_file(folder / "model.safetensors").items():
        values = tensor.numpy()
        if kind == "gpt2" and ".c_" in name:  # Conv1D is transposed; a bias does not change
            values = values.T
        if kind == "llama" and (".q_proj." in name or ".k_proj." in name):
            heads = config["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"]
            halves = values.reshape(heads, 2, -1, values.shape[-1])
            values = np.concatenate(
                [np.stack(list(head), axis=1).reshape(-1, values.shape[-1]) for head in halves]
            )
        module, _, part = name.rpartition(".")
        writer.add_tensor(f"{names.get_name(module)}.{part}", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def _shape(writer, config):
    gpt2 = config["model_type"] == "gpt2"
    width, heads = (
        (config["n_embd"], config["n_head"]) if gpt2 else (SHAPE["hidden_size"], SHAPE["num_attention_heads"])
    )
    writer.add_block_count(2)
    writer.add_context_length(tiny_models.CONTEXT)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(4 * width if gpt2 else config["intermediate_size"])
    writer.add_head_count(heads)
    if gpt2:
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])
        return
    size = config.get("head_dim") or width // heads
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def _tokenizer(writer, tokenizer, config):
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    special = {token["id"] for token in tokenizer["added_tokens"]}
    kinds = (gguf.TokenType.NORMAL, gguf.TokenType.CONTROL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([kinds[number in special] for number in range(len(tokens))])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)


def dequantize(path, out):
    """Write a copy of a GGUF file with all tensors in float32, one in memory at a time."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=field.types[-1])
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), 4 * int(tensor.n_elements))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in reader.tensors:
        writer.write_tensor_data(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    writer.close()
    return out


class LlamaCpp:
    """llama.cpp with a base and at most one adapter, in float32 and without flash attention."""

    def __init__(self, base, adapter=None):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(base)
        params.n_ctx, params.n_parallel, params.verbosity = tiny_models.CONTEXT, 1, -1
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
