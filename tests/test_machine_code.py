"""What scripts/check_ptxas.py reads in machine code: main loops, and what was moved into uniform registers there."""

from __future__ import annotations

import struct
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
KERNEL = "_ZN9ringflash14forward_kernelI13__nv_bfloat16EEvv"
REPORT = f"""\
ptxas info    : Compiling entry function '{KERNEL}' for 'sm_90a'
ptxas info    : Function properties for {KERNEL}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers
"""
ALWAYS = 0x000FEA0003800000
"""High word of a branch without a uniform predicate."""

Code = list[tuple[int, int]]


def assemble(text: str) -> Code:
    """One letter an instruction: H a product, R an R2UR, X exit, ``.`` anything else, ``b<n>`` a branch to instruction n and
    ``c<n>`` one under a predicate."""
    operations = {"H": 0x79F0, "R": 0x72CA, "X": 0x794D, ".": 0x7221}
    code: Code = []
    for at, word in enumerate(text.split()):
        if word[0] in "bc":
            distance = (int(word[1:]) - at - 1) * 4
            low = 0x947 | (7 if word[0] == "b" else 0) << 12 | (distance & 0xFF) << 16 | (distance >> 8 & 0x3FFFFFFF) << 34
            code.append((low, ALWAYS))
        else:
            code.append((operations[word], 0))
    return code


def cubin(code: Code) -> bytes:
    """An ELF file of the GPU with that one kernel."""
    names = f"\0.strtab\0.text.{KERNEL}\0".encode()
    text = b"".join(struct.pack("<QQ", *words) for words in code)
    header = b"\x7fELF\x02\x01".ljust(16, b"\0") + struct.pack("<HHIQQQIHHHHHH", 2, 190, 1, 0, 0, 64, 0, 64, 56, 0, 64, 3, 1)
    at = 64 + 3 * 64
    sections = [(0, 0, 0), (1, at, len(names)), (1 + len(".strtab\0"), at + len(names), len(text))]
    table = b"".join(struct.pack("<IIQQQQIIQQ", name, 1, 0, 0, begin, size, 0, 0, 1, 0) for name, begin, size in sections)
    return header + table + names + text


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        (". H H X", []),
        (". . H R c1 X", [(1, 5)]),
        (". . c1 X", []),
        (". H R c1 . H c5 . c0 X", [(1, 4), (5, 7)]),
        # A slow path out of line that comes back into the middle branches backwards, too, but is no loop.
        (". c8 . H c1 . H X . c2 b2", [(1, 5)]),
        # A loop whose jump back is unconditional and whose way out is not.
        (". c4 H b1 X", [(1, 4)]),
    ],
    ids=["straight", "one", "no product", "two in one", "slow path", "jump back"],
)
def test_main_loops(check_ptxas: ModuleType, text: str, loops: list[tuple[int, int]]) -> None:
    assert [(loop.start, loop.stop) for loop in check_ptxas.main_loops(assemble(text))] == loops


def test_code_is_found_in_an_object_file(check_ptxas: ModuleType) -> None:
    code = assemble(". . H c1 X")
    host = b"\x7fELF\x02\x01".ljust(16, b"\0") + struct.pack("<HH", 1, 62).ljust(48, b"\0")
    assert check_ptxas.machine_code(host + b"filling" + cubin(code)) == {KERNEL: code}


@pytest.mark.parametrize(
    ("text", "message"),
    [(". R . H c2 X", None), (". . R H c2 X", "1 R2UR in a main loop"), (". R H . X", "no loop"), (None, "was not found")],
    ids=["outside", "inside", "no loop", "no code"],
)
def test_a_main_loop_that_is_not_uniform_fails(
    check_ptxas: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, message: str | None
) -> None:
    (tmp_path / "csrc").mkdir()
    (tmp_path / "build" / "csrc").mkdir(parents=True)
    (tmp_path / "csrc" / "forward.cu").write_text("")
    (tmp_path / "build" / "csrc" / "forward.cu.o.ptxas").write_text(REPORT)
    if text is not None:
        (tmp_path / "build" / "csrc" / "forward.cu.o").write_bytes(cubin(assemble(text)))
    status = check_ptxas.main([str(tmp_path / "build"), "--sources", str(tmp_path / "csrc")])
    output = capsys.readouterr()
    assert status == (message is not None)
    assert message is None or message in output.err
