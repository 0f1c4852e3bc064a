"""Seeds bugs, one at a time, and shows that a fast part of the tests catches each.

    python scripts/mutate.py                 all bugs, two at a time; exits with 1 if one survives
    python scripts/mutate.py --only "window" those whose name contains a word
    python scripts/mutate.py --list          names only

A bug is a textual patch of one file of a temporary copy of the tree. Its text must occur exactly once, so a patch that the code
has outgrown is an error, not a bug that silently is no bug. Add one whenever a real bug slipped through.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

FORGET_INSTALLED = "sys.meta_path[:] = [f for f in sys.meta_path if 'ScikitBuild' not in type(f).__name__]"
"""An editable install puts a finder before the path; tests would then run the code as it is, without the bug."""

exec(FORGET_INSTALLED)

# The server that forks the test runs imports this file, and with it what takes seconds to import, once for all of them.
import numpy  # noqa: E402, F401
import pytest  # noqa: E402
import torch  # noqa: E402, F401

_context = multiprocessing.get_context("forkserver")

ROOT = Path(__file__).resolve().parents[1]
TREE = ("ringflash", "parallel", "launch", "tests", "scripts", "pyproject.toml")

FAST = ("tests/test_property.py::test_edges", "tests/test_property.py::test_drawn[0]", "tests/test_property.py::test_drawn[1]")
PRECISION = ("tests/test_precision.py",)
REAL = ("tests/test_distributed.py::test_several_messages_to_one_peer",)
AGREE = ("tests/test_failures.py::test_disagreement_is_the_same_error_on_every_rank",)
SHARD = ("tests/test_shard.py",)
PLAN = ("tests/test_plan.py::test_only_rows_that_are_seen_travel",)
COMPACT = ("tests/test_plan.py::test_ranks_do_not_walk_past_chunks_they_do_not_need",)
DUE = ("tests/test_plan.py::test_gradients_cross_slow_links_while_the_next_block_is_computed",)
SPARE = ("tests/test_plan.py::test_without_local_work_at_the_end_a_double_ring_keeps_a_step_to_spare",)
TURNED = ("tests/test_property.py::test_queries_may_travel",)
LAYOUT = ("tests/test_layout.py",)
SYMMETRIC = ("tests/test_symmetric.py::test_no_interleaving_overwrites_what_a_peer_still_reads",)
DRAWN_SYMMETRIC = ("tests/test_symmetric.py::test_drawn_passes_over_symmetric_memory",)
DRAWN_DOMAINS = ("tests/test_symmetric.py::test_drawn_passes_over_several_domains",)
GROUPS = ("tests/test_groups.py",)
KNOWN = ("tests/test_host_time.py::test_a_call_that_differs_is_another_call",)
CARGO = ("tests/test_cargo.py",)
LANES = ("tests/test_context.py::test_both_passes_leave_what_the_transport_asks_for",)
ITINERARY = ("tests/test_itinerary.py",)
MODELS = tuple(f"tests/test_hf.py::test_{name}" for name in ("ranks_compute_what_one_device_does", "batches_and_layouts"))
NOT_THE_SAME = ("tests/test_hf.py::test_ranks_that_are_not_given_the_same_are_told",)
NONFINITE = ("tests/test_nonfinite.py::test_a_bad_value_reaches_the_rows_that_see_it_and_no_others",)

TIMEOUT_S = 300


@dataclass(frozen=True)
class Bug:
    """``old`` becomes ``new`` in ``file``; ``tests`` must notice."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = FAST


BUGS = (
    # masks
    Bug("window one too wide", "ringflash/mask.py", "else 1 - self.size, 0)", "else -self.size, 0)"),
    Bug("causal edge: the next token is seen", "ringflash/mask.py", "else 1 - self.size, 0)", "else 1 - self.size, 1)"),
    Bug(
        "document border leaks one token",
        "ringflash/mask.py",
        "np.stack([starts, ends, starts, ends, lo, hi], axis=1)",
        "np.stack([starts, ends, np.maximum(starts - 1, 0), ends, lo, hi], axis=1)",
    ),
    Bug(
        "documents not causal",
        "ringflash/mask.py",
        "np.full_like(starts, 0 if self.is_causal else reach)",
        "np.full_like(starts, reach)",
    ),
    Bug(
        "prefix one short",
        "ringflash/mask.py",
        "[-UNBOUNDED, UNBOUNDED, -UNBOUNDED, self.n, -UNBOUNDED, UNBOUNDED]",
        "[-UNBOUNDED, UNBOUNDED, -UNBOUNDED, self.n - 1, -UNBOUNDED, UNBOUNDED]",
    ),
    Bug(
        "left and right of a window swapped",
        "ringflash/mask.py",
        "_or_unbounded(self.left), _or_unbounded(self.right)",
        "_or_unbounded(self.right), _or_unbounded(self.left)",
    ),
    Bug("dilated window one too wide", "ringflash/mask.py", "else self.size * self.stride - 1", "else self.size * self.stride"),
    Bug("intersection keeps one stride", "ringflash/mask.py", "math.lcm(a.modulus, b.modulus)", "max(a.modulus, b.modulus)"),
    # layouts and plans
    Bug(
        "wrong owner: everybody takes what the neighbour needs",
        "parallel/plan.py",
        "takes.get(dest // together * (rings * pieces) + piece, ())",
        "takes.get((dest + 1) % rings // together * (rings * pieces) + piece, ())",
    ),
    Bug(
        "dropped chunk: the last one of a ring never travels",
        "parallel/plan.py",
        "        if rows and (step :=",
        "        if rows and (dest - piece // pieces) % rings != rings - 1 and (step :=",
    ),
    Bug(
        "dropped chunk: of a stage only the first is computed",
        "parallel/plan.py",
        "bands.get(p, nothing)) for p in pieces]",
        "bands.get(p if p == pieces[0] else -1, nothing)) for p in pieces]",
    ),
    Bug("wrong residue for a dilated mask", "parallel/lower.py", "residue = ((gap // g)", "residue = ((-gap // g)"),
    Bug(
        "stride forgotten: bands rounded the wrong way",
        "parallel/lower.py",
        "_ceil_div(b[:, 4] + gap, stride) + shift",
        "(b[:, 4] + gap) // stride + shift",
    ),
    Bug(
        "trim of a transfer one row short",
        "parallel/lower.py",
        "found.setdefault(key, []).append((a, b))",
        "found.setdefault(key, []).append((a, max(b - 1, a + 1)))",
    ),
    Bug(
        "queries at the start of the keys", "parallel/world.py", "return self.k_layout.seqlen - self.q_layout.seqlen", "return 0"
    ),
    Bug(
        "second chunk of a stage computed as if it were the first",
        "parallel/plan.py",
        "moved[:, 2:6] += shift[:, None]",
        "moved[:, 2:4] += shift[:, None]",
    ),
    Bug(
        "unneeded rows travel",
        "parallel/lower.py",
        "start[1:] > reached[:-1] + max_gap",
        "start[1:] > reached[:-1] + max_gap + 1",
        PLAN,
    ),
    Bug("queries travel: bounds not turned", "parallel/lower.py", "[k0, k1, q0, q1, -hi, -lo]", "[k0, k1, q0, q1, lo, hi]"),
    Bug("queries travel: residue not turned", "parallel/lower.py", "-self.residue % self.modulus", "self.residue % self.modulus"),
    Bug(
        "chunks are not cut inside a run",
        "parallel/lower.py",
        "n = min(run.length - done, cuts[piece] - offset)",
        "n = run.length - done",
        PLAN,
    ),
    Bug(
        "a step for a chunk that nobody needs",
        "parallel/world.py",
        "order = nearest[rows[nearest] > 0]",
        "order = nearest",
        COMPACT,
    ),
    Bug(
        "a block's gradients cross the slow links before the neighbours' are in",
        "parallel/world.py",
        "Way(slot, s + inner if inner > 1 else s, inner > 1)",
        "Way(slot, s + inner - 1 if inner > 1 else s, inner > 1)",
    ),
    Bug(
        "nothing is computed while a double ring's last gradients cross",
        "parallel/world.py",
        "min(n_near * block // n_blocks, n_near - 2 * spare)",
        "min(n_near * block // n_blocks, n_near)",
        SPARE,
    ),
    Bug(
        "what is left of the local work starts a tile late",
        "parallel/plan.py",
        "clipped(end, first * tile), clipped(begin, first * tile)",
        "clipped(end, first * tile), clipped(begin, first * tile + 1)",
    ),
    Bug(
        "what is left of the local work is computed first",
        "parallel/plan.py",
        "return steps + last",
        "return steps[:1] + last + steps[1:]",
    ),
    Bug(
        "what crosses slow links holds up the next step",
        "parallel/plan.py",
        "slot + (self.blocks_late * self.key.schedule.inner if self.far[step] else 1)",
        "slot + 1",
        DUE,
    ),
    Bug(
        "a double ring's neighbours send what their neighbour sees nothing of",
        "parallel/world.py",
        "for piece in pieces_of(owner) if world.sees(rank, piece)]",
        "for piece in pieces_of(owner)]",
        PLAN,
    ),
    Bug(
        "a double ring's neighbours send less than their neighbour sees",
        "parallel/world.py",
        "return self._seen is None or (rank, piece) in self._seen",
        "return self._seen is None or (rank, piece) in self._seen and piece % 2 == 0",
        PLAN,
    ),
    Bug(
        "zigzag's second piece from the wrong end",
        "parallel/layout.py",
        "at + 2 * world - 1 - r",
        "at + world + r",
        LAYOUT,
    ),
    # heads
    Bug(
        "Ulysses: peers are sent the own heads",
        "parallel/heads.py",
        "_parts(x, 2, cut.heads, run)) for run in",
        "_parts(x, 2, cut.heads, range(me, me + 1)).expand(len(run), -1, -1, -1, -1)) for run in",
    ),
    Bug(
        "Ulysses: a query head reads the wrong key head",
        "parallel/heads.py",
        "return torch.cat([x[:, :, k : k + 1]",
        "return torch.cat([x[:, :, len(_served(index)) - k - 1 : len(_served(index)) - k]",
    ),
    Bug(
        "Ulysses: gradients of a shared key head not added",
        "parallel/heads.py",
        "span] += of.get(member, own)",
        "span] = of.get(member, own)",
    ),
    Bug(
        "Ulysses: key heads that are shared are taken for somebody's own",
        "parallel/plan.py",
        "for share in self.shares) > self.key.kv_heads",
        "for share in self.shares) > 2 * self.key.kv_heads",
    ),
    Bug(
        "Ulysses: heads are put where they go before they are home",
        "parallel/heads.py",
        "yield POSTED\n        self._wait(step, pending)",
        "yield POSTED",
    ),
    Bug(
        "Ulysses: a group of heads in another one's place",
        "ringflash/autograd.py",
        "into = (_heads(out, i, n), None",
        "into = (_heads(out, n - 1 - i, n), None",
        GROUPS,
    ),
    Bug(
        "Ulysses: a group's heads are saved in another one's place",
        "ringflash/autograd.py",
        "kept.extend(results[2:] if job.tracked else ())",
        "kept[:0] = results[2:]",
        GROUPS,
    ),
    Bug(
        "heads: a reader begins where its own block for the owner would",
        "parallel/heads.py",
        "begins(m)[0][i, me]",
        "begins(me)[0][i, m]",
        DRAWN_SYMMETRIC,
    ),
    Bug(
        "heads: blocks for several members without what aligns them",
        "parallel/heads.py",
        "stride = block_bytes(self.plan, step == 0, self.plan.member, run[0], traded[i])",
        "stride = x[0].numel() * x.element_size()",
        DRAWN_SYMMETRIC,
    ),
    Bug(
        "heads: ranks make buffers of different sizes",
        "parallel/heads.py",
        "False: max(plan.key.q_layout.lengths)",
        "False: plan.key.q_layout.lengths[plan.key.rank]",
        DRAWN_SYMMETRIC,
    ),
    # symmetric memory
    Bug(
        "symmetric: a buffer is written while it is read",
        "parallel/transport/symmetric.py",
        "return [Op(True, address, 0) for address in busy]",
        "return [Op(False, address, 0) for address in busy]",
        SYMMETRIC,
    ),
    Bug(
        "symmetric: a reader does not wait for the owner",
        "parallel/transport/symmetric.py",
        "(Op(True, address, 1), Op(False, address, 0))",
        "(Op(False, address, 0),)",
        SYMMETRIC,
    ),
    Bug(
        "symmetric: the other buffer is read",
        "parallel/transport/symmetric.py",
        "lane.shared.addresses[self.place[peer]] + index * lane.size",
        "lane.shared.addresses[self.place[peer]] + (1 - index) * lane.size",
        DRAWN_SYMMETRIC,
    ),
    Bug(
        "domains: one buffer too few for what is passed on",
        "parallel/transport/__init__.py",
        "return max(1 + sum(slots[later] <= end for later in far[i + 1 :]) for i, end in enumerate(ends))",
        "return max(1, max(sum(slots[later] <= end for later in far[i + 1 :]) for i, end in enumerate(ends)))",
        DRAWN_DOMAINS,
    ),
    Bug(
        "domains: each rank has its own count of what is passed on",
        "parallel/transport/symmetric.py",
        'turn = lane.passes if what == "heads" or not step else lane.turns[step]',
        'turn = lane.passes if what == "heads" or not step else lane.turns[step] + (lane.kind == RELAYS and self.rank)',
        DRAWN_DOMAINS,
    ),
    Bug(
        "symmetric: a reader leaves after the first piece",
        "parallel/transport/symmetric.py",
        "if lane.begun[step, peer] == lane.reads[step, peer]:",
        "if lane.begun[step, peer] == 1:",
        SYMMETRIC,
    ),
    Bug(
        "symmetric: a rank without heads does not alternate",
        "parallel/transport/symmetric.py",
        "        lane.passes += 1\n",
        '        lane.passes += what != "heads" or plan.share.q_heads > 0\n',
        SYMMETRIC,
    ),
    Bug(
        "symmetric: a buffer of heads is never given back",
        "parallel/transport/symmetric.py",
        "+ member): 1 for member",
        "+ member): 2 for member",
        SYMMETRIC,
    ),
    Bug(
        "symmetric: a buffer is leased before its last signals are waited for",
        "parallel/transport/symmetric.py",
        "            pull.join()\n",
        "            pass\n",
        DRAWN_SYMMETRIC,
    ),
    # groups of heads, known calls
    Bug(
        "gradients of a group of heads in another one's place",
        "ringflash/autograd.py",
        "_heads(whole, i, n).copy_(result)",
        "_heads(whole, n - 1 - i, n).copy_(result)",
        GROUPS,
    ),
    Bug("a known call forgets the softcap", "ringflash/api.py", "mask, scale, softcap,\n", "mask, scale,\n", KNOWN),
    # the loops
    Bug("sign of dlse", "ringflash/autograd.py", "else arrived[1].squeeze(-1)", "else -arrived[1].squeeze(-1)"),
    Bug("dlse ignored", "ringflash/autograd.py", "rowsum_delta(dout, saved.out, dlse)", "rowsum_delta(dout, saved.out, None)"),
    Bug(
        "sinks ignored in backward",
        "ringflash/autograd.py",
        "= -(weight * delta).sum((0, 2))",
        "= 0 * -(weight * delta).sum((0, 2))",
    ),
    Bug("sign of dsinks", "ringflash/autograd.py", "= -(weight * delta).sum((0, 2))", "= (weight * delta).sum((0, 2))"),
    Bug("sinks ignored in forward", "ringflash/autograd.py", "lse.copy_(sinks.to(acc)", "lse.add_(0 * sinks.to(acc)"),
    Bug("empty rows start with weight", "ringflash/autograd.py", 'float("-inf"), dtype=acc', "0.0, dtype=acc"),
    Bug(
        "scale dropped in backward",
        "ringflash/autograd.py",
        "scale=job.scale,\n                softcap=job.softcap,\n                dq=",
        "scale=1.0,\n                softcap=job.softcap,\n                dq=",
    ),
    Bug(
        "softcap dropped in backward",
        "ringflash/autograd.py",
        "softcap=job.softcap,\n                dq=",
        "softcap=0.0,\n                dq=",
    ),
    Bug(
        "running state in the inputs' dtype",
        "ringflash/kernels/running.py",
        "return torch.float64 if dtype == torch.float64 else torch.float32",
        "return dtype",
        PRECISION,
    ),
    Bug(
        "kernel finishes after every step",
        "ringflash/autograd.py",
        "finish=direct and part is last",
        "finish=direct",
        PRECISION + FAST,
    ),
    # transport
    Bug(
        "log-sum-exp and delta change places on the way",
        "parallel/transport/__init__.py",
        "_tail(part, x.dtype)[..., i] = x[",
        "_tail(part, x.dtype)[..., 1 - i] = x[",
    ),
    Bug(
        "remote queries with the local output",
        "ringflash/autograd.py",
        "dlse is None and (step.local or not turned)",
        "dlse is None",
        TURNED,
    ),
    Bug("gradient of a passed-on chunk lost", "parallel/transport/__init__.py", "target.add_(source)", "target.copy_(source)"),
    Bug("gradients not brought home", "parallel/transport/__init__.py", "target.add_(source)", "target.add_(source, alpha=0)"),
    Bug(
        "keys sent in place of values",
        "parallel/transport/__init__.py",
        "torch.cat(wide, dim=-1",
        "torch.cat(wide[::-1], dim=-1",
    ),
    Bug(
        "the last row that leaves is not packed",
        "parallel/transport/__init__.py",
        "return tuple(joined) if few",
        "return tuple((a, b - 1) for a, b in joined) if few",
        CARGO,
    ),
    Bug(
        "the backward takes the multiprocessors of slow lanes",
        "ringflash/autograd.py",
        "    kernel = leaving(kernel, job.transport.multiprocessors(plan))",
        "    kernel = leaving(kernel, 0)",
        LANES,
    ),
    Bug(
        "a buffer is forgotten before it is passed on",
        "parallel/transport/__init__.py",
        "last[leg.step] = max(last[leg.step], n)",
        "last[leg.step] = last[leg.step]",
    ),
    Bug(
        "all-to-all: a peer's second message is its first again",
        "parallel/transport/alltoall.py",
        "self.starts[m.peer] = start + size",
        "self.starts[m.peer] = start",
        REAL,
    ),
    Bug(
        "handshake does not compare masks",
        "ringflash/api.py",
        '"mask": f"{call.mask!r} #{call.mask.digest()}"',
        '"mask": ""',
        AGREE,
    ),
    # kernels and merge
    Bug("missing rescale in the merge", "ringflash/merge.py", "out.mul_(_per_row(weight)).addcmul_(", "out.addcmul_("),
    Bug(
        "merge gives a part too much weight",
        "ringflash/merge.py",
        "weight_part = torch.sigmoid(difference)",
        "weight_part = torch.sigmoid(difference + 0.01)",
    ),
    Bug(
        "running maximum not taken off the output",
        "ringflash/kernels/reference.py",
        "out = out * keep + _product",
        "out = out + _product",
    ),
    Bug(
        "slope of the cap missing",
        "ringflash/kernels/reference.py",
        "dscores.mul_(1 - (scores / self.softcap).square_())",
        "pass",
    ),
    Bug(
        "a NaN key reaches rows that do not see it",
        "ringflash/kernels/reference.py",
        "if finite or visible is None:",
        "if True:",
        NONFINITE,
    ),
    # the sequence over ranks
    Bug(
        "labels shifted after the cut",
        "parallel/context.py",
        "return self.shard(shifted, dim)",
        "return torch.roll(self.shard(labels, dim), -1, dim)",
        SHARD,
    ),
    Bug(
        "loss averaged over the own tokens",
        "parallel/context.py",
        "count = total[1].clamp(min=1)",
        "count = (labels != ignore_index).sum().double().clamp(min=1)",
        SHARD,
    ),
    Bug(
        "unshard's gradient from the own copy only",
        "parallel/context.py",
        "dist.all_reduce(total, group=group)\n        return take",
        "return take",
        SHARD,
    ),
    # pulled rows
    Bug(
        "a pull begins behind the rows it is for",
        "parallel/plan.py",
        "stage[: stage.index(piece)]",
        "stage[: stage.index(piece) + 1]",
        ITINERARY,
    ),
    # models of Hugging Face
    Bug("a model's window is dropped", "ringflash/hf/masks.py", "Mask.causal(self.window) if", "Mask.causal() if", MODELS),
    Bug(
        "packed sequences see each other",
        "ringflash/hf/layers.py",
        "return Seen(words, q_length, kv_length, now.documents, of=now)",
        "return Seen(words, q_length, kv_length, None, of=now)",
        MODELS,
    ),
    Bug(
        "positions count from the rank's first token",
        "ringflash/hf/parallel.py",
        "words[name] = view.shard(words[name], dim=1)",
        "words[name] = view.shard(words[name], dim=1) if name != SHARDED[2] else words[name][:, : len(view.positions(S))]",
        MODELS,
    ),
    Bug(
        "labels of a model shifted after the cut",
        "ringflash/hf/parallel.py",
        "value=IGNORED)[..., 1:])",
        "value=IGNORED)[..., :-1])",
        MODELS,
    ),
    Bug(
        "a model's gradients are not scaled for the mean",
        "ringflash/hf/parallel.py",
        "return grad * ctx.factor",
        "return grad",
        MODELS,
    ),
    Bug(
        "ranks with other batches are not told",
        "ringflash/hf/parallel.py",
        "agreement.agree(facts)",
        "agreement.gather(facts)",
        NOT_THE_SAME,
    ),
)


def patched(bug: Bug, root: Path) -> str:
    """The file's text with the bug in it. Raises ValueError unless the patch applies at exactly one place."""
    text = (root / bug.file).read_text()
    if text.count(bug.old) != 1 or bug.old == bug.new:
        raise ValueError(
            f"bug {bug.name!r}: {bug.old!r} occurs {text.count(bug.old)} times in {bug.file}; bring the patch up to date"
        )
    return text.replace(bug.old, bug.new)


@dataclass(frozen=True)
class Verdict:
    bug: Bug
    caught: bool
    by: str
    seconds: float


def serve_tests(root: str, tests: Sequence[str], said: str) -> None:
    """In a process of its own: runs pytest in a tree, writes to the file ``said``, and exits with pytest's status."""
    sink = os.open(said, os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    os.chdir(root)
    sys.path.insert(0, root)
    sys.dont_write_bytecode = True
    os.environ["PYTHONPATH"] = root  # for the processes that tests start
    command = ["-x", "-q", "--tb=line", "-p", "no:cacheprovider", "-p", "no:xdist", f"--rootdir={root}", *tests]
    status = pytest.main(command)
    module = sys.modules.get("ringflash")
    if module is not None and not str(module.__file__).startswith(root):
        print(f"the tests ran {module.__file__} in place of the copy with the bug")
        status = 99
    sys.stdout.flush()
    os._exit(int(status))


def run_tests(root: Path, tests: Sequence[str]) -> tuple[int, str]:
    """Exit status of pytest in a tree, and the first failure or the end of the output."""
    said = root / "said.txt"
    process = _context.Process(target=serve_tests, args=(str(root), tuple(tests), str(said)))
    process.start()
    process.join(TIMEOUT_S)
    if process.exitcode is None:
        process.kill()
        process.join()
        return 1, f"no end within {TIMEOUT_S} s"
    text = said.read_text(errors="replace")
    failure = re.search(r"^FAILED (?:tests/)?(.*?)(?: - .*)?$", text, re.MULTILINE)
    return process.exitcode, failure.group(1) if failure else text[-500:]


def copy_tree(root: Path) -> None:
    """The tree as it is, without what was built."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "_lib")
    for name in TREE:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, root / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy2(source, root / name)
    (root / "sitecustomize.py").write_text(f"import sys\n{FORGET_INSTALLED}\n")


def judge(bug: Bug) -> Verdict:
    """Runs the tests on a tree with the bug."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ringflash_mutant_") as folder:
        root = Path(folder).resolve()
        copy_tree(root)
        (root / bug.file).write_text(patched(bug, root))
        status, said = run_tests(root, bug.tests)
    if status not in (0, 1):
        raise RuntimeError(f"bug {bug.name!r}: pytest ended with {status} before it tested anything: {said}")
    return Verdict(bug, status == 1, said if status == 1 else "nothing", time.monotonic() - begin)


def check_unharmed(tests: set[str]) -> None:
    """The same tests pass on the tree as it is, else a failure would prove nothing."""
    with tempfile.TemporaryDirectory(prefix="ringflash_mutant_") as folder:
        root = Path(folder).resolve()
        copy_tree(root)
        status, said = run_tests(root, sorted(tests))
    if status:
        raise RuntimeError(f"the tests fail without any bug: {said}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="bugs whose name contains this, several separated by |")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="bugs at a time")
    parser.add_argument("--trust", action="store_true", help="do not first run the tests without a bug")
    options = parser.parse_args(arguments)
    bugs = [bug for bug in BUGS if re.search(options.only, bug.name)]
    for bug in bugs:
        patched(bug, ROOT)
    if options.list:
        print("\n".join(bug.name for bug in bugs))
        return 0
    if not options.trust:
        check_unharmed({test for bug in bugs for test in bug.tests})
    survivors = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        print("| seeded bug | file | caught by | s |\n|---|---|---|---|")
        for verdict in pool.map(judge, bugs):
            survivors += not verdict.caught
            by = f"`{verdict.by}`" if verdict.caught else "**SURVIVED**"
            print(f"| {verdict.bug.name} | {verdict.bug.file} | {by} | {verdict.seconds:.0f} |", flush=True)
    print(f"\n{len(bugs) - survivors} of {len(bugs)} caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
