"""Schedules: in which order and grouping chunks travel between ranks."""

from __future__ import annotations

from dataclasses import dataclass, fields

SCHEDULES = ("auto", "ring", "allgather", "staged", "ulysses", "hybrid", "double_ring")
NUMBERED = {"staged": "K chunks a stage", "ulysses": "heads in K groups", "double_ring": "chunks in K pieces"}
"""What the number of a name such as "staged:3" is of."""


LOCAL_LAST = 8192
"""Rows of a chunk from which a part of the local work is kept for the end of a backward pass. Less is over before it hides
anything. Measured on 4 H200 without it: 10 of 50 ms waiting for the last gradients (64k tokens, 32 heads, all-gather)."""


TRAVELS = ("auto", "kv", "q")


MOST_GROUPS, GROUP_ROWS = 2, 65_536
"""Ranks that trade all their heads do so in two groups, if each leaves a rank so many rows of query heads: four rounds of a GPU's
tiles, and an equal number of key heads. One group is on its way while the other is computed. Chosen for the forward pass; more
groups hide more, but cost as much: on two H200, causal, forward and forward + backward of one GPU in 1, 2, 4 groups: 64k tokens,
32 heads .940/.950, .966/.958, .955/.947; 128k, 8 key heads .977/.981, .982/.973, .978/.962."""


@dataclass(frozen=True)
class Schedule:
    """In which order and grouping chunks arrive.

    name      ring: one remote chunk a step. allgather: all remote chunks in one step. staged: ``stage`` chunks a step.
              double_ring: rings of ``inner`` fast-linked neighbours, inside a ring of such groups: every chunk crosses the slow
              links once per group and then travels inside it (BurstEngine, LoongTrain).
    stage     remote chunks per step, at least.
    rows      a stage takes further chunks until it holds so many rows: small parts of chunks share a step. Ranks that need less
              than others cut it into as many steps.
    ulysses   ranks that trade heads for sequence before the ring (DeepSpeed Ulysses; with a ring: USP, Fang & Zhao 2024).
    inner     ranks of a fast-linked group (double_ring).
    pieces    in which chunks travel, one after the other, each a step of its own; 0 decides by size (double_ring, else 1).
              More hide more of slow links, in more kernel calls that take longer in all; see BACKWARD_PIECE_ROWS of world.py.
    local_last  in a backward pass a part of the local chunk is computed last, while the last gradients travel home, where chunks
              have at least so many rows.
    head_groups  groups of heads that are traded and computed one after the other, one on its way while another is computed; 0
              decides by size (with a head exchange over all ranks, else 1). Each group's heads are dealt to the ranks anew.
    travels   in the backward pass: "kv" (K and V, and their gradients home), "q" (Q, dO and what belongs to their rows, and dQ
              home), or "auto": whichever is fewer bytes.
    """

    name: str = "ring"
    stage: int = 1
    ulysses: int = 1
    inner: int = 1
    rows: int = 0
    pieces: int = 0
    local_last: int = LOCAL_LAST
    travels: str = "auto"
    head_groups: int = 0

    def __post_init__(self) -> None:
        if self.travels not in TRAVELS:
            raise ValueError(f"travels must be one of {', '.join(TRAVELS)}, got {self.travels!r}")

    def check_groups(self, heads: int, kv_heads: int) -> None:
        """Raises ValueError if so many heads cannot go in the groups that are asked for."""
        groups = self.head_groups or 1
        if kv_heads % groups:
            raise ValueError(
                f"{groups} groups of heads do not divide the {kv_heads} key heads; use a number that does, or leave it out"
            )
        if groups > 1 and heads // groups < self.ulysses:
            raise ValueError(
                f"{groups} groups of heads leave some of the {self.ulysses} ranks that trade them none of a group's "
                f"{heads // groups} query heads; use fewer groups, or leave the number out"
            )

    def __str__(self) -> str:
        extra = [f"{f.name}={value}" for f in fields(self)[1:] if (value := getattr(self, f.name)) != f.default]
        return f"{self.name}({', '.join(extra)})" if extra else self.name


def read_schedule(spec: str) -> tuple[str, int]:
    """A schedule's name and its number, 0 where none is given: ("staged", 3) of "staged:3". Raises ValueError for other names."""
    name, colon, number = str(spec).partition(":")
    counted = name in NUMBERED and number.isascii() and number.isdecimal() and int(number) > 0
    if name not in SCHEDULES or (colon and not counted):
        numbered = ", ".join(f"{name}:K ({what})" for name, what in NUMBERED.items())
        raise ValueError(f"unknown schedule {str(spec)!r}; allowed are {', '.join(SCHEDULES)}, {numbered}, with K at least 1")
    return name, int(number or 0)


def make_schedule(spec: str | Schedule, world: int, ulysses: int = 1, inner: int | None = None) -> Schedule:
    """The schedule of a name ("ring", "allgather", "staged:3", "ulysses", "ulysses:2", "hybrid", "double_ring", "double_ring:16",
    "auto") for a world.

    ulysses: degree of the head exchange for "hybrid" (and, if above 1, for any other). inner: group size of "double_ring".
    Raises ValueError for unknown names and for degrees that do not divide the world.
    """
    if isinstance(spec, Schedule):
        schedule = spec
    else:
        name, number = read_schedule(spec)
        if name == "ulysses":
            if ulysses not in (1, world):
                raise ValueError(
                    f'schedule "ulysses" uses all {world} ranks, got ulysses={ulysses}; use schedule="hybrid" for a part of them'
                )
            ulysses = world
        if name == "hybrid" and not 1 < ulysses < world:
            raise ValueError(f'schedule "hybrid" needs ulysses between 2 and {world - 1}, got {ulysses}')
        rings = world // max(ulysses, 1)
        double = name == "double_ring"
        if double:
            if inner is None or not 1 <= inner <= rings:
                raise ValueError(
                    f'schedule "double_ring" needs inner=, the ranks of one fast-linked group, 1 to {rings}; got {inner}'
                )
        elif inner not in (None, 1):
            raise ValueError(f'inner={inner} is for schedule "double_ring", got schedule {spec!r}')
        stage = {"allgather": max(rings - 1, 1), "staged": number or 2}.get(name, 1)
        kind = name if name in ("allgather", "staged", "double_ring") else "ring"
        pieces, groups = number if double else 0, number if name == "ulysses" else 0
        schedule = Schedule(kind, stage, ulysses, inner if double and inner else 1, pieces=pieces, head_groups=groups)
    if schedule.ulysses < 1 or world % schedule.ulysses:
        raise ValueError(f"ulysses={schedule.ulysses} does not divide the {world} ranks")
    if schedule.inner < 1 or (world // schedule.ulysses) % schedule.inner:
        raise ValueError(f"inner={schedule.inner} does not divide the {world // schedule.ulysses} ranks of the ring")
    if schedule.stage < 1 or min(schedule.rows, schedule.pieces, schedule.head_groups) < 0:
        raise ValueError(f"a stage needs at least one chunk; rows, pieces and head_groups cannot be negative; got {schedule}")
    return schedule
