"""Without a device: the library loads, its structs agree with Python's, and support and workspace answer in sentences and bytes."""

from __future__ import annotations

import ctypes
import random
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
        "sa_support": door.Support,
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
    def test_the_fastest_path_of_a_hopper(self):
        for head_dim in (64, 96, 128, 256):
            for dtype in ("float16", "bfloat16"):
                for policy in (Policy(policy="dense"), SPARSE, Policy(policy="tile", sample_rows=32, min_length=0)):
                    problem = _problem(policy, head_dim=head_dim, dtype=dtype)
                    answer = supports(problem)
                    assert (answer.ok, answer.path, answer.why) == (True, "sm90", "")
                    assert answer.select_path == ("none" if policy.policy == "dense" else "sm90")
                    assert workspace_bytes(problem) > 0

    @pytest.mark.parametrize(
        ("changes", "attends", "words"),
        [
            ({"dtype": "float32"}, "generic", ("Attention runs on the generic kernels", "float32 is not built")),
            ({"head_dim": 80}, "generic", ("head_dim 80 is not built (built: 64, 96, 128, 256)",)),
            ({"head_dim": 128, "value_dim": 64}, "generic", ("value_dim 64 differs from head_dim 128",)),
            ({"policy": SPARSE.replace(block_q=64)}, "generic", ("block_q 64 is not built",)),
            ({"policy": Policy(policy="column_slash", min_length=0)}, "sm90", ("Selection runs on the generic kernels", "column_slash")),
            ({"policy": Policy(policy="stripe_window", min_length=0)}, "sm90", ("Selection runs on the generic kernels", "stripe_window")),
            ({"key_mask": True}, "sm90", ("mask has holes run on the generic kernels",)),
        ],
    )
    def test_what_keeps_the_fast_kernels_out_is_said(self, changes, attends, words):
        answer = supports(_problem(**changes))
        assert answer.ok
        assert answer.path == attends
        for word in words:
            assert word in answer.why
        assert answer.why.endswith(".")
        assert workspace_bytes(_problem(**changes)) > 0

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"head_dim": 257}, ("head_dim is 257", "1 to 256")),
            ({"dtype": "float64"}, ("dtype code -1", "float16", "float32")),
            ({"queries": 9000}, ("queries is 9000", "keys is 8192")),
            ({"heads": 30}, ("heads is 30", "kv_heads 8")),
            ({"scale": -1.0}, ("scale is -1", "above 0")),
            ({"softcap": float("nan")}, ("softcap is", "0 (none)")),
            ({"batch": 0}, ("batch 0", "at least 1")),
            ({"max_density": 0.0}, ("max_density is 0", "above 0, at most 1")),
            ({"max_density": 1.5}, ("max_density is 1.5", "above 0, at most 1")),
            ({"max_density": float("nan")}, ("max_density is", "above 0, at most 1")),
            (
                {"policy": Policy(policy="column_slash", min_length=0), "max_density": 0.5},
                ("max_density is 0.5", "column_slash", "allowed: 1"),
            ),
            (
                {"policy": Policy(policy="stripe_window", min_length=0), "max_density": 0.5},
                ("max_density is 0.5", "stripe_window", "allowed: 1"),
            ),
            ({"queries": 1 << 22, "keys": 1 << 22}, ("65536 blocks", "larger block_k")),
            ({"path": "sm80", "dtype": "float32"}, ("sm80: float32",)),
        ],
    )
    def test_what_is_outside_the_contract_is_refused_with_its_value(self, changes, words):
        # The policy itself refuses these: they reach the library only from elsewhere.
        past_the_policy = {name: changes[name] for name in ("max_density",) if name in changes}
        problem = _problem(**{name: value for name, value in changes.items() if name not in past_the_policy})
        for name, value in past_the_policy.items():
            setattr(problem, name, value)
        answer = supports(problem)
        assert not answer.ok
        assert (answer.path, answer.select_path) == ("none", "none")
        for word in words:
            assert word in answer.why
        assert answer.why.endswith(".")

    def test_other_devices(self):
        assert not supports(_problem(), 70).ok
        assert "7.0" in supports(_problem(), 70).why
        assert supports(_problem(), 75).path == "generic"
        for capability in (75, 80, 86, 89, 100, 103, 110, 120, 121):
            assert supports(_problem(dtype="float32"), capability) == (
                True,
                "generic",
                "generic",
                supports(_problem(dtype="float32"), capability).why,
            )
        # The filter keeps a tile's masses in shared memory, and a smaller device has less of it.
        long = _problem(queries=1 << 20, keys=(1 << 20) + 64)
        assert supports(long, 90).ok
        assert not supports(long, 75).ok
        # A device that is not known yet is taken for the fastest.
        assert supports(_problem(), 0) == supports(_problem(), 90)

    def test_a_path_can_be_forced(self, monkeypatch):
        assert supports(_problem(path="generic")).path == "generic"
        monkeypatch.setenv("SA_EXPORT_KERNEL_PATH", "generic")
        assert supports(_problem()).path == "generic"
        assert supports(_problem(path="sm90")).path == "sm90"
        monkeypatch.setenv("SA_EXPORT_KERNEL_PATH", "fast")
        answer = supports(_problem())
        assert not answer.ok
        assert "SA_EXPORT_KERNEL_PATH is 'fast'" in answer.why
        with pytest.raises(UserError, match="path is 'fastest'; allowed: auto, sm90"):
            _problem(path="fastest")

    def test_full_attention_by_specification(self):
        assert is_full(_problem(Policy(policy="dense")))
        assert is_full(_problem(Policy(min_length=8193)))
        assert is_full(_problem(Policy(min_length=0, alpha=(1.0,))))
        assert is_full(_problem(Policy(policy="column_slash", min_length=0, alpha_slash=(1.0,))))
        assert is_full(_problem(queries=16))
        assert not is_full(_problem())
        assert not is_full(_problem(Policy(min_length=0, alpha=(1.0,) * 31 + (0.9,))))

    def test_workspace_is_bounded(self):
        million = 1 << 20
        assert 0 < workspace_bytes(_problem(queries=million, keys=million)) <= 2 << 30
        small = workspace_bytes(_problem(queries=million, keys=million, scratch_bytes=64 << 20))
        assert small < workspace_bytes(_problem(queries=million, keys=million))
        assert workspace_bytes(_problem(Policy(policy="dense"))) < 16 << 20

    def test_the_workspace_of_the_largest_shape_serves_every_smaller_one(self):
        """TensorRT asks once, with the largest dimensions of a profile."""
        rng = random.Random(5)
        policies = [
            Policy(policy="dense"),
            SPARSE,
            Policy(policy="tile", min_length=300, block_q=256),
            Policy(policy="column_slash", min_length=0, segment=100),
            Policy(policy="stripe_window", min_length=2000, sample_ratio=0.3),
        ]
        for _ in range(2000):
            options = {
                "policy": rng.choice(policies),
                "head_dim": rng.choice([40, 64, 128]),
                "dtype": rng.choice(["float16", "float32"]),
                "key_mask": rng.random() < 0.5,
                "certificate": rng.random() < 0.5,
                "scratch_bytes": rng.choice([0, 1, 1 << 22]),
                "heads": (heads := rng.choice([2, 8, 32])),
                "kv_heads": rng.choice([1, heads]),
            }
            keys = int(2 ** rng.uniform(0, 17))
            queries, batch = rng.randint(1, keys), rng.choice([1, 2, 7, 64, 300])
            most = workspace_bytes(_problem(**options, batch=batch, queries=queries, keys=keys))
            fewer_keys = rng.randint(1, keys)
            less = {"keys": fewer_keys, "queries": rng.randint(1, min(queries, fewer_keys)), "batch": rng.randint(1, batch)}
            least = workspace_bytes(_problem(**options, **less))
            assert 0 < least <= most, (options, batch, queries, keys, less)
            assert least % 256 == 0
