"""Print what `train --preview` shows: rows as texts and turns, tokens, lengths, dropped copies, prompts."""

from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.text import Text

from ..config import TrainConfig
from ..text import escape_control, format_count, format_rows, one_line
from .data import show_lengths
from .display import print_wrapped, stdout_console

if TYPE_CHECKING:
    from ..analysis.lengths import Lengths
    from ..training.preview import Preview, PreviewedRow

LINE_BREAK = "\u21b5"  # shown where a text has one
_EXCERPT = 100  # characters of a row that is shown as an example


def preview_to_dict(preview: "Preview", config: TrainConfig) -> dict[str, object]:
    """All that `show_preview` prints, for JSON; `lengths` is None where no row is left to train on."""
    lengths = _lengths(preview, config)
    text, place = preview.longest
    return {
        "base": preview.base,
        "rows": [asdict(row) for row in preview.rows],
        "train_rows": preview.train_rows,
        "measured_rows": len(preview.use.row_tokens),
        "lengths": asdict(lengths) if lengths else None,
        "longest": {"text": text, "place": place},
        "duplicates": preview.duplicates,
        "near_duplicates": preview.near_duplicates,
        "dropped": [asdict(copy) for copy in preview.dropped],
        "sample_prompts": preview.sample_prompts,
    }


def _lengths(preview: "Preview", config: TrainConfig) -> "Lengths | None":
    from ..analysis.lengths import describe_lengths

    if not preview.use.row_tokens:
        return None
    return describe_lengths(
        preview.use.row_tokens,
        config.max_length,
        tokenizer=preview.base,
        truncated_rows=preview.use.truncated_rows,
        used_share=preview.use.share,
    )


def show_preview(preview: "Preview", config: TrainConfig) -> None:
    """Print rows and figures. Learned parts are green; without colours they are between \u00ab and \u00bb."""
    console = stdout_console()
    has_colours = console.is_terminal and console.color_system is not None and not console.no_color
    if any(not part.is_learned for row in preview.rows for part in row.parts):
        mark = "green" if has_colours else "between \u00ab and \u00bb"
        what = "What is learned" if not config.learns_preferences else "What is compared"
        print(f"{what} is {mark}.\n")
    for index, row in enumerate(preview.rows):
        print("\n" * (index > 0), end="")
        _show_row(row, config, has_colours)
    lengths = _lengths(preview, config)
    if lengths is None:
        return
    measured = len(preview.use.row_tokens)
    if measured < preview.train_rows:
        rows = format_count(preview.train_rows, "answer" if config.learns_preferences else "row")
        print_wrapped(f"The lengths are those of {measured:,} of {rows} to train on, the longest among them.")
    show_lengths(lengths, measured)
    text, place = preview.longest
    print_wrapped(
        f"longest row: {format_count(lengths.longest, 'token')}, {one_line(place) or 'part of a long text'}: {_excerpt(text)}"
    )
    if preview.dropped:
        _show_dropped(preview)
    if preview.sample_prompts:
        print("\nprompts of the samples while it trains (--sample-prompt):")
        for prompt in preview.sample_prompts:
            print_wrapped(_excerpt(prompt), "  ")


def _show_row(row: "PreviewedRow", config: TrainConfig, has_colours: bool) -> None:
    print(f"row {row.number}{row.side and f', {row.side}'}")
    is_marked = len(row.parts) > 1 or any(part.role for part in row.parts)
    texts: list[tuple[str, Text]] = []
    for part in row.parts:
        texts.append((part.role or "text", _styled(part.text, part.is_learned, is_marked, has_colours)))
    if not any(part.role for part in row.parts):
        texts = [("text", Text().join(text for _, text in texts))]
        if row.before.strip() != row.after.strip():
            texts.insert(0, ("before", _with_marks(row.before)))
    width = max(len(label) for label, _ in texts)
    for label, text in texts:
        if text.plain.endswith("\n"):  # the mark shows it
            text.right_crop(1)
        print_wrapped(text, f"  {escape_control(label):{width}}  ")
    use = "compared" if row.side else "trained on"
    details = [f"{format_count(len(row.tokens), 'token')}, {sum(row.labels)} {use} (others in brackets)"]
    if row.cut_tokens:
        place = "in the middle" if config.label_column else "behind them"
        details.append(f"--max-length {config.max_length} cuts {row.cut_tokens:,} {place}")
    if row.pieces > 1:
        details.append(f"in {row.pieces} rows of at most --max-length {config.max_length}")
    if any("\ufffd" in token for token in row.tokens):
        details.append("\ufffd is part of a character")
    print_wrapped("; ".join(details), "  ")
    tokens = Text()
    for index, (token, is_learned) in enumerate(zip(row.tokens, row.labels, strict=True)):
        shown = escape_control(token.replace("\n", LINE_BREAK))
        tokens.append("|" * bool(index))
        tokens.append(shown if is_learned else f"[{shown}]", style=_style(is_learned, is_marked, has_colours))
    print_wrapped(tokens, "  ")


def _style(is_learned: bool, is_marked: bool, has_colours: bool) -> str:
    if not has_colours or not is_marked:
        return ""
    return "green" if is_learned else "dim"


def _styled(text: str, is_learned: bool, is_marked: bool, has_colours: bool) -> Text:
    shown = _with_marks(text)
    if is_learned and is_marked and not has_colours:
        return Text.assemble("\u00ab", shown, "\u00bb")
    shown.stylize(_style(is_learned, is_marked, has_colours))
    return shown


def _with_marks(text: str) -> Text:
    """Return a text with a mark at the end of each line."""
    return Text(escape_control(text.replace("\r\n", "\n").replace("\n", f"{LINE_BREAK}\n")))


def _excerpt(text: str) -> str:
    shown = one_line(text.replace("\n", LINE_BREAK))
    return shown if len(shown) <= _EXCERPT else f"{shown[:_EXCERPT].rstrip()} \u2026"


def _show_dropped(preview: "Preview") -> None:
    print()
    print_wrapped(
        f"left out as copies: {format_rows(preview.duplicates)} of which there is another, "
        f"{format_rows(preview.near_duplicates)} nearly like a held-out one"
    )
    for copy in preview.dropped:
        print_wrapped(f"{one_line(copy.description)}: {_excerpt(copy.text)}", "  ")
