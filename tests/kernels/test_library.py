"""Without a device: the library loads, its structs agree with Python's, and support and workspace answer in sentences and bytes."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from graph_passes.op import Policy
from sa_export.errors import UserError
from sa_export.kernels import find_library, is_full, make_problem, supports, workspace_bytes
from sa_export.kernels import native as door

ROOT = Path(__file__).resolve().parents[2]
SPARSE = Policy(policy="residue", stride=16, min_length=0)


def _problem(policy=SPARSE, **changes):
    return make_problem(
        **{"batch": 1, "heads": 32, "kv_heads": 8, "queries": 8192, "keys": 8192, "head_dim": 128, "policy": policy, **changes}
    )


def test_a_missing_library_names_the_cure(monkeypatch, tmp_path):
    monkeypatch.setenv("SA_EXPORT_KERNELS", str(tmp_path / "absent.so"))
    with pytest.raises(UserError, match="is not a file; set it to the path"):
        find_library()


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler: the header was not compiled")
def test_structs_agree_with_the_header(tmp_path):
    structs = {
        "sa_problem": door.Problem,
        "sa_tensor": door.Tensor,
        "sa_block_lists": door.BlockLists,
        "sa_prefill_params": door.PrefillParams,
    }
    lines = []
    for name, struct in structs.items():
        lines.append(f'printf("{name} %zu\\n", sizeof({name}));')
        lines += [f'printf("{name}.{field[0]} %zu\\n", offsetof({name}, {field[0]}));' for field in struct._fields_]
    source = tmp_path / "layout.c"
    source.write_text('#include <stdio.h>\n#include "sample_attention/c_api.h"\nint main(void) {\n' + "\n".join(lines) + "\nreturn 0;\n}\n")
    program = tmp_path / "layout"
    subprocess.run(["cc", "-std=c99", "-Wall", "-Werror", "-I", str(ROOT / "plugins/include"), str(source), "-o", str(program)], check=True)
    printed = dict(line.split() for line in subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout.splitlines())
    for name, struct in structs.items():
        assert int(printed[name]) == ctypes.sizeof(struct)
        for field in struct._fields_:
            assert int(printed[f"{name}.{field[0]}"]) == getattr(struct, field[0]).offset, (name, field[0])


@pytest.mark.usefixtures("library")
class TestBuilt:
    def test_what_is_built_is_supported(self):
        for head_dim in (64, 96, 128, 256):
            for dtype in ("float16", "bfloat16"):
                assert supports(_problem(head_dim=head_dim, dtype=dtype)) == (True, "")

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"head_dim": 80}, ("head_dim 80", "64, 96, 128, 256")),
            ({"dtype": "float32"}, ("dtype", "float16", "bfloat16")),
            ({"heads": 30}, ("30", "kv_heads 8")),
            ({"queries": 9000}, ("9000", "8192", "queries <= keys")),
            ({"batch": 0}, ("batch 0", "at least 1")),
            ({"scale": -1.0}, ("scale is -1", "above 0")),
            ({"softcap": -2.0}, ("softcap is -2",)),
            ({"policy": Policy(policy="column_slash")}, ("column_slash", "residue")),
            ({"policy": Policy(policy="stripe_window")}, ("stripe_window", "tile")),
            ({"policy": SPARSE.replace(block_q=64)}, ("block_q is 64", "128")),
            ({"policy": SPARSE.replace(stride=64)}, ("stride is 64", "2, 4, 8, 16 or 32")),
            ({"policy": Policy(policy="tile", sample_rows=128)}, ("sample_rows is 128", "4, 8, 16, 32 and 64")),
            ({"policy": Policy(policy="tile", block_k=256)}, ("block_k is 256", "128")),
            ({"queries": 1 << 22, "keys": 1 << 22}, ("blocks", "larger block_k")),
        ],
    )
    def test_what_is_not_is_refused_with_its_value(self, changes, words):
        problem = _problem(**changes)
        ok, why = supports(problem)
        assert not ok
        for word in words:
            assert word in why, why
        assert why.endswith(".")
        assert workspace_bytes(problem) == 0

    def test_other_devices_are_refused(self):
        for capability in (75, 80, 86, 89, 100, 120):
            ok, why = supports(_problem(), capability)
            assert not ok
            assert f"{capability // 10}.{capability % 10}" in why

    def test_full_attention_by_specification(self):
        assert is_full(_problem(Policy(policy="dense")))
        assert is_full(_problem(Policy(min_length=8193)))
        assert is_full(_problem(Policy(min_length=0, alpha=(1.0,))))
        assert is_full(_problem(queries=16))
        assert not is_full(_problem())
        assert not is_full(_problem(Policy(min_length=0, alpha=(1.0,) * 31 + (0.9,))))

    def test_workspace_is_bounded(self):
        million = 1 << 20
        assert 0 < workspace_bytes(_problem(queries=million, keys=million)) <= 2 << 30
        small = workspace_bytes(_problem(queries=million, keys=million, scratch_bytes=64 << 20))
        assert small < workspace_bytes(_problem(queries=million, keys=million))
        assert workspace_bytes(_problem(Policy(policy="dense"))) < 1 << 20

    def test_workspace_grows_with_the_prompt(self):
        sizes = [workspace_bytes(_problem(queries=n, keys=n)) for n in (100, 1000, 8192, 32768)]
        assert sizes == sorted(sizes)
        assert all(size % 256 == 0 for size in sizes)
