"""Speculative decoding: a quantized draft of the base proposes tokens, the base verifies them."""

from .cpu_decoder import CpuDecoder
from .interface import Cache, DecoderInterface, LoraForBatch
from .sequence import Sequence


class DraftDecoder:
    """Propose draft tokens for a single sequence.

    The base still chooses every token, so the output does not change; it reads its weights once for
    several tokens. Drafting stops for good when too few draft tokens are accepted.
    """

    def __init__(self, decoder: CpuDecoder, lora: LoraForBatch, sequence: Sequence) -> None:
        self.decoder = decoder
        self.lora = lora
        self.sequence = sequence
        self.rounds, self.accepted = 0, 0

    def propose(self, cache: Cache) -> int:
        """Write draft tokens behind the tokens of the sequence. Returns their number."""
        draft: DecoderInterface | None = self.decoder.draft_model  # quantized on first use
        if draft is None or (self.rounds > 8 and self.accepted < 2 * self.rounds):
            return 0
        self.rounds += 1
        sequence, end = self.sequence, self.sequence.length
        count = min(self.decoder.draft_tokens, sequence.max_new_tokens - len(sequence.output_ids) - 1)
        for position in range(end, end + count):
            logits = draft.forward(sequence.token_ids[:, position - 1 : position], cache, self.lora)[0, -1]
            sequence.set_token(position, sequence.choose_token(position, logits))
        cache.used -= count
        return count
