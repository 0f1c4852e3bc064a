"""The handshake: ranks agree on a plan before the first byte moves.

Every rank writes what it is about to do into the process group's key-value store and reads what the others wrote. It is done
once per plan, costs a few round trips to the store and no collective, and so cannot hang in one: a rank whose input is wrong
writes its complaint and raises at once; the others read it and raise the same ValueError.
"""

from __future__ import annotations

import json
from datetime import timedelta
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

from ringflash.parallel.transport import TransportError


class Agreement:
    """One group's handshakes, counted: the n-th of one rank meets the n-th of the others."""

    _instances: ClassVar[WeakKeyDictionary[Store, dict[str, int]]] = WeakKeyDictionary()
    """Contexts made so far, by members, of each initialisation of torch.distributed."""

    def __init__(self, group: dist.ProcessGroup, timeout_s: float) -> None:
        self.rank, self.world, self.timeout_s = dist.get_rank(group), dist.get_world_size(group), timeout_s
        members = ",".join(str(r) for r in dist.get_process_group_ranks(group))
        # The members of a group create their contexts in the same order, so a count tells these apart.
        store = _get_default_store()
        made = Agreement._instances.setdefault(store, {})
        made[members] = instance = made.get(members, 0) + 1
        self.store = PrefixStore(f"ringflash/{members}/{instance}/", store)
        self.count = 0

    def _key(self, count: int, rank: int) -> str:
        return f"{count}/{rank}"

    def _write(self, facts: dict[str, str] | None, complaint: str | None) -> None:
        self.store.set(self._key(self.count, self.rank), json.dumps({"facts": facts, "complaint": complaint}))

    def refuse(self, error: Exception) -> None:
        """Leaves word of this rank's error for ranks that are, or come, in the same handshake."""
        self._write(None, str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}")
        self.count += 1

    def gather(self, facts: dict[str, str]) -> dict[int, dict[str, str]]:
        """What every rank brought. Raises as `agree`, but lets facts differ."""
        self._write(facts, None)
        said: dict[int, dict[str, str]] = {}
        refused: dict[int, str] = {}
        for rank in range(self.world):
            try:
                self.store.wait([self._key(self.count, rank)], timedelta(seconds=self.timeout_s))
                word = json.loads(self.store.get(self._key(self.count, rank)))
            except RuntimeError as error:
                raise TransportError(
                    f"rank {self.rank}, before step 0: rank {rank} did not come to agree within {self.timeout_s:g} s; "
                    "all ranks of the group must call attention together (raise RINGFLASH_TIMEOUT_S if it is only slow)"
                ) from error
            if word["complaint"] is not None:
                refused[rank] = word["complaint"]
            else:
                said[rank] = word["facts"]
        if self.count:  # nobody reads the handshake before the last one any more
            self.store.delete_key(self._key(self.count - 1, self.rank))
        self.count += 1
        if refused:
            rank, complaint = next(iter(refused.items()))
            raise ValueError(f"rank {rank} refused: {complaint}")
        return said

    def agree(self, facts: dict[str, str]) -> None:
        """Returns when all ranks brought the same facts.

        Raises ValueError naming ranks and values where they differ or a rank refused; TransportError when a rank stays away.
        """
        said = self.gather(facts)
        for name in facts:
            values: dict[str, list[int]] = {}
            for rank, s in said.items():
                values.setdefault(s.get(name, "nothing"), []).append(rank)
            if len(values) > 1:
                listed = "; ".join(
                    f"rank{'s' if len(ranks) > 1 else ''} {_list(ranks)}: {value}" for value, ranks in values.items()
                )
                raise ValueError(f"the ranks disagree on {name}: {listed}. It must be the same on all ranks of the group")

    def last_word(self, peer: int) -> str:
        """What a silent peer wrote into the handshake that this rank is not in: why it is silent, if it said so."""
        key = self._key(self.count, peer)
        try:
            if not self.store.check([key]):
                return ""
            word = json.loads(self.store.get(key))
        except RuntimeError:
            return ""
        if word["complaint"] is not None:
            return f"it raised an error: {word['complaint']}; "
        return f"it waits for the ranks to agree on another call ({', '.join(f'{k} {v}' for k, v in word['facts'].items())}); "


def _list(ranks: list[int]) -> str:
    shown = ", ".join(str(r) for r in ranks[:8])
    return shown if len(ranks) <= 8 else f"{shown}, ... ({len(ranks)} ranks)"
