"""Tokenizers in GGUF files: llama.cpp gives the token ids that transformers gives."""

import json
import urllib.request

import gguf
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lora_tuner.convert.gguf_model import write_model_gguf
from lora_tuner.convert.gguf_tokenizer import _PRE_TOKENIZERS
from lora_tuner.errors import BaseModelError

from .. import gguf_base, tiny_models
from ..parameters import sampled

END = tiny_models.END
TEXTS = [
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 ✅ 🦙🦙 3 33 3333 33333 3.3 3..3 កាន់តែ 😁 ?我想在apple工作1314151天～",
    "------======= нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've 'told HE'LL we'Ve a'lL ABCdef XYZ",
    "Hello WORLD!\r\n a\tb c   d _x_ (y) naïve café हिन्दी e\u0301 https://a.b/c?d=e&f x/y//z\n/ “quotes”… {json: 1}",
    f"  two spaces{END}hi <tool> a<tool>",
    *tiny_models.reviews(3, seed=4),
]
TRAINING = [*tiny_models.reviews(60, seed=5), *TEXTS[:3] * 4]


def _split(expression):
    return pre_tokenizers.Split(Regex(expression), "isolated")


def pre_tokenizer(expressions):
    """A pre-tokenizer of transformers for the regular expressions of llama.cpp."""
    steps = {
        "gpt-2": [],
        "smollm": [pre_tokenizers.Digits(individual_digits=True)],
        "falcon": [pre_tokenizers.Punctuation("contiguous")],
    }
    name = _PRE_TOKENIZERS[expressions]
    if name not in steps:
        return pre_tokenizers.Sequence([*map(_split, expressions[0]), _byte_level(use_regex=False)])
    digits = [_split("[0-9][0-9][0-9]")] if name == "falcon" else []
    return pre_tokenizers.Sequence([*steps[name], _byte_level(), *digits])


def _byte_level(**settings):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, **settings)


def byte_level_tokenizer(pre, *, ignore_merges=False, normalizer=None):
    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer, backend.decoder, backend.normalizer = pre, decoders.ByteLevel(), normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TRAINING,
        trainers.BpeTrainer(vocab_size=420, special_tokens=[END], initial_alphabet=alphabet, show_progress=False),
    )
    backend.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=END, eos_token=END)


def sentencepiece_tokenizer(normalizer, pre, *, drop=0, template=None):
    """A tokenizer like those that transformers makes of SentencePiece models: all merges, in order of the ids."""
    words = sorted({word for text in TEXTS for word in text.replace(" ", "\n▁").split("\n")} - {""})
    pieces = sorted(
        {word[: 2**size] for word in words for size in (1, 2, 3)} - {"<"}, key=lambda word: (len(word), word)
    )
    characters = sorted(
        {character for text in TEXTS[:3] for character in text.replace(" ", "▁") if character.isascii()} | {"▁"}
    )
    specials, numbers = ["<unk>", "<s>", "</s>"], [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = [piece for piece in ["▁▁", *pieces] if len(piece) > 1 and set(piece) <= set(characters)]
    vocabulary = {token: number for number, token in enumerate([*specials, *numbers, *pieces, *characters])}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    backend = Tokenizer(
        models.BPE(vocabulary, merges[drop:], byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    )
    backend.normalizer, backend.pre_tokenizer = normalizer, pre
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens([AddedToken(END, normalized=False)])
    backend.add_tokens([AddedToken(token, normalized=False) for token in ("<tool>", "▁▁")])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **names)


@pytest.fixture
def write(tmp_path):
    """Write a small Llama with a tokenizer as GGUF; gives the tokenizer, the file and the notices."""

    def written(tokenizer, rows=5):
        config = LlamaConfig(
            hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=len(tokenizer) + rows,
            tie_word_embeddings=True, max_position_embeddings=512,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        notices = []
        write_model_gguf(
            tmp_path / "base", tmp_path / "base.gguf", notify=lambda notice: notices.append(notice.text)
        )
        return AutoTokenizer.from_pretrained(tmp_path / "base"), tmp_path / "base.gguf", notices

    return written


def llama_cpp_ids(address, text):
    body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
    request = urllib.request.Request(f"{address}/tokenize", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        return json.load(response)["tokens"]


def differing_texts(tokenizer, path):
    pytest.importorskip("xllamacpp")
    server = gguf_base.LlamaCpp(path).server
    return [
        text for text in TEXTS if tokenizer(text)["input_ids"] != llama_cpp_ids(server.listening_address, text)
    ]


@pytest.mark.parametrize("expressions", sampled([(key,) for key in _PRE_TOKENIZERS], 5))
def test_byte_level_ids_equal_in_llama_cpp(write, expressions):
    tokenizer = byte_level_tokenizer(pre_tokenizer(expressions), ignore_merges=expressions[1])
    tokenizer, path, notices = write(tokenizer)
    marks = "llama.cpp splits words at combining marks (those of Hindi, e.g.), where this tokenizer does not."
    without_marks = _PRE_TOKENIZERS[expressions] in ("tekken", "gpt-4o")
    assert notices == ([marks] if without_marks else [])
    assert differing_texts(tokenizer, path) == ([TEXTS[2]] if without_marks else [])


LLAMA_2 = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
GEMMA = normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous")
CHAT = "{% for m in messages %}{{ bos_token }}{{ m.content }}{% endfor %}"
FIRST_NOTICE = "llama.cpp puts a space before a text that begins with one and after special tokens, as this tokenizer does not."


@pytest.mark.parametrize(
    ("normalizer", "pre", "template", "differing", "notices"),
    sampled(
        [
            (*GEMMA, None, [], []),
            (LLAMA_2, None, None, [], []),
            (None, pre_tokenizers.Metaspace("▁", "never", split=False), None, [], []),
            (None, pre_tokenizers.Metaspace("▁", "first", split=False), None, [TEXTS[3]], [FIRST_NOTICE]),
            (
                *(None, pre_tokenizers.Metaspace("▁", "always", split=False), None, [TEXTS[3]]),
                ["llama.cpp puts a space before a text that begins with one, as this tokenizer does not."],
            ),
            (
                *(None, pre_tokenizers.Metaspace("▁", "first", split=False), CHAT),
                [text for text in TEXTS if not text.startswith(" ")],
                ["llama.cpp puts no space before a text, as this tokenizer does outside of conversations."],
            ),
        ],
        6,
    ),
)
def test_sentencepiece_ids_equal_in_llama_cpp(write, normalizer, pre, template, differing, notices):
    tokenizer, path, told = write(sentencepiece_tokenizer(normalizer, pre, template=template))
    assert told == notices
    assert differing_texts(tokenizer, path) == differing
    types = gguf.GGUFReader(path).fields["tokenizer.ggml.token_type"].contents()
    expected = {"<unk>": 2, "<s>": 1, END: 3, "<tool>": 4, "▁▁": 1, "<0x0A>": 6}
    assert {token: types[tokenizer.convert_tokens_to_ids(token)] for token in expected} == expected | {"<s>": 3}
    assert types[-5:] == [5] * 5


def test_unknown_normalizer_or_pre_tokenizer_is_refused(write):
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    spaced = pre_tokenizers.ByteLevel(add_prefix_space=True)
    for tokenizer, message in (
        (
            byte_level_tokenizer(plain, normalizer=normalizers.Lowercase()),
            "normalize text as its tokenizer does (Lowercase).",
        ),
        (
            byte_level_tokenizer(spaced),
            "llama.cpp has no pre-tokenizer like that of its tokenizer (a space before the text, '",
        ),
        (byte_level_tokenizer(plain, ignore_merges=True), "|\\s+(?!\\S), whole words first)."),
        (byte_level_tokenizer(pre_tokenizers.WhitespaceSplit()), "like that of its tokenizer (WhitespaceSplit)."),
        (sentencepiece_tokenizer(*GEMMA, drop=1), "has not the merges of a SentencePiece model (▁ and ▁)."),
        (sentencepiece_tokenizer(normalizers.NFKC(), None), "normalize text as its tokenizer does (NFKC)."),
        (
            sentencepiece_tokenizer(None, pre_tokenizers.Metaspace("▁")),
            "split text as its tokenizer does (Metaspace).",
        ),
        (sentencepiece_tokenizer(None, None), "does not write spaces as ▁, as those of llama.cpp do."),
    ):
        with pytest.raises(BaseModelError) as error:
            write(tokenizer)
        assert message in str(error.value)
