#!/usr/bin/env python3
"""Checks what ptxas said of every shipped kernel: no register spills, no serialised wgmma (C75xx), no unit left out; and what it
made of the main loops of the Hopper forward: nothing moved into uniform registers there.

usage: check_ptxas.py BUILD_FOLDER [--sources csrc]

The build keeps the report of each unit beside its object file (``*.cu.o.ptxas``, see ``keep_ptxas_log.sh``). Prints one row per
kernel and architecture and exits with 1 if anything is wrong. Needs no GPU, no disassembler and nothing but Python's standard
library.

The main loops are found in the machine code itself: natural loops with matrix products that hold no other such loop. wgmma takes
its operands' addresses from uniform registers. ptxas computes them there as long as it knows every branch of the loop to be
uniform in the warp and they fit; else each thread computes them and moves them over (R2UR) before each product: 50 instructions a
step, 7-10 % of the rate (LOG.md, Hopper forward).
"""

from __future__ import annotations

import argparse
import re
import shutil
import struct
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ENTRY = re.compile(r"Compiling entry function '(?P<name>[^']+)' for '(?P<arch>sm_\w+)'")
FRAME = re.compile(r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads")
USED = re.compile(r"Used (?P<registers>\d+) registers")
SHARED = re.compile(r"(?P<shared>\d+) bytes smem")
PROPERTIES = re.compile(r"Function properties for (?P<name>\S+)")
ADVICE = re.compile(r"\(C75\d\d\).*")

UNIFORM_LOOPS = re.compile(r"forward_kernel")
"""Kernels whose main loops may hold no R2UR."""

# Machine code of sm_90: 16 bytes an instruction, its operation in the lowest 9 bits.
R2UR, BRANCH, EXIT, RETURN, HGMMA = 0x0CA, 0x147, 0x14D, 0x150, 0x1F0
EM_CUDA = 190


@dataclass
class KernelReport:
    """What ptxas said of one entry function for one architecture; sizes in bytes. ``moves``: R2UR in each of its main loops, None
    where the machine code was not looked at."""

    unit: str
    name: str
    arch: str
    registers: int = 0
    stack: int = 0
    spilled: int = 0
    shared: int = 0
    moves: list[int] | None = None

    def problems(self) -> list[str]:
        where = f"{self.unit}: {self.name} for {self.arch}"
        found = [f"{where}: {self.spilled} bytes of registers spilled"] if self.spilled else []
        if UNIFORM_LOOPS.search(self.name):
            if not self.moves:
                found.append(f"{where}: its machine code was not found beside the report, or no loop with matrix products in it")
            elif any(self.moves):
                found.append(f"{where}: {max(self.moves)} R2UR in a main loop, see the head of scripts/check_ptxas.py")
        return found


# ------------------------------------------------------------------------------------------------ machine code


def machine_code(binary: bytes) -> dict[str, list[tuple[int, int]]]:
    """The instructions, as two 64-bit words each, of the kernels whose cubins an object file holds (uncompressed)."""
    kernels: dict[str, list[tuple[int, int]]] = {}
    for match in re.finditer(rb"\x7fELF\x02\x01", binary):
        base = match.start()
        if struct.unpack_from("<H", binary, base + 18)[0] != EM_CUDA:
            continue
        (table,) = struct.unpack_from("<Q", binary, base + 40)
        entry_bytes, entries, names = struct.unpack_from("<HHH", binary, base + 58)
        sections = [struct.unpack_from("<IIQQQQ", binary, base + table + i * entry_bytes) for i in range(entries)]
        strings = base + sections[names][4]
        for name_at, _, _, _, offset, size in sections:
            name = binary[strings + name_at : binary.index(b"\0", strings + name_at)].decode()
            if name.startswith(".text."):
                words = struct.unpack_from(f"<{size // 8}Q", binary, base + offset)
                kernels[name.removeprefix(".text.")] = list(zip(words[::2], words[1::2], strict=True))
    return kernels


def branch_target(at: int, low: int) -> int:
    """Number of the instruction that the branch number ``at`` goes to: a signed distance in words of 4 bytes."""
    high = (low >> 34) - ((low >> 63) << 30)
    return at + 1 + (high << 8 | low >> 16 & 0xFF) // 4


def control_flow(code: list[tuple[int, int]]) -> tuple[list[int], list[list[int]]]:
    """Basic blocks: the first instruction of each (and an end), and the blocks that may follow each."""
    operations = [low & 0x1FF for low, _ in code]
    jumps = {i: branch_target(i, low) for i, (low, _) in enumerate(code) if operations[i] == BRANCH}
    ends = {i for i, operation in enumerate(operations) if operation in (BRANCH, EXIT, RETURN)}
    begins = sorted({0, len(code), *(i + 1 for i in ends), *(t for t in jumps.values() if 0 <= t < len(code))})
    block_of = {first: block for block, first in enumerate(begins)}
    follow: list[list[int]] = []
    for block, end in enumerate(begins[1:]):
        low, high = code[end - 1]
        always = low >> 12 & 0xF == 7 and high >> 23 & 0xF == 7  # neither a predicate nor a uniform one
        nexts = [] if end - 1 in ends and always else [block + 1]
        if end - 1 in jumps:
            nexts.append(block_of[jumps[end - 1]])
        follow.append([n for n in nexts if n < len(begins) - 1])
    return begins, follow


def natural_loops(follow: list[list[int]]) -> Iterator[tuple[int, int]]:
    """(head, last block) of every loop: a way back to a block that every way from the entry goes through."""
    before: dict[int, list[int]] = defaultdict(list)
    order: list[int] = []  # reverse postorder of what the entry reaches
    seen, stack = {0}, [(0, iter(follow[0]))]
    while stack:
        block, rest = stack[-1]
        following = next(rest, None)
        if following is None:
            order.insert(0, stack.pop()[0])
            continue
        before[following].append(block)
        if following not in seen:
            seen.add(following)
            stack.append((following, iter(follow[following])))
    place = {block: i for i, block in enumerate(order)}
    dominator = {0: 0}  # the closest block that every way goes through (Cooper, Harvey, Kennedy 2001)
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            ways = [b for b in before[block] if b in dominator]
            meet = ways[0]
            for way in ways[1:]:
                while meet != way:
                    if place[meet] > place[way]:
                        meet = dominator[meet]
                    else:
                        way = dominator[way]
            if dominator.get(block) != meet:
                dominator[block], changed = meet, True
    for block in order:
        for head in follow[block]:
            above = block
            while place[above] > place[head]:
                above = dominator[above]
            if above == head:
                yield head, block


def main_loops(code: list[tuple[int, int]]) -> list[range]:
    """The innermost loops with matrix products, as ranges of instructions."""
    begins, follow = control_flow(code)
    spans = {range(begins[head], begins[last + 1]) for head, last in natural_loops(follow)}
    loops = [span for span in spans if any(code[i][0] & 0x1FF == HGMMA for i in span)]
    inner = [a for a in loops if not any(b != a and a.start <= b.start and b.stop <= a.stop for b in loops)]
    return sorted(inner, key=lambda span: span.start)


# ---------------------------------------------------------------------------------------------------- reports


def parse(unit: str, text: str) -> tuple[list[KernelReport], list[str]]:
    """The kernels of one unit's report, and the problems that are the unit's rather than one kernel's."""
    kernels: list[KernelReport] = []
    problems: list[str] = []
    current: KernelReport | None = None
    in_callee = False
    for line in text.splitlines():
        if match := ENTRY.search(line):
            current = KernelReport(unit, match["name"], match["arch"])
            kernels.append(current)
        elif match := PROPERTIES.search(line):
            in_callee = current is None or match["name"] != current.name
        elif match := FRAME.search(line):
            spilled = int(match["stores"]) + int(match["loads"])
            if current is not None and not in_callee:
                current.stack, current.spilled = int(match["stack"]), spilled
            elif spilled:  # a function that was not inlined
                problems.append(f"{unit}: {spilled} bytes spilled in a device function")
        elif current is not None and (match := USED.search(line)):
            current.registers = int(match["registers"])
            if shared := SHARED.search(line):
                current.shared = int(shared["shared"])
        if match := ADVICE.search(line):
            problems.append(f"{unit}: {match[0]}")
    return kernels, problems


def check(build: Path, sources: Path) -> tuple[list[KernelReport], list[str]]:
    """Reads the reports of all units under ``sources``; a unit without one is a problem, a report without its unit is stale."""
    units = sorted(path.relative_to(sources).as_posix() for path in sources.rglob("*.cu"))
    kernels: list[KernelReport] = []
    problems: list[str] = [] if units else [f"{sources} holds no .cu file"]
    for unit in units:
        reports = list(build.rglob(f"{sources.name}/{unit}.o.ptxas"))
        if not reports:
            problems.append(f"{unit}: no report of ptxas under {build}: not built, or built with other options")
        for report in reports:
            found, wrong = parse(unit, report.read_text())
            binary = report.with_suffix("")
            code = machine_code(binary.read_bytes()) if binary.exists() else {}
            for kernel in found:
                if kernel.arch == "sm_90a" and kernel.name in code:
                    loops = main_loops(code[kernel.name])
                    kernel.moves = [sum(low & 0x1FF == R2UR for low, _ in code[kernel.name][x.start : x.stop]) for x in loops]
            kernels += found
            problems += wrong
    problems += [problem for kernel in kernels for problem in kernel.problems()]
    if units and not kernels:
        problems.append(f"no kernel in any report under {build}")
    return kernels, problems


def demangled(names: Iterable[str]) -> dict[str, str]:
    """Readable names where a demangler is installed, else the names as they are."""
    names = list(names)
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None or not names:
        return {name: name for name in names}
    lines = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True).stdout.splitlines()
    return dict(zip(names, lines, strict=True))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Checks the ptxas reports of a build.")
    parser.add_argument("build", type=Path, help="build folder, searched recursively")
    parser.add_argument("--sources", type=Path, default=Path(__file__).resolve().parent.parent / "csrc")
    arguments = parser.parse_args(argv)

    kernels, problems = check(arguments.build, arguments.sources)
    names = {
        mangled: re.sub(r"\(anonymous namespace\)::|_GLOBAL__N__\w+::|^void | *\[clone .*", "", name)[:100]
        for mangled, name in demangled(kernel.name for kernel in kernels).items()
    }
    print(f"{'R2UR':>5} {'registers':>9} {'stack':>6} {'spilled':>7} {'shared':>6}  {'arch':<7} kernel")
    for k in kernels:
        sizes = f"{k.registers:>9} {k.stack:>6} {k.spilled:>7} {k.shared:>6}"
        print(f"{max(k.moves) if k.moves else '-':>5} {sizes}  {k.arch:<7} {k.unit}: {names[k.name]}")
    for problem in problems:
        print("error: " + re.sub(r"_Z\w+", lambda match: names.get(match[0], match[0]), problem), file=sys.stderr)
    print(f"{len(kernels)} kernels, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
