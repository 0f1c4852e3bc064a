"""The package and its build: what a wheel holds, what the build refuses, what the check of the kernels catches."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from ringflash import ops

ROOT = Path(__file__).resolve().parent.parent

CLEAN = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z6kernelPf' for 'sm_90a'
ptxas info    : Function properties for _Z6kernelPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 2 barriers, 1024 bytes smem, 16 bytes cmem[0]
ptxas info    : Compile time = 9.237 ms
"""


# -------------------------------------------------------------------------------------------------- packaging


def build(kind: str, source: Path, target: Path) -> Path:
    """Calls the build backend (kind: sdist or wheel) in ``source``, without CUDA; the path of what it made."""
    code = f"from scikit_build_core.build import build_{kind} as b; print('made', b({str(target)!r}))"
    env = {**os.environ, "RINGFLASH_CUDA": "OFF"}
    done = subprocess.run([sys.executable, "-c", code], cwd=source, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return target / done.stdout.split("made ")[-1].strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from the source distribution, as an installer builds it."""
    from scikit_build_core.build import get_requires_for_build_wheel

    if missing := get_requires_for_build_wheel():
        pytest.skip(f"a build outside of pip's isolation needs {', '.join(missing)}")
    folder = tmp_path_factory.mktemp("build")
    with tarfile.open(build("sdist", ROOT, folder)) as archive:
        archive.extractall(folder)
    (source,) = (path for path in folder.iterdir() if path.is_dir())
    return zipfile.ZipFile(build("wheel", source, folder))


def package_files() -> set[str]:
    """Files of the package in the source tree, symbolic links followed."""
    found = (Path(folder) / name for folder, _, files in os.walk(ROOT / "ringflash", followlinks=True) for name in files)
    return {path.relative_to(ROOT).as_posix() for path in found if path.suffix in (".py", ".yaml", ".typed")}


def test_the_wheel_built_from_the_sdist_holds_the_whole_package(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    assert not package_files() - names
    assert {name.split("/")[0] for name in names} == {"ringflash", *(n.split("/")[0] for n in names if ".dist-info/" in n)}


def test_the_wheel_fits_every_python(wheel: zipfile.ZipFile) -> None:
    assert re.fullmatch(r"ringflash-[\d.]+-py3-none-\w+\.whl", Path(str(wheel.filename)).name)
    (metadata,) = (wheel.read(name).decode() for name in wheel.namelist() if name.endswith("METADATA"))
    for line in ("Requires-Python: >=3.10", "Requires-Dist: torch>=2.11", "Requires-Dist: numpy"):
        assert line in metadata.splitlines()
    (entry_points,) = (wheel.read(name).decode() for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "ringflash = ringflash.cli:main" in entry_points.replace("=", " = ").replace("  ", " ")


def test_the_sources_are_python_3_10() -> None:
    sources = [name for name in package_files() if name.endswith(".py")]
    assert sources
    for name in sources:
        ast.parse((ROOT / name).read_text(), filename=name, feature_version=(3, 10))


def test_the_top_level_folders_are_no_packages_of_their_own() -> None:
    import ringflash.launch
    import ringflash.parallel

    assert ringflash.parallel.__name__ == "ringflash.parallel"
    assert not {"parallel", "launch", "transport"} & set(sys.modules)


# ------------------------------------------------------------------------------------------------------ CMake


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
@pytest.mark.parametrize(
    ("cuda", "message"),
    [("MAYBE", "RINGFLASH_CUDA is 'MAYBE'; allowed: AUTO, ON, OFF"), ("ON", "RINGFLASH_CUDA=ON, but nvcc")],
)
def test_cmake_names_what_is_wrong(cuda: str, message: str, tmp_path: Path) -> None:
    env = {**os.environ, "CUDACXX": str(tmp_path / "no-such-nvcc")}
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path / "build"), f"-DRINGFLASH_CUDA={cuda}"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert message in " ".join(done.stderr.split())


def test_the_library_exports_its_api_and_needs_no_cuda_libraries() -> None:
    lib = ops.library()
    if lib is None:
        pytest.skip("this installation has no device library (built without nvcc)")
    headers = [ROOT / "csrc" / "api.h", *((ROOT / "csrc" / "hopper").glob("*.h") if lib.rf_has_hopper() else ())]
    declared = {name for path in headers for name in re.findall(r"^RF_API .*?\b(rf_\w+)\(", path.read_text(), re.MULTILINE)}
    assert {"rf_abi_version", "rf_error_string", "rf_merge"} <= declared
    assert [name for name in declared if not hasattr(lib, name)] == []
    if shutil.which("readelf") is None:
        pytest.skip("the rest needs readelf")
    text = subprocess.run(["readelf", "-W", "-d", "--dyn-syms", lib._name], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", text)
    assert needed and not [name for name in needed if re.match("lib(cuda|torch|c10|python)", name)]
    defined = re.findall(r" (?:GLOBAL|WEAK)\s+\w+\s+(?!UND)\w+ (\S+)", text)
    assert defined and not [name for name in defined if not name.startswith("rf_")]


# ---------------------------------------------------------------------------------------- the check of the kernels


@pytest.fixture
def tree(tmp_path: Path) -> tuple[Path, Path]:
    """(build, csrc): two units built cleanly."""
    for unit in ("api.cu", "hopper/forward.cu"):
        source = tmp_path / "csrc" / unit
        report = tmp_path / "build" / "x.dir" / "csrc" / f"{unit}.o.ptxas"
        for path, text in ((source, ""), (report, CLEAN)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return tmp_path / "build", tmp_path / "csrc"


def test_clean_reports_pass(check_ptxas: ModuleType, tree: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert check_ptxas.main([str(tree[0]), "--sources", str(tree[1])]) == 0
    output = capsys.readouterr().out
    assert "2 kernels, 0 problems" in output
    assert re.search(r"168 +0 +0 +1024 +sm_90a +hopper/forward.cu", output)


LAST = "ptxas info    : Compile time"
SERIALISED = "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized"
CALLEE = """\
ptxas info    : Function properties for _Z4helpv
    8 bytes stack frame, 12 bytes spill stores, 0 bytes spill loads"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("0 bytes spill stores", "8 bytes spill stores", "8 bytes of registers spilled"),
        ("0 bytes spill loads", "4 bytes spill loads", "4 bytes of registers spilled"),
        (LAST, f"{SERIALISED}\n{LAST}", "(C7510) Potential Performance Loss"),
        (LAST, f"{CALLEE}\n{LAST}", "12 bytes spilled in a device function"),
        (CLEAN, "", "no kernel in any report"),
    ],
    ids=["stores", "loads", "serialised", "callee", "empty"],
)
def test_a_bad_report_fails(
    check_ptxas: ModuleType, tree: tuple[Path, Path], capsys: pytest.CaptureFixture[str], old: str, new: str, message: str
) -> None:
    assert old in CLEAN
    reports = sorted(tree[0].rglob("*.ptxas"))
    for report in reports if not new else reports[1:]:
        report.write_text(CLEAN.replace(old, new))
    assert check_ptxas.main([str(tree[0]), "--sources", str(tree[1])]) == 1
    assert message in capsys.readouterr().err


def test_a_unit_left_out_fails_and_a_stale_report_is_ignored(
    check_ptxas: ModuleType, tree: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(tree[0]), "--sources", str(tree[1])]
    stale = tree[0] / "x.dir" / "csrc" / "gone.cu.o.ptxas"
    stale.write_text(CLEAN.replace("0 bytes spill stores", "8 bytes spill stores"))
    assert check_ptxas.main(arguments) == 0
    (tree[1] / "new.cu").write_text("")
    assert check_ptxas.main(arguments) == 1
    assert "new.cu: no report of ptxas" in capsys.readouterr().err


@pytest.mark.parametrize("status", [0, 3])
def test_the_compiler_launcher_keeps_the_report_and_the_status(tmp_path: Path, status: int) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\ncat >&2 <<'END'\n{CLEAN}api.cu(3): warning: unused variable\nEND\nexit {status}\n")
    compiler.chmod(0o755)
    command = ["sh", str(ROOT / "scripts" / "keep_ptxas_log.sh"), str(compiler), "-c", "api.cu", "-o", str(tmp_path / "api.cu.o")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == status
    assert "unused variable" in done.stderr
    report = tmp_path / "api.cu.o.ptxas"
    if status == 0:
        assert report.read_text().startswith(CLEAN)
        assert "ptxas info" not in done.stderr
    else:
        assert not report.exists()
