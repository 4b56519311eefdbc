"""`sa-export bench attention`: its inputs, its table, its refusals; with a GPU, a whole run."""

import csv
import json
import math
from pathlib import Path

import pytest
import torch

from graph_passes.op import Policy
from sa_export.bench.attention import Row
from sa_export.bench.inputs import KINDS, captured, planted
from sa_export.bench.output import text_table, write_folder
from sa_export.cli.main import main
from sa_export.torch_attention import block_mask

SAMPLE_MODEL = Path(__file__).parents[3] / "samples/needle/model"
SMALL = {"heads": 16, "kv_heads": 8, "head_size": 64, "batch": 1, "dtype": torch.float32, "device": "cpu"}


def test_planted_inputs_are_the_same_for_a_seed_and_no_other():
    first, again, other = planted(512, seed=1, **SMALL), planted(512, seed=1, **SMALL), planted(512, seed=2, **SMALL)
    for name in ("query", "key", "value"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))


def test_planted_heads_have_the_structure_that_their_kind_says():
    inputs = planted(4096, seed=0, **SMALL)
    policy = Policy(min_length=0, dense_rows=0)
    kept = block_mask(inputs.query, inputs.key, inputs.value, None, policy, scale=64**-0.5)[0]  # [16, 32, 64]
    causal = block_mask(inputs.query, inputs.key, inputs.value, None, Policy(policy="dense"), scale=64**-0.5)[0]
    density = kept.sum((1, 2)) / causal.sum((1, 2))
    for head, share in enumerate(density.tolist()):
        kind = KINDS[head // 2]
        assert (share > 0.6) if kind == "diffuse" else (share < 0.35), (head, kind, share)
    # A stripe is a column of its own: some block far from diagonal and sink is kept by most tiles that may see it.
    stripes = KINDS.index("stripes") * 2
    columns = kept[stripes, 24:, 2:40].float().mean(0)
    assert columns.max() > 0.9


def test_captured_inputs_are_what_the_layer_computes_with():
    inputs = captured(SAMPLE_MODEL, 256, layer=2, dtype=torch.float32, device="cpu", seed=0)
    assert inputs.query.shape == (1, 4, 256, 64)
    assert inputs.key.shape == inputs.value.shape == (1, 2, 256, 64)
    ours = torch.nn.functional.scaled_dot_product_attention(inputs.query, inputs.key, inputs.value, is_causal=True, enable_gqa=True)

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sa_export.check.prompts import make_prompts

    model = AutoModelForCausalLM.from_pretrained(SAMPLE_MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(SAMPLE_MODEL)
    ids = make_prompts(lambda t: tokenizer(t, add_special_tokens=False).input_ids, length=256, count=1, needles=1, seed=0)[0].ids
    seen = []
    model.model.layers[2].self_attn.o_proj.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=torch.from_numpy(ids)[None])
    torch.testing.assert_close(ours.transpose(1, 2).reshape(1, 256, -1), seen[0], rtol=1e-4, atol=1e-5)


def _row(**changes: object) -> Row:
    values: dict = {
        "length": 8192,
        "policy": "default",
        "density": 0.25,
        "sample_ms": 0.1,
        "filter_ms": 0.05,
        "attend_ms": 0.3,
        "total_ms": 0.5,
        "cudnn_ms": 1.0,
        "flash_ms": 1.5,
        "extrapolated": False,
        "difference": 0.01,
        "workspace_mib": 12.0,
        "source": "planted, seed 0",
    }
    return Row(**(values | changes))


def test_speedup_and_search_are_against_the_faster_baseline():
    assert _row().speedup == 2.0
    assert _row().search_share == pytest.approx(0.15)
    assert _row(cudnn_ms=math.nan).speedup == 3.0
    assert math.isnan(_row(cudnn_ms=math.nan, flash_ms=math.nan).speedup)


def test_table_marks_what_was_not_measured_and_what_is_extrapolated():
    table = text_table([_row(), _row(length=2**20, extrapolated=True, difference=math.nan)])
    assert "2.00x" in table
    last = table.splitlines()[-2]
    assert "1.000*" in last
    assert last.rstrip().endswith("-")
    assert "extrapolated" in table.splitlines()[-1]
    assert "extrapolated" not in text_table([_row()])


def test_folder_holds_the_same_figures_three_times(tmp_path):
    rows = [_row(), _row(policy="residue", total_ms=0.25), _row(length=32768, flash_ms=math.nan)]
    write_folder(tmp_path, rows, {"gpu": "a GPU"})
    with (tmp_path / "attention.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["policy"] for line in lines] == ["default", "residue", "default"]
    assert float(lines[1]["speedup"]) == 4.0
    kept = json.loads((tmp_path / "attention.json").read_text())
    assert kept["rows"][2]["flash_ms"] is None
    assert kept["environment"] == {"gpu": "a GPU"}
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--policy", "fast"], "--policy fast: 'fast' is no attribute"),
        (["--policy", "policy=tile,sample_rows=many"], "sample_rows is 'many'; give a number"),
        (["--policy", "alpha=2"], "alpha is 2;"),
        (["--heads", "30", "--kv-heads", "8"], "no multiple"),
        (["--lengths", "8"], "at least 256"),
        (["--layer", "3"], "--layer goes with --model"),
        (["--stripe-share", "0"], "--stripe-share is 0.0"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(capsys, arguments, words):
    assert main(["bench", "attention", *arguments]) == 2
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1
    assert words in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert main(["bench", "attention"]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the benchmark was not run")
def test_a_whole_run(tmp_path, capsys):
    folder = tmp_path / "bench"
    assert main(["bench", "attention", "--lengths", "2048", "8192", "--json", "-q", "-o", str(folder)]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(r["length"], r["policy"]) for r in rows] == [(2048, "default"), (2048, "tile"), (8192, "default"), (8192, "tile")]
    for row in rows:
        assert 0 < row["density"] <= 1
        assert row["total_ms"] > 0
        assert row["cudnn_ms"] > 0
        # Below min_length the op is full attention; above it, what is dropped is small on planted inputs.
        assert row["difference"] < (0.01 if row["length"] == 2048 else 0.3)
    assert rows[0]["density"] == 1
    assert rows[2]["density"] < 0.5
    assert (folder / "attention.csv").is_file()
