"""Show training rows as the model sees them: text, tokens, and which of them are learned."""

from dataclasses import dataclass

from ..config import TrainConfig
from ..data import chat, packing, splitting, tokenization
from ..data.dataset import describe_data
from ..errors import EventHandler, Notice, ignore_events
from ..models import loading
from ..models.added_tokens import extend_tokenizer
from ..models.tokenizer import TokenizedBase, load_tokenizer
from .inputs import load_parent, load_rows, model_options


@dataclass(frozen=True)
class PreviewedRow:
    """A training row as the model sees it. `labels` marks the tokens that are learned."""

    before: str
    after: str
    tokens: list[str]
    labels: list[bool]


def preview(requested: TrainConfig, count: int, notify: EventHandler = ignore_events) -> list[PreviewedRow]:
    """Return the first `count` training rows as the model sees them. Loads no weights."""
    parent = load_parent(requested)
    files = loading.base_for_adapter(parent, model_options(requested, notify))
    base = TokenizedBase(files, tokenizer := load_tokenizer(files))
    if requested.add_tokens or (parent is not None and parent.replaced.rows):
        extend_tokenizer(base, requested.add_tokens, parent)
    dataset = load_rows(requested, parent, notify)
    for line in describe_data(dataset, requested):
        notify(Notice(line))
    previews: list[PreviewedRow] = []
    invalid: tokenization.InvalidRows = {}
    for before, after in dataset.previews:
        if len(previews) == count:
            break
        tokens: list[str] = []
        labels: list[bool] = []
        pieces, _ = tokenization.encode_rows(
            tokenizer, [after], requested.max_length, requested.long_rows, invalid
        )
        if after in invalid:
            continue
        for piece in pieces:
            batch = packing.collate([[piece]], tokenizer.pad_token_id)
            tokens += tokenizer.batch_decode(batch["input_ids"][0, :, None])
            labels += (batch["labels"][0] != packing.IGNORE_INDEX).tolist()
        text = chat.plain_text(after).removeprefix(chat.CHAT_MARK).removesuffix(splitting.GOES_ON)
        previews.append(PreviewedRow(before, text, tokens, labels))
    dataset.leave_out(invalid, requested.max_invalid, notify)
    return previews
