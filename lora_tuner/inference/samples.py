"""Continue a few prompts with a base in memory as it is now, such as one in training.

The base is neither loaded again nor changed, and the random state is left alone. Price: generating
uses transformers' layers, which are slower than CpuDecoder, as that rearranges the weights.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from ..config import SamplingParams
from ..data import chat_template, tokenization
from ..errors import ContextLengthError
from ..models import kernels
from ..models.loading import LoadedBase
from .batch import RunningBatch
from .hf_decoder import HFDecoder
from .multi_lora import MultiLora
from .sampling import sequence_seed
from .sequence import Sequence as TokenSequence

MAX_NEW_TOKENS = 40
SEED = 0


class PromptSampler:
    """Generates for the same prompts again and again, with the settings of `generate` and one seed.

    Args:
        base: the base; LoRA layers that are in it take part.
        prompts: texts to continue.
        chat: ask them through the chat template.

    Raises:
        LoraTunerError: a prompt does not fit into the context, or the template refuses it.
    """

    def __init__(self, base: LoadedBase, prompts: Sequence[str], *, chat: bool) -> None:
        self.base, self.sampling = base, SamplingParams(seed=SEED, max_new_tokens=MAX_NEW_TOKENS)
        self.token_ids = [self._encode(prompt, chat=chat) for prompt in prompts]
        base.check_token_ids(map(np.array, self.token_ids))
        if max(map(len, self.token_ids)) >= base.max_context:
            raise ContextLengthError(f"a prompt fills the context of {base.max_context:,} tokens")
        self.multi_lora = MultiLora(base)
        self.are_cut = [False] * len(prompts)  # of the last texts, those that a limit has ended
        self.decoder: HFDecoder | None = None  # made with the first texts, as it computes

    def _encode(self, prompt: str, *, chat: bool) -> list[int]:
        tokenizer = self.base.tokenizer
        if not chat:
            (encoded,) = tokenization.encode_texts(tokenizer, [prompt], add_eos=False)
            token_ids: list[int] = encoded.tolist()
            return token_ids
        text = chat_template.render_prompt(tokenizer, [{"role": "user", "content": prompt}])
        token_ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return token_ids

    def generate(self, seconds: float) -> list[str]:
        """Return the text for each prompt; what is not ready after some seconds is cut off.

        Raises GenerationError for logits that are not finite.
        """
        sequences = [
            TokenSequence(self.base, token_ids, self.sampling, sequence_seed(SEED, 0))
            for token_ids in self.token_ids
        ]
        with generating(self.base), torch.inference_mode():
            self.decoder = self.decoder or HFDecoder(self.base, self.multi_lora)
            batch = RunningBatch(self.decoder, self.multi_lora)
            batch.waiting += sequences
            end = time.monotonic() + seconds
            while batch.sequences and time.monotonic() < end:
                batch.step()
        for sequence in sequences:
            if sequence.error:
                raise sequence.error
            sequence.detokenizer.finish()
        self.are_cut = [sequence.finish_reason != "stop" for sequence in sequences]
        return [sequence.detokenizer.text for sequence in sequences]


@contextlib.contextmanager
def generating(base: LoadedBase) -> Iterator[None]:
    """Turn dropout off in a base in training, and let it take padded rows and a cache."""
    model = base.model
    by_row = model.config.get_text_config()._attn_implementation == kernels.VARLEN_ATTENTION
    training = model.training
    try:
        model.eval()
        if by_row:
            kernels.enable_varlen_attention(model, on=False)
        yield
    finally:
        model.train(training)
        if by_row:
            kernels.enable_varlen_attention(model)
