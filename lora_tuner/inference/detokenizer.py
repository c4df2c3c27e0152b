"""Turn token ids into text one token at a time."""

from collections.abc import Iterable
from typing import Any

CONTEXT_TOKENS = 6  # tokens at least that new ones are decoded with: some tokenizers drop a leading space


class IncrementalDetokenizer:
    """Token ids to text, as they come. `sure` is what no stop string can take back, and all that another thread may read."""

    def __init__(self, tokenizer: Any, prompt: list[int], stop: Iterable[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop = list(stop)
        self.text = self.stable_text = ""
        self.stopped = False
        self._known = [list(prompt[-CONTEXT_TOKENS:])]  # what was decoded together: whole characters
        while len(self._known[0]) < len(prompt) and self._decode(self._known)[:1] in ("", "\ufffd"):
            self._known = [list(prompt[-2 * len(self._known[0]) :])]  # it began within a character, or has no text
        self._before = self._decode(self._known)
        self._open: list[int] = []  # tokens whose last character may lack bytes

    def _decode(self, parts: list[list[int]]) -> str:
        ids = [token for part in parts for token in part]
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def append(self, token: int) -> None:
        self._open.append(token)
        found = self._decode([*self._known, self._open])
        if not found.endswith("\ufffd"):
            self._settle(found)

    def finish(self) -> None:
        """No token comes any more."""
        if self._open and not self.stopped:
            self._settle(self._decode([*self._known, self._open]))

    def _settle(self, found: str) -> None:
        start, whole = len(self.text), self.text + found[len(self._before) :]
        self._known.append(self._open)
        self._before, self._open = found, []
        while sum(map(len, self._known[1:])) >= CONTEXT_TOKENS and (before := self._decode(self._known[1:])):
            self._before, self._known = before, self._known[1:]
        ends = [whole.find(stop, max(0, start - len(stop) + 1)) for stop in self.stop]
        if ends := [end for end in ends if end >= 0]:
            whole, self.stopped = whole[: min(ends)], True
        held = 0 if self.stopped else max((len(stop) - 1 for stop in self.stop), default=0)
        self.text, self.stable_text = whole, whole[: max(len(whole) - held, 0)]
