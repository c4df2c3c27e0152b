"""Mix several sources by their weights, in an order that depends on nothing else."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def mix(weights: Sequence[float]) -> Iterator[int]:
    """Yield, without end, the number of the source that comes next.

    Among the first n numbers each source has its share of n, to within one per source: the next
    one is always of the source that is furthest behind.
    """
    total, taken, position = sum(weights), [0] * len(weights), 0
    while True:
        position += 1
        behind = [weight * position / total - count for weight, count in zip(weights, taken, strict=True)]
        source = behind.index(max(behind))
        taken[source] += 1
        yield source


def mix_lists(lists: Sequence[Sequence[T]], weights: Sequence[float]) -> list[T]:
    """Mix lists by their weights; what is left of the longer ones follows in the same way."""
    rest = [iter(items) for items in lists]
    left = [len(items) for items in lists]
    mixed: list[T] = []
    while any(left):
        present = [number for number, count in enumerate(left) if count]
        for choice in mix([weights[number] for number in present]):
            number = present[choice]
            mixed.append(next(rest[number]))
            left[number] -= 1
            if not left[number]:
                break
    return mixed
