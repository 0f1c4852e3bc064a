"""A whole world in one process: messages are put into a mailbox and read from it. For tests, planning and debugging."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import Tensor

from ringflash.parallel.transport import Label, Message, Pending, Transport


class Mailbox:
    """Messages between the ranks of a simulated world. The n-th receive posted for a pair of ranks gets the n-th message sent."""

    def __init__(self) -> None:
        self._letters: dict[tuple[int, int, int], Tensor] = {}
        self._sent: Counter[tuple[int, int]] = Counter()
        self._asked: Counter[tuple[int, int]] = Counter()
        self.bytes_sent: Counter[tuple[int, int]] = Counter()

    def put(self, source: int, dest: int, tensor: Tensor) -> None:
        # A copy, as a real wire makes: what the sender does to its buffer afterwards must not be seen.
        self._letters[source, dest, self._sent[source, dest]] = tensor.clone()
        self._sent[source, dest] += 1
        self.bytes_sent[source, dest] += tensor.numel() * tensor.element_size()

    def reserve(self, source: int, dest: int) -> tuple[int, int, int]:
        """A claim to a pair's next message: messages are matched when receives are posted, not when they are waited for."""
        self._asked[source, dest] += 1
        return source, dest, self._asked[source, dest] - 1

    def take(self, ticket: tuple[int, int, int]) -> Tensor:
        return self._letters.pop(ticket)

    def assert_empty(self) -> None:
        """Every message was read: what one rank sends is what another expects."""
        assert not self._letters, sorted(self._letters)


class Simulated(Transport):
    """One rank's end of a mailbox. Ranks must take turns: all post before any waits (see autograd.take_turns)."""

    name = "simulated"

    def __init__(self, mailbox: Mailbox, rank: int) -> None:
        self.mailbox, self.rank = mailbox, rank

    def post(self, label: Label, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        for message in sends:
            assert message.tensor.is_contiguous(), label
            self.mailbox.put(self.rank, message.peer, message.tensor)
        return _Letters(self.mailbox, [(self.mailbox.reserve(m.peer, self.rank), m.tensor) for m in receives])


class _Letters:
    def __init__(self, mailbox: Mailbox, expected: list[tuple[tuple[int, int, int], Tensor]]) -> None:
        self.mailbox, self.expected = mailbox, expected

    def wait(self) -> None:
        for ticket, tensor in self.expected:
            letter = self.mailbox.take(ticket)
            assert letter.shape == tensor.shape and letter.dtype == tensor.dtype
            tensor.copy_(letter)
