"""Chunks pulled through symmetric memory where ranks share an NVLink domain, and sent point to point between domains.

A double ring's pieces come to one rank of a domain over the slow links, right into memory that its neighbours map, and they pull
them from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ringflash.parallel.plan import Plan
from ringflash.parallel.schedule import Schedule
from ringflash.parallel.transport import Label, Message, Pending, Several, Transport
from ringflash.parallel.transport.symmetric import Symmetric


class Domain(NamedTuple):
    """The ranks of a group that share memory with one of them."""

    members: tuple[int, ...]
    trouble: str = ""
    """Why the ranks of the group are not to be divided so, the same on all of them; empty if they are."""


def domain_of(rank: int, hosts: Sequence[str], schedule: Schedule) -> Domain:
    """The ranks with which one shares memory: all on its host, in a double ring those of its inner group.

    hosts: of all ranks of the group. Ranks that trade heads must share memory, and so must those of an inner group: both pull
    what the others have.
    """
    size = schedule.ulysses * schedule.inner
    groups = [range(first, first + size) for first in range(0, len(hosts), size)]
    if torn := next((group for group in groups if len({hosts[r] for r in group}) > 1), None):
        return Domain((rank,), f"ranks {torn[0]} to {torn[-1]} exchange heads or are an inner group, but are not on one host")
    mine = groups[rank // size] if schedule.inner > 1 else [r for r, host in enumerate(hosts) if host == hosts[rank]]
    alone = size == 1 and 1 < len(hosts) == len(set(hosts))
    return Domain(tuple(mine), "every rank is on a host of its own" if alone else "")


class Domains(Transport):
    """One rank's ends: ``near`` for the ranks of its domain, ``far`` for all others."""

    name = "domains"
    pulls = True

    def __init__(self, near: Symmetric, far: Transport) -> None:
        self.near, self.far = near, far

    @property
    def nbytes(self) -> int:
        """Bytes of this device that the transport holds."""
        return self.near.nbytes

    def open(self, what: str, plan: Plan, nbytes: int) -> None:
        self.near.open(what, plan, nbytes)

    def lease(self, label: Label, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return self.near.lease(label, shape, dtype, device)

    def multiprocessors(self, plan: Plan) -> int:
        return self.far.multiprocessors(plan)

    def post(self, label: Label, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        def of(messages: Sequence[Message], near: bool) -> list[Message]:
            return [m for m in messages if (m.peer in self.near.place) == near]

        # Far ones first: they take longest.
        return Several([t.post(label, of(sends, near), of(receives, near)) for t, near in ((self.far, False), (self.near, True))])
