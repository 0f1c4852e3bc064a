"""A whole world in one process: messages are put into a mailbox and read from it. For tests, planning and debugging."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from torch import Tensor

from ringflash.parallel.transport import Label, Message, Pending


class Mailbox:
    """Messages between the ranks of a simulated world: first in, first out per pair."""

    def __init__(self) -> None:
        self._letters: dict[tuple[int, int], deque[Tensor]] = {}
        self.bytes_sent: dict[tuple[int, int], int] = {}

    def put(self, source: int, dest: int, tensor: Tensor) -> None:
        # A copy, as a real wire makes: what the sender does to its buffer afterwards must not be seen.
        self._letters.setdefault((source, dest), deque()).append(tensor.clone())
        self.bytes_sent[source, dest] = self.bytes_sent.get((source, dest), 0) + tensor.numel() * tensor.element_size()

    def take(self, source: int, dest: int) -> Tensor:
        return self._letters[source, dest].popleft()

    def assert_empty(self) -> None:
        """Every message was read: what one rank sends is what another expects."""
        assert not any(self._letters.values()), {pair: len(box) for pair, box in self._letters.items() if box}


class Simulated:
    """One rank's end of a mailbox. Ranks must take turns: all post before any waits (see autograd.take_turns)."""

    name = "simulated"
    collective = False

    def __init__(self, mailbox: Mailbox, rank: int) -> None:
        self.mailbox, self.rank = mailbox, rank

    def post(self, label: Label, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        for message in sends:
            assert message.tensor.is_contiguous(), label
            self.mailbox.put(self.rank, message.peer, message.tensor)
        return _Letters(self.mailbox, self.rank, receives)


class _Letters:
    def __init__(self, mailbox: Mailbox, rank: int, receives: Sequence[Message]) -> None:
        self.mailbox, self.rank, self.receives = mailbox, rank, receives

    def wait(self) -> None:
        for message in self.receives:
            letter = self.mailbox.take(message.peer, self.rank)
            assert letter.shape == message.tensor.shape and letter.dtype == message.tensor.dtype
            message.tensor.copy_(letter)
