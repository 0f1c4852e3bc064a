"""The arrows of DESIGN section 3, read from the imports, and the one package name."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

ORDER = (
    "ringflash.slices",
    "ringflash.mask",
    "ringflash.parallel.layout",
    "ringflash.parallel.plan",
    "ringflash.parallel.sharding",
    "ringflash.parallel.transport",
    "ringflash.parallel.heads",
    "ringflash.autograd",
    "ringflash.parallel.context",
    "ringflash.api",
    "ringflash.simulated",
)
"""Each may import what stands before it, never what stands after it."""


def path_of(module: str) -> Path:
    relative = Path(*module.split(".")[1:])
    base = ROOT / (relative if relative.parts[0] == "parallel" else "ringflash" / relative)
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


def imports_of(path: Path) -> set[str]:
    """All modules a file imports, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path} imports relatively"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("module", ORDER)
def test_arrows_point_one_way(module: str) -> None:
    later = ORDER[ORDER.index(module) + 1 :]
    wrong = {name for name in imports_of(path_of(module)) if any(name == m or name.startswith(m + ".") for m in later)}
    assert not wrong


def test_kernels_and_transports_do_not_know_each_other() -> None:
    for path in (ROOT / "ringflash" / "kernels").glob("*.py"):
        assert not {name for name in imports_of(path) if name.startswith("ringflash.parallel")}, path
    for path in (ROOT / "parallel").rglob("*.py"):
        assert not {name for name in imports_of(path) if name.startswith("ringflash.kernels")}, path


def test_kernel_backends_import_only_reference_of_one_another() -> None:
    folder = ROOT / "ringflash" / "kernels"
    backends = {"cpu", "sdpa", "flash_attn", "hopper"}
    for name in backends:
        others = {f"ringflash.kernels.{other}" for other in backends - {name}}
        assert not others & imports_of(folder / f"{name}.py"), name


def test_nothing_generic_is_imported() -> None:
    code = "import sys, ringflash, ringflash.parallel.plan; sys.exit(any(m in sys.modules for m in ('parallel', 'launch')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_heavy_or_optional_packages_are_not_imported_with_the_library() -> None:
    heavy = ("hydra", "omegaconf", "matplotlib", "rich", "mpi4py", "flash_attn", "transformers")
    code = f"import sys, ringflash; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
