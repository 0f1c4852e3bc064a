"""The work list of the Hopper backward: which tiles of keys meet which tiles of queries, in which order, in which portions.

A *tile* of keys is worked on by one CTA, or, of twice the size, by a pair; it meets the query tiles that see it (the runs of
``tiles.backward_table``). An *item* is what is taken at once: one tile of keys, one KV head, some or all query heads of its
group, some or all of the runs.
All scheduling is data in this list; the kernel takes the items in order. No item is empty.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from ringflash.kernels import tiles
from ringflash.slices import IntArray, Slices

Int32Array = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float64]

WRITE_COST, ADD_COST = 2.0, 4.0
"""What an item costs besides its steps, in steps: writing dk and dv, or adding them to float32 tensors (that someone zeroes and
converts)."""
PORTION_COST = 2.0
"""What a portion costs more where its dk and dv go through float32 in global memory: written in the end, or in turns."""
PORTIONS = tuple((share, shortest) for share in (1.0, 2.0) for shortest in (4.0, 6.0, 8.0, 16.0, 32.0, 64.0, 128.0))
"""Such lists are made with each of these bounds of ``_portions``; the one that is done first is taken. Lists that add, with the
first."""
MAX_PORTIONS = 127
"""Of one tile of keys: what fits the words of an item."""
MAX_SLOTS = 1 << 11
"""Of all tiles, a pair's counted twice: bounds the memory of partial sums (the words of an item would hold four times as many).
Equally long items take about CTAs * (ln CTAs + 0.6), some 730 for 132 CTAs. Of 8,242 drawn lists of uneven lengths the most
took 2,425 without this bound; with it 2 of them are estimated to last longer, by less than 0.01 %; with half of it 9 % are, by up
to 3.4 times."""
GROUP_BYTES = {64: 8 << 20, 256: 32 << 20}
"""By head dim, up to: share of the L2 that the queries, dout and dq of the heads in work at the same time may take. Measured on
an H200 with 8 and 32 MB, TFLOP/s: D 64 at 4k tokens 500, 429 full and 468, 435 causal; D 128 at 8k 572, 566 and 552, 570."""
TURNS_GROUP_BYTES = 32 << 20
"""The same for deterministic lists: tiles of one head wait for each other, more heads at once less (D 64: 5 to 16 % faster)."""
PAIR_STEP, PAIR_MASKED = 0.945, 0.7
"""What a pair of CTAs takes for a step of twice the keys, in steps of a CTA alone; and how much longer if it is masked, but for
deterministic mode, where that was not seen."""
PAIR_COST = (0.5, 2.2)
"""What an item of a pair costs more, in steps, adding and writing: its K comes late, and its dk and dv leave by way of registers.
Measured at D 128, time alone over that in pairs. Writing, whole pass: full 1k .96, 2k .98, 4k 1.03, 8k 1.01, 16k 1.05; causal 4k
.94, 8k .95, 16k 1.00, 8k of 32 heads over 8 .98, window 4,096 .96. Adding, the kernel: 1.06, 1.01, 1.04, 1.02, 1.03; .99, 1.01,
1.00, .98, 1.00."""
TURNS_STEP = 1.08
"""What a CTA alone takes for a step in deterministic mode; a pair needs half the turns. Measured as above, writing: full 1k 1.00,
4k 1.12, 8k 1.10, 16k 1.12; causal 2k .94, 4k 1.02, 8k 1.08, 16k 1.09. Adding: 1.12 at 1k full, 1.06 at 2k causal, 1.07 to 1.12
for longer ones."""
SIMULATED_ITEMS = 8192
"""How much of the end of a list its duration is simulated for."""
IDLE = 1 << 14
"""Of a run's last word, ``kIdle`` of csrc/hopper/backward_common.cuh. A tile of keys has fewer bands."""
FAR = 1 << 29
"""Beyond every buffer index; twice this still fits an int32."""


@dataclass(frozen=True)
class Shape:
    """What the list depends on besides the Slices.

    rows, keys: the kernel's tile. ctas: how many work at the same time. pairs: two of them may share an item of twice the keys.
    portions: dk and dv of a divided item can be summed by the kernel. halves: it leaves a half of a tile's keys out of steps that
    are told not to see it.
    """

    q_len: int
    k_len: int
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    rows: int
    keys: int
    ctas: int
    pairs: bool = False
    portions: bool = False
    halves: bool = False


@dataclass(frozen=True, eq=False)
class WorkList:
    """Tables of one launch, int32.

    items: (n, 8): runs [begin, end), first key, batch; KV head, query heads [begin, end) of the tensor, part.
    part: 0; or, of a list that writes or a deterministic one, slot | index << 13 | count << 21: one of `count` portions of a
    tile of keys, whose partial results are slots slot .. slot + count - 1.
    runs: (n, 4): query tiles [begin, end), first band, bands (0: all visible) | IDLE << h if half h of the keys sees nothing |
    passes before this one << 16.
    bands: (n, 8): keys [r0, r1) are seen by queries [c0, c1) where lo <= query - key <= hi; those of one run share no key.
    visit_offsets, visits: deterministic lists only. Query tile m is visited by the key tiles of the intervals
    visits[visit_offsets[m] : visit_offsets[m + 1]], once per interval that holds them.
    duration: until the last CTA is done, estimated in steps.
    keys: of a tile; pairs: whether two CTAs work on one.
    whole: items before any was divided. slots: partial results of divided items that the kernel sums.
    """

    items: Int32Array
    runs: Int32Array
    bands: Int32Array
    keys: int
    pairs: bool
    duration: float = 0.0
    whole: int = 0
    slots: int = 0
    visit_offsets: Int32Array | None = None
    visits: Int32Array | None = None
    _on_device: dict[torch.device, tuple[torch.Tensor, ...]] = field(default_factory=dict, repr=False)

    def on(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """The tables on that device, copied once: items, runs, bands, then visit_offsets and visits if there are any."""
        if device not in self._on_device:
            tables = [self.items, self.runs, self.bands]
            if self.visit_offsets is not None and self.visits is not None:
                tables += [self.visits, self.visit_offsets]  # those of 16-byte records first
            buffer = torch.from_numpy(np.concatenate([t.ravel() for t in tables])).to(device)
            parts = buffer.split([t.size for t in tables])
            self._on_device[device] = (*parts[:3], *reversed(parts[3:]))
        return self._on_device[device]


@lru_cache(maxsize=256)
def work_list(slices: Slices, shape: Shape, *, deterministic: bool = False, write: bool = False) -> WorkList:
    """The list for one launch, for pairs of CTAs where they are expected to be done sooner.

    No two items share keys with ``write`` (dk and dv are written, not added to) unless they are portions, nor with
    ``deterministic``. There, too, whoever visits a query tile comes before all that visit it later (key tiles last to first,
    and, of one, passes in turn): they wait for each other, but never for an item that was not begun.
    """
    alone = _work_list(slices, replace(shape, pairs=False), deterministic, write)
    if not shape.pairs or shape.ctas < 2:
        return alone
    paired = _work_list(slices, replace(shape, keys=2 * shape.keys, ctas=shape.ctas // 2), deterministic, write)
    return paired if paired.duration < alone.duration else alone


def _work_list(slices: Slices, shape: Shape, deterministic: bool, write: bool) -> WorkList:
    table = tiles.backward_table(slices, shape.q_len, shape.k_len, shape.keys, shape.rows)
    tile, begin, end, band_begin, band_count, bands = _runs_of(table, shape)
    if deterministic:
        tile, begin, end, band_begin, band_count = _number_passes(tile, begin, end, band_begin, band_count)
    if shape.halves and not shape.pairs:
        tile, begin, end, band_begin, band_count = _mark_idle(tile, begin, end, band_begin, band_count, bands, shape)
    order = np.lexsort((begin, band_count >> 16, tile))
    tile, begin, end, band_begin, band_count = (x[order] for x in (tile, begin, end, band_begin, band_count))
    runs = np.stack([begin, end, band_begin, band_count], axis=1)
    each = WRITE_COST if write else ADD_COST
    step = TURNS_STEP if deterministic else 1.0
    if shape.pairs:
        each, step = each + PAIR_COST[write], PAIR_STEP
        if not deterministic and len(tile):
            step += PAIR_MASKED * float(np.average(band_count % IDLE > 0, weights=end - begin))
    undivided, steps, cost = _items(tile, runs, shape, last_first=deterministic)
    best, slots, duration = (undivided, runs), 0, _duration(cost * step + each, shape.ctas)
    numbered = write or deterministic
    for share, shortest in _bounds(numbered, shape.portions):
        counts = np.minimum(_portions(cost, shape, share, shortest), MAX_PORTIONS)
        group = shape.heads // shape.kv_heads
        items, all_runs, length = _divide(undivided, runs, steps, counts, group, numbered=numbered, aligned=deterministic)
        portion = items[:, 7] != 0
        shorter = _duration(length * step + each + portion * PORTION_COST, shape.ctas)
        if shorter < duration and int(portion.sum()) * (2 if shape.pairs else 1) <= MAX_SLOTS:
            best, slots, duration = (items, all_runs), int(portion.sum()), shorter
    tables = _int32(best[0]), _int32(best[1]), _int32(bands)
    work = WorkList(*tables, shape.keys, shape.pairs, duration, len(undivided), slots)
    if not deterministic:
        return work
    offsets, visits = _visits(tile, begin, end, band_count >> 16, -(-shape.q_len // shape.rows))
    return replace(work, visit_offsets=_int32(offsets), visits=_int32(visits))


def _bounds(numbered: bool, portions: bool) -> tuple[tuple[float, float], ...]:
    """The divisions to try, as arguments of ``_portions``."""
    if not numbered:
        return PORTIONS[:1]
    return PORTIONS if portions else ()


def _int32(x: IntArray) -> Int32Array:
    return np.ascontiguousarray(x, dtype=np.int32)


def _runs_of(table: tiles.TileTable, shape: Shape) -> tuple[IntArray, IntArray, IntArray, IntArray, IntArray, IntArray]:
    """(key tile, query tiles begin, end, first band, bands) of every run, and the bands (n, 8)."""
    runs, extra = table.runs.astype(np.int64), table.extra.astype(np.int64)
    tile, begin, end = runs[:, tiles.ROW_TILE], runs[:, tiles.COLUMN_TILE], runs[:, tiles.COLUMN_TILE_END]
    own, masked = runs[:, tiles.BAND : tiles.BAND + 6].copy(), runs[:, tiles.EXTRA_BEGIN] >= 0
    # Keys past the end are zeros in shared memory; unmasked, their P = exp(-lse) could overflow.
    tail = ~masked & ((tile + 1) * shape.keys > shape.k_len)
    own[tail] = np.stack(
        [tile * shape.keys, tile * 0 + shape.k_len, begin * shape.rows, end * shape.rows, tile * 0 - FAR, tile * 0 + FAR], axis=1
    )[tail]
    further: IntArray = np.where(masked, runs[:, tiles.EXTRA_END] - runs[:, tiles.EXTRA_BEGIN], 0)
    count: IntArray = (masked | tail) + further
    first: IntArray = np.cumsum(count) - count
    bands = np.zeros((max(int(count.sum()), 1), 8), dtype=np.int64)
    bands[first[masked | tail], :6] = own[masked | tail]
    source, owner = tiles._ranges(runs[:, tiles.EXTRA_BEGIN], runs[:, tiles.EXTRA_BEGIN] + further)
    bands[first[owner] + 1 + source - runs[owner, tiles.EXTRA_BEGIN], :6] = extra[source, :6]
    return tile, begin, end, first, count, bands


def _items(tile: IntArray, runs: IntArray, shape: Shape, last_first: bool = False) -> tuple[IntArray, IntArray, FloatArray]:
    """(items, steps of one head of each, steps of each): one item per tile of keys and KV head.

    Longest first inside groups of KV heads that fit L2 together; or, with ``last_first``, key tiles from the last to the first.
    There the groups also spread who waits: tiles of one head that begin at the same time and place begin one turn apart.
    """
    group = shape.heads // shape.kv_heads
    tile_of, first = np.unique(tile, return_index=True)
    last = np.append(first[1:], len(tile))
    cumulated = np.concatenate([[0], np.cumsum(runs[:, 1] - runs[:, 0])])
    steps = (cumulated[last] - cumulated[first])[: len(tile_of)]
    pairs = shape.batch * shape.kv_heads
    share = TURNS_GROUP_BYTES if last_first else next(n for dims, n in GROUP_BYTES.items() if shape.head_dim <= dims)
    together = max(1, share // (group * shape.q_len * shape.head_dim * 8))
    order = np.arange(len(tile_of))[::-1] if last_first else np.argsort(-steps, kind="stable")
    sizes = [min(together, pairs - a) for a in range(0, pairs, together)]
    which = np.concatenate([np.repeat(order, n) for n in sizes])
    pair = np.concatenate([np.tile(np.arange(n) + i * together, len(order)) for i, n in enumerate(sizes)])
    items = np.zeros((len(which), 8), dtype=np.int64)
    items[:, 0], items[:, 1], items[:, 2] = first[which], last[which], tile_of[which] * shape.keys
    items[:, 3], items[:, 4] = pair // shape.kv_heads, pair % shape.kv_heads
    items[:, 5], items[:, 6] = items[:, 4] * group, (items[:, 4] + 1) * group
    return items, steps[which], steps[which] * float(group)


def _portions(cost: FloatArray, shape: Shape, share: float, shortest: float) -> IntArray:
    """Into how many portions to divide each item: none may be longer than this share of what then is left for each CTA, unless it
    is as short as ``shortest`` steps."""
    left = np.cumsum(cost[::-1])[::-1]
    longest = np.maximum(share * left / shape.ctas, shortest)
    return np.ceil(cost / longest - 1e-9).astype(np.int64)


def _divide(
    items: IntArray,
    runs: IntArray,
    steps: IntArray,
    portions: IntArray,
    group: int,
    numbered: bool = False,
    aligned: bool = False,
) -> tuple[IntArray, IntArray, FloatArray]:
    """(items, runs, steps of each item), divided by query heads first, then by query tiles; dk and dv are additions, so any
    division is correct. ``numbered``: word 7 of an item says which portion it is. ``aligned``: portions of all tiles of keys end
    at the same query tiles, else those that take turns wait for each other's beginning."""
    parts: dict[tuple[int, int], list[tuple[int, int, int]]] = {}  # (first run, q portions) -> [(run begin, end, steps)]
    more_runs: list[list[int]] = []
    out: list[list[int]] = []
    cost: list[float] = []
    slot = 0
    for item, n, wanted in zip(items.tolist(), steps.tolist(), portions.tolist(), strict=True):
        if wanted <= 1:
            out.append(item)
            cost.append(n * float(item[6] - item[5]))
            continue
        by_heads = min(wanted, group)
        by_tiles = min(-(-wanted // group), n, MAX_PORTIONS // by_heads)
        key = (item[0], by_tiles)
        if key not in parts:
            own = runs[item[0] : item[1]]
            if by_tiles == 1:
                parts[key] = [(item[0], item[1], n)]
            elif aligned:
                parts[key] = _cut_aligned(own, n, by_tiles, len(runs), more_runs)
            else:
                parts[key] = _cut(own, n, by_tiles, len(runs), more_runs)
        begin, count = len(out), by_heads * len(parts[key])
        for run_begin, run_end, portion in parts[key]:
            for h in range(by_heads):
                a, b = item[5] + h * group // by_heads, item[5] + (h + 1) * group // by_heads
                part = slot | (len(out) - begin) << 13 | count << 21 if numbered else 0
                out.append([run_begin, run_end, item[2], item[3], item[4], a, b, part])
                cost.append(portion * float(b - a))
        slot += count
    all_runs = np.concatenate([runs, np.array(more_runs, dtype=np.int64).reshape(-1, 4)])
    return np.array(out, dtype=np.int64).reshape(-1, 8), all_runs, np.array(cost)


def _cut(own: IntArray, steps: int, n: int, base: int, more_runs: list[list[int]]) -> list[tuple[int, int, int]]:
    """Cuts the runs of one tile into n portions of about equal length; the pieces are appended to more_runs."""
    result = []
    cumulated = np.concatenate([[0], np.cumsum(own[:, 1] - own[:, 0])])
    for i in range(n):
        a, b = steps * i // n, steps * (i + 1) // n
        begin = base + len(more_runs)
        for run, at in zip(own.tolist(), cumulated.tolist(), strict=False):
            lo, hi = max(a - at, 0) + run[0], min(b - at, run[1] - run[0]) + run[0]
            if hi > lo:
                more_runs.append([lo, hi, run[2], run[3]])
        result.append((begin, base + len(more_runs), b - a))
    return result


def _cut_aligned(own: IntArray, steps: int, n: int, base: int, more_runs: list[list[int]]) -> list[tuple[int, int, int]]:
    """As ``_cut``, but at multiples of a power of two of query tiles, the smallest that makes no more than n portions."""
    size = 1
    while size * n < steps or len(set(np.concatenate([np.arange(a // size, (b - 1) // size + 1) for a, b in own[:, :2]]))) > n:
        size *= 2
    result = []
    for at in range(int(own[:, 0].min()) // size * size, int(own[:, 1].max()), size):
        begin = base + len(more_runs)
        pieces = [[max(a, at), min(b, at + size), c, d] for a, b, c, d in own.tolist() if max(a, at) < min(b, at + size)]
        more_runs.extend(pieces)
        if pieces:
            result.append((begin, begin + len(pieces), sum(b - a for a, b, *_ in pieces)))
    return result


def _duration(cost: FloatArray, ctas: int) -> float:
    """When the last CTA is done, each taking the next item as soon as it is free."""
    free = [0.0] * ctas
    if len(cost) > SIMULATED_ITEMS:  # the beginning of a long list fills all CTAs alike
        free = [float(cost[:-SIMULATED_ITEMS].sum()) / ctas] * ctas
    for c in cost[-SIMULATED_ITEMS:].tolist():
        heapq.heapreplace(free, free[0] + c)
    return max(free)


def _number_passes(
    tile: IntArray, begin: IntArray, end: IntArray, band_begin: IntArray, band_count: IntArray
) -> tuple[IntArray, IntArray, IntArray, IntArray, IntArray]:
    """Runs of which every query tile has had the same number of passes before; that number goes to band_count's high half.

    A tile of scores that several Slices with common keys touch is computed once for each; full runs are computed once anyway.
    """
    masked = np.flatnonzero(band_count > 0)
    m, i = tiles._ranges(begin[masked], end[masked])
    run = masked[i]
    order = np.lexsort((run, m, tile[run]))
    m, run = m[order], run[order]
    new = np.ones(len(m), dtype=bool)
    new[1:] = (tile[run][1:] != tile[run][:-1]) | (m[1:] != m[:-1])
    start = np.flatnonzero(new)
    number = np.arange(len(m)) - np.repeat(start, np.diff(np.append(start, len(m))))
    order = np.lexsort((m, run))
    return _divided(tile, begin, end, band_begin, band_count, run[order], m[order], number[order] << 16)


def _divided(
    tile: IntArray,
    begin: IntArray,
    end: IntArray,
    band_begin: IntArray,
    band_count: IntArray,
    run: IntArray,
    m: IntArray,
    more: IntArray,
) -> tuple[IntArray, IntArray, IntArray, IntArray, IntArray]:
    """The runs, masked ones divided where what is more to say of them changes, which joins band_count. Of every query tile of the
    masked ones, run after run: which run it is of, the tile, what is more."""
    new = np.ones(len(m), dtype=bool)
    new[1:] = (run[1:] != run[:-1]) | (m[1:] != m[:-1] + 1) | (more[1:] != more[:-1])
    a = np.flatnonzero(new)
    b = np.append(a[1:], len(m)) - 1 if len(a) else a
    full = np.flatnonzero(band_count % IDLE == 0)
    r = run[a]
    return (
        np.concatenate([tile[full], tile[r]]),
        np.concatenate([begin[full], m[a]]),
        np.concatenate([end[full], m[b] + 1]),
        np.concatenate([band_begin[full], band_begin[r]]),
        np.concatenate([band_count[full], band_count[r] | more[a]]),
    )


def _mark_idle(
    tile: IntArray, begin: IntArray, end: IntArray, band_begin: IntArray, band_count: IntArray, bands: IntArray, shape: Shape
) -> tuple[IntArray, IntArray, IntArray, IntArray, IntArray]:
    """Runs in all of whose query tiles each half of the keys sees something or, then marked IDLE, nothing.

    At the diagonal of a causal mask, and at a window's other end, that is half a step of every item.
    """
    masked = np.flatnonzero(band_count % IDLE > 0)
    m, i = tiles._ranges(begin[masked], end[masked])
    run = masked[i]
    band, at = tiles._ranges(band_begin[run], band_begin[run] + band_count[run] % IDLE)
    r0, r1, c0, c1, lo, hi = bands[band, :6].T
    q0, q1 = np.maximum(c0, m[at] * shape.rows), np.minimum(c1, (m[at] + 1) * shape.rows)
    idle = np.zeros(len(m), dtype=np.int64)
    for half in range(2):
        first = tile[run[at]] * shape.keys + half * shape.keys // 2
        k0, k1 = np.maximum(r0, first), np.minimum(r1, first + shape.keys // 2)
        seen = (k0 < k1) & (q0 < q1) & (q1 - 1 - k0 >= lo) & (q0 - (k1 - 1) <= hi)
        idle += np.where(np.bincount(at, seen, len(m)) > 0, 0, IDLE << half)
    return _divided(tile, begin, end, band_begin, band_count, run, m, idle)


def _visits(tile: IntArray, begin: IntArray, end: IntArray, number: IntArray, q_tiles: int) -> tuple[IntArray, IntArray]:
    """(offsets (q_tiles + 1), intervals of key tiles (n, 2)) per query tile, linear in the number of intervals.

    Per pass number, the cover of key tile n less that of key tile n - 1 tells at which query tiles an interval of key tiles
    begins (+1) or ends (-1). Runs of one pass number do not overlap.
    """
    found = []
    for layer in np.unique(number):
        t, a, b = (x[number == layer] for x in (tile, begin, end))
        at = np.concatenate([t, t, t + 1, t + 1])
        m = np.concatenate([a, b, a, b])
        change = np.concatenate([a * 0 + 1, a * 0 - 1, a * 0 - 1, a * 0 + 1])
        order = np.lexsort((m, at))
        at, m, level = at[order], m[order], np.cumsum(change[order])
        segment = np.flatnonzero((level[:-1] != 0) & (m[1:] > m[:-1]) & (at[1:] == at[:-1]))
        q, i = tiles._ranges(m[segment], m[segment + 1])
        n, sign = at[segment][i], level[segment][i]
        order = np.lexsort((n, q))
        q, n, sign = q[order], n[order], sign[order]
        assert (sign[::2] == 1).all() and (sign[1::2] == -1).all(), "intervals of key tiles begin and end in turn"
        found.append(np.stack([q[::2], n[::2], n[1::2]], axis=1))
    visits = np.concatenate(found) if found else np.zeros((0, 3), dtype=np.int64)
    visits = visits[np.argsort(visits[:, 0], kind="stable")]
    offsets = np.searchsorted(visits[:, 0], np.arange(q_tiles + 1))
    return offsets, visits[:, 1:]
