"""The next step's rows, read and cut into passes while the card works on this step's.

A step is launched without waiting for it; what follows it (the loss scale, the log) waits. In between the host is free.
Which rows make a step is Trainer's and the data loader's; how they are cut, the trainer's.
"""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Generic, TypeVar

from jebi.data.passes import Batch

Parts = TypeVar("Parts")
"""What a step's rows are made into."""


class Prefetch(Generic[Parts]):
    """Hands out micro-batches of one epoch after the other, and what their step's rows are made into."""

    def __init__(self, make: Callable[[list[Batch]], Parts]):
        """Nothing is read yet; ``make`` cuts the rows of a step."""
        self._make = make
        self._iterator: Iterator[Batch] | None = None
        self._read: list[Batch] = []
        self._made: tuple[list[Batch], Parts] | None = None
        self._error: Exception | None = None

    def take(self, iterator: Iterator[Batch], count: int) -> list[Batch]:
        """The next micro-batches, fewer where the iterator ends; errors of `ahead` are raised here."""
        if iterator is not self._iterator:
            self._iterator, self._read, self._error = iterator, [], None
        if self._error is not None:
            raise self._error
        taken, self._read = self._read[:count], self._read[count:]
        return taken + list(islice(iterator, count - len(taken)))

    def ahead(self, count: int) -> None:
        """Read so many micro-batches of the same epoch, and make them into a step.

        An error is kept until they are asked for: the step under way has to end, and to be logged, as if there were
        none.
        """
        assert self._iterator is not None, "the first step's rows are taken"
        try:
            self._read += islice(self._iterator, count - len(self._read))
            if self._read:
                self._made = list(self._read), self._make(self._read)
        except Exception as error:
            self._error = error

    def parts(self, batches: list[Batch]) -> Parts:
        """What these are made into: what `ahead` made where it was of them and no others, else made now."""
        made, self._made = self._made, None
        if made is not None and len(made[0]) == len(batches) and all(a is b for a, b in zip(made[0], batches)):
            return made[1]
        return self._make(batches)
