"""Assign each row to the training or the held-out side by a hash of its text."""

import hashlib

from . import chat

HELD_OUT_SHARE = 0.2


def row_hash(text: str, salt: str) -> bytes:
    """Return the hash of a cleaned row. It decides the split and the order of held-out rows.

    Line breaks count as spaces, so that `keep_lines` does not move a row. Of a conversation every
    character counts.
    """
    normalized = text if chat.is_chat(text) else " ".join(text.split())
    return hashlib.sha256(f"{salt}\0{normalized}".encode()).digest()


def is_held_out(digest: bytes) -> bool:
    return int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64


def content_hash(texts: list[str]) -> str:
    """Return the hash of a list of rows in this order: the sha256 over the sha256 of each."""
    return hashlib.sha256(b"".join(hashlib.sha256(text.encode()).digest() for text in texts)).hexdigest()
