"""Time and peak memory of three exporters on one checkpoint of half a billion random parameters; prints the table of docs/export.md.

    python samples/export_cost/measure.py WORK_FOLDER [--optimum PYTHON]

`--optimum` is the interpreter of an environment with optimum-onnx (it pins an older transformers). No exporter verifies its result here.
Peak memory is the resident set, pages of mapped files included.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

MAKE = """
import sys, torch, transformers
torch.manual_seed(0)
config = transformers.Qwen2Config(
    vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
    max_position_embeddings=32768, tie_word_embeddings=True,
)
transformers.AutoModelForCausalLM.from_config(config).save_pretrained(sys.argv[1])
"""
TORCH = """
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
layers, heads = model.config.num_hidden_layers, model.config.num_key_value_heads
size = model.config.hidden_size // model.config.num_attention_heads
class Step(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = model
    def forward(self, ids, mask, positions, past):
        cache = transformers.DynamicCache(past)
        out = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
        return out.logits, *(t for layer in out.past_key_values.layers for t in (layer.keys, layer.values))
batch, rows, past = (torch.export.Dim(name) for name in ("batch", "rows", "past"))
example = (
    torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, 8, dtype=torch.int64), torch.arange(3, 8).repeat(2, 1),
    [(torch.zeros(2, heads, 3, size),) * 2] * layers,
)
free = {0: batch, 1: rows}, {0: batch, 1: torch.export.Dim.DYNAMIC}, {0: batch, 1: rows}, [({0: batch, 2: past},) * 2] * layers
with torch.no_grad():
    torch.onnx.export(Step(), example, sys.argv[2] + "/model.onnx", dynamo=True, opset_version=20, dynamic_shapes=free, external_data=True)
"""
OPTIMUM = """
import sys
from optimum.exporters.onnx import main_export
main_export(sys.argv[1], sys.argv[2], task="text-generation-with-past", do_validation=False)
"""
CHILD = (
    "import resource, subprocess, sys; code = subprocess.run(sys.argv[1:]).returncode; u = resource.getrusage(resource.RUSAGE_CHILDREN); \
print('USED', u.ru_utime + u.ru_stime, u.ru_maxrss); sys.exit(code)"
)


def measured(command: list[str]) -> tuple[float, float, float]:
    """Wall seconds, processor seconds and peak resident GiB of a command.

    Raises:
        SystemExit: it failed; its output is shown.
    """
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", CHILD, *command], capture_output=True, text=True, check=False)
    wall = time.perf_counter() - begin
    if done.returncode:
        sys.exit(f"{' '.join(command[:4])} failed:\n{done.stdout}{done.stderr}")
    _, processor, peak = done.stdout.splitlines()[-1].split()
    return wall, float(processor), int(peak) / 2**20


def written(folder: Path, before: set[Path]) -> float:
    """GB of the files in a folder that were not there before."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path not in before) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="a folder to make; 10 GB")
    parser.add_argument("--optimum", metavar="PYTHON", help="interpreter with optimum-onnx")
    args = parser.parse_args()
    args.work.mkdir(parents=True)
    model = args.work / "model"
    subprocess.run([sys.executable, "-c", MAKE, str(model)], check=True, capture_output=True)
    ours = [sys.executable, "-m", "sa_export", "export", "-m", str(model), "--dtype", "fp32", "--no-verify", "-q", "-o"]
    runs = {
        "sa-export, by reference": (model, [*ours, str(model)]),
        "sa-export, copy": (args.work / "copy", [*ours, str(args.work / "copy"), "--weights", "copy"]),
        "torch.onnx (dynamo)": (args.work / "torch", [sys.executable, "-c", TORCH, str(model), str(args.work / "torch")]),
    }
    if args.optimum:
        runs["optimum-onnx"] = (args.work / "optimum", [args.optimum, "-c", OPTIMUM, str(model), str(args.work / "optimum")])
    (args.work / "torch").mkdir()
    print("| exporter | seconds | processor seconds | peak memory | written |\n|---|---|---|---|---|")
    for name, (folder, command) in runs.items():
        before = set(folder.rglob("*"))
        wall, processor, peak = measured(command)
        print(f"| {name} | {wall:.0f} | {processor:.0f} | {peak:.2f} GiB | {written(folder, before):.3f} GB |", flush=True)


if __name__ == "__main__":
    main()
