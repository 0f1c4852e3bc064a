#!/usr/bin/env python3
"""Checks what ptxas said of every shipped kernel: no register spills, no serialised wgmma (C75xx), no unit left out.

usage: check_ptxas.py BUILD_FOLDER [--sources csrc]

The build keeps the report of each unit beside its object file (``*.cu.o.ptxas``, see ``keep_ptxas_log.sh``). Prints one row per
kernel and architecture and exits with 1 if anything is wrong. Needs no GPU and nothing but Python's standard library.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ENTRY = re.compile(r"Compiling entry function '(?P<name>[^']+)' for '(?P<arch>sm_\w+)'")
FRAME = re.compile(r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads")
USED = re.compile(r"Used (?P<registers>\d+) registers")
SHARED = re.compile(r"(?P<shared>\d+) bytes smem")
PROPERTIES = re.compile(r"Function properties for (?P<name>\S+)")
ADVICE = re.compile(r"\(C75\d\d\).*")


@dataclass
class KernelReport:
    """What ptxas said of one entry function for one architecture; sizes in bytes."""

    unit: str
    name: str
    arch: str
    registers: int = 0
    stack: int = 0
    spilled: int = 0
    shared: int = 0

    def problems(self) -> list[str]:
        where = f"{self.unit}: {self.name} for {self.arch}"
        return [f"{where}: {self.spilled} bytes of registers spilled"] if self.spilled else []


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
    print(f"{'registers':>9} {'stack':>6} {'spilled':>7} {'shared':>6}  {'arch':<7} kernel")
    for k in kernels:
        print(f"{k.registers:>9} {k.stack:>6} {k.spilled:>7} {k.shared:>6}  {k.arch:<7} {k.unit}: {names[k.name]}")
    for problem in problems:
        print("error: " + re.sub(r"_Z\w+", lambda match: names.get(match[0], match[0]), problem), file=sys.stderr)
    print(f"{len(kernels)} kernels, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
