"""Assign each row to the training or the held-out side by a hash of its text."""

import hashlib

from . import chat

HELD_OUT_SHARE = 0.2


def row_hash(text: str, salt: str) -> bytes:
    """The hash by which a cleaned row is known: it decides the side of the split and the order of held-out rows.

    Line breaks count as spaces: with and without `keep_lines` a row is on the same side. Of a conversation all counts.
    """
    same = text if chat.is_chat(text) else " ".join(text.split())
    return hashlib.sha256(f"{salt}\0{same}".encode()).digest()


def is_held_out(digest: bytes) -> bool:
    return int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64


def content_hash(texts: list[str]) -> str:
    """The name of a list of rows, in this order: sha256 over the sha256 of each."""
    return hashlib.sha256(b"".join(hashlib.sha256(text.encode()).digest() for text in texts)).hexdigest()
