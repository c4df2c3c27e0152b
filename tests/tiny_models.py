"""Tiny but real models, a tokenizer, and text with patterns to learn."""

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

END = "<|endoftext|>"
CONTEXT = 128


def reviews(count: int, seed: int = 0) -> list[str]:
    """Generate different short texts with a few patterns, in the style of film reviews."""
    draw = random.Random(seed)
    words = {
        "who": ["the actor", "the director", "this film", "the story", "her voice", "the camera"],
        "how": ["never", "always", "hardly", "slowly", "really", "somehow"],
        "does": ["works", "fails", "shines", "drags", "convinces", "falls apart"],
    }
    texts: dict[str, None] = {}
    while len(texts) < count:
        sentences = [
            " ".join(draw.choice(options) for options in words.values()) for _ in range(draw.randint(1, 8))
        ]
        texts[f"{draw.randint(1, 9999)}: {'. '.join(sentences)}."] = None
    return list(texts)


def tokenizer(tags: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer like that of GPT-2, with 320 tokens, some of which may be tags."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        reviews(200, seed=99),
        trainers.BpeTrainer(
            vocab_size=320, special_tokens=[END, *tags], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=END, eos_token=END)


def save_model(
    folder: Path, kind: str, seed: int = 0, width: int = 32, layers: int = 2, context: int = CONTEXT
) -> Path:
    """Save a random GPT-2 or Llama with tied embeddings as a folder that transformers loads."""
    torch.manual_seed(seed)
    size = {"vocab_size": 320, "bos_token_id": 0, "eos_token_id": 0}
    model: GPT2LMHeadModel | LlamaForCausalLM
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_layer=layers, n_embd=width, n_head=4, n_positions=context, **size))
    else:
        shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": context}
        model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, pad_token_id=0, **shape, **heads, **size))
    return save(model, folder)


def save(model: PreTrainedModel, folder: Path) -> Path:
    """Save a random model and a tokenizer, with weights so large that rounding does not decide greedy text."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
