"""Contents of data files for tests, beside the fixtures `load` and `refusal`."""

import json

from . import tiny_models

TEXTS = tiny_models.reviews(30)


def rows(dataset):
    return sorted(dataset.train + dataset.held_out)


def table(texts=TEXTS, header=("text", "label"), separator=","):
    """Return a csv file of texts, each labelled with its number modulo 2."""
    lines = [separator.join(header), *(f"{text}{separator}{number % 2}" for number, text in enumerate(texts))]
    return "\n".join(lines) + "\n"


def jsonl(records):
    return "".join(json.dumps(record) + "\n" for record in records)
