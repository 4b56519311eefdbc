"""The kernels compile here with nvcc, and no kernel spills, keeps local memory or has its wgmma serialised.

One head size by default, to stay within a few minutes on two cores; SA_TEST_HEAD_DIMS="64;96;128;256" compiles all. SA_KERNEL_BUILD names a build folder to use
(and to keep up to date), so that one build serves every job that needs the library.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernels.emulator.build import cutlass_include

ROOT = Path(__file__).resolve().parents[2]
REGISTERS = 255
GROUPS = {"attend_kernel", "sample_kernel", "attend_sm80_kernel", "sample_mass_sm80_kernel", "decode_kernel"}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built() -> Iterator[Path]:
    """A build folder with the library."""
    for tool in ("nvcc", "cmake"):
        if not shutil.which(tool):
            pytest.skip(f"{tool} was not found: the kernels were not compiled")
    if cutlass_include() is None:
        pytest.skip("the CUTLASS headers were not found (pip install --no-deps nvidia-cutlass==4.2.0.0): the kernels were not compiled")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(os.environ.get("SA_KERNEL_BUILD") or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        dims = os.environ.get("SA_TEST_HEAD_DIMS", "128")
        options = ["-DSA_CUDA=ON", f"-DSA_HEAD_DIMS={dims}", f"-DPython3_EXECUTABLE={sys.executable}"]
        with open(folder / ".lock", "w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for command in (["cmake", "-S", str(ROOT), "-B", str(folder), *options], ["cmake", "--build", str(folder), "-j2"]):
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                assert done.returncode == 0, "\n".join(re.findall(r".*(?:error|Error).*", done.stdout + done.stderr)[:20])
        yield folder


def test_resource_report(built):
    done = subprocess.run([sys.executable, str(ROOT / "plugins/dev/resources.py"), str(built)], capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    rows = [re.split(r"  +", line) for line in done.stdout.splitlines()[1:]]
    assert {row[1] for row in rows} >= GROUPS
    assert {"sm_80", "sm_90a"} <= {row[2] for row in rows}
    assert max(int(row[3]) for row in rows) <= REGISTERS


def test_a_spill_is_an_error(tmp_path):
    """The report's own reader: what a spill looks like, and what nothing looks like."""
    report = "ptxas info    : Compiling entry function '_ZN1a13attend_kernelEv' for 'sm_80'\n    {} bytes stack frame, {} bytes spill stores, 4 bytes spill loads\n"
    script = [sys.executable, str(ROOT / "plugins/dev/resources.py"), str(tmp_path)]
    empty = subprocess.run(script, capture_output=True, text=True, check=False)
    assert empty.returncode == 1
    assert "build the kernels there first" in empty.stderr
    (tmp_path / "x.cu.o.log").write_text(
        report.format(8, 4) + "ptxas info    : Used 255 registers, used 1 barriers, 8 bytes cumulative stack size\n"
    )
    spilled = subprocess.run(script, capture_output=True, text=True, check=False)
    assert spilled.returncode == 1
    assert spilled.stderr == "x: attend_kernel on sm_80 has 8 bytes of stack and 8 of spills.\n"
