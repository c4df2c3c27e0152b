"""Files of data and what is in them: what tests of tables and of data share, beside conftest's `load` and `refusal`."""

import json

from . import tiny_models

TEXTS = tiny_models.reviews(30)


def rows(corpus):
    return sorted(corpus.train + corpus.held_out)


def table(texts=TEXTS, header=("text", "label"), separator=","):
    """A table as text: each text with its number modulo 2."""
    lines = [separator.join(header), *(f"{text}{separator}{number % 2}" for number, text in enumerate(texts))]
    return "\n".join(lines) + "\n"


def jsonl(records):
    return "".join(json.dumps(record) + "\n" for record in records)
