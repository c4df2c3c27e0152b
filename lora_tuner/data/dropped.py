"""Rows that are left out as copies of others: examples, with the places of both."""

from collections.abc import Collection
from dataclasses import dataclass

from ..config import TrainConfig
from .dataset import Dataset
from .rows import Source, iter_rows


@dataclass(frozen=True)
class DroppedCopy:
    """A row that is left out, and the one that it copies; of a near duplicate `is_near`, which is held out.

    A place is the file and line, or row, and "" if it is not known.
    """

    text: str
    place: str
    kept_text: str
    kept_place: str
    is_near: bool = False

    @property
    def description(self) -> str:
        """Place of the row, and the row that it copies."""
        if self.is_near:
            return f"{self.place or 'a row'} nearly copies the held-out {self.kept_place or 'row'}"
        return f"{self.place or 'a row'} copies {self.kept_place or 'another row'}"


def find_dropped(
    config: TrainConfig, dataset: Dataset, others: Collection[str] = ()
) -> tuple[list[DroppedCopy], dict[str, str]]:
    """Return examples of rows that are left out as copies, and the places of other training rows.

    Price: the data is read once more, up to the last of them.

    Args:
        others: Texts of training rows.
    """
    copies = [copy for source in dataset.sources for copy in source.copies]
    near = dataset.near_duplicates
    wanted = {*others, *(text for pair in near for text in pair), *(text for text, _, _ in copies)}
    places = _find_places(config, dataset, wanted) if wanted else {}
    dropped = [
        DroppedCopy(text, place, text, places.get(text) or places.get(kept, "")) for text, place, kept in copies
    ]
    dropped += [DroppedCopy(text, places.get(text, ""), kept, places.get(kept, ""), True) for text, kept in near]
    return dropped, places


def _find_places(config: TrainConfig, dataset: Dataset, texts: Collection[str]) -> dict[str, str]:
    """Return the place of the first row of each text that is found."""
    places, missing = dict[str, str](), {*texts}
    for source in dataset.sources:
        again = Source(source.name)
        for row in iter_rows(config, again):
            if row.text in missing:
                places[row.text] = again.place
                missing.discard(row.text)
            if not missing or again.counts.read >= source.counts.read:
                break
    return places
