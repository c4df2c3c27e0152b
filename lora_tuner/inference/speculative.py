"""Speculative decoding: a quantized draft of the base proposes tokens, the base verifies them."""

from .cpu_decoder import CpuDecoder, KVCache
from .multi_lora import BatchedLora
from .sequence import Sequence


class DraftDecoder:
    """Writes ahead with the draft of a decoder, for one row. The decoder has the last word on every token, so the text is its
    own; it only reads its weights once for several tokens. Stops for good where it guesses badly."""

    def __init__(self, decoder: CpuDecoder, mix: BatchedLora, row: Sequence) -> None:
        self.decoder = decoder
        self.mix = mix
        self.row = row
        self.rounds, self.accepted = 0, 0

    def propose(self, cache: KVCache) -> int:
        """Put guesses behind the tokens of the row, and say how many."""
        draft = self.decoder.draft  # made when it is first asked for, so after the first token
        if draft is None or (self.rounds > 8 and self.accepted < 2 * self.rounds):
            return 0
        self.rounds += 1
        end = self.row.length
        count: int = min(self.decoder.guesses, self.row.max_new_tokens - len(self.row.output_ids) - 1)
        for place in range(end, end + count):
            logits = draft.forward(self.row.ids[:, place - 1 : place], cache, self.mix)[0, -1]
            self.row.set_token(place, self.row.choose_token(place, logits))
        cache.used -= count
        return count
