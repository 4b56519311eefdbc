"""Measures policies on the sample model in PyTorch: recall, loss, density and CRA, beside full attention on the same prompts.

    python samples/needle/evaluate.py --model samples/needle/model --lengths 4096 8192 --prompts 12 --needles 20

`--policy` adds a line: comma-separated attributes of `docs/op.md`, for example `--policy policy=residue,alpha=0.9,stride=8`.
Without it the tools' default and the two policies of the papers are measured. A GPU is used when there is one.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from graph_passes.op import Policy
from sa_export.check.metrics import score as prompt_score
from sa_export.check.prompts import Prompt, filler_text, make_prompts
from sa_export.torch_attention import use_policies

DEFAULT = (
    "policy=residue",
    "policy=tile",
    "policy=column_slash,alpha=0.95,alpha_slash=0.95,sample_rows=64",
    "policy=stripe_window,alpha=0.95,dense_rows=128",
)


def parse_policy(text: str) -> Policy:
    values: dict[str, Any] = {}
    for item in text.split(","):
        name, _, value = item.partition("=")
        values[name.strip()] = value if name.strip() == "policy" else json.loads(value)
    return Policy(**values)


def score(model: Any, prompts: list[Prompt]) -> tuple[int, np.ndarray, np.ndarray]:
    """(questions answered exactly, per-prompt loss of the text in the last half, arg max of the last half of each prompt)."""
    hits, losses, best_all = 0, [], []
    for prompt in prompts:
        ids = torch.from_numpy(prompt.ids)[None].to(model.device)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0].float()
        logits = logits.cpu().numpy()
        figures = prompt_score(logits, prompt)
        hits += figures.recalled
        losses.append(figures.loss)
        best_all.append(logits.argmax(-1)[len(prompt.ids) // 2 :])
    return hits, np.asarray(losses), np.stack(best_all)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096])
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--needles", type=int, default=20)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--policy", action="append", default=[])
    parser.add_argument("--text", type=Path, help="folder of Python sources (default: the running Python's standard library)")
    parser.add_argument("--output", type=Path, help="write the table as JSON")
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device).eval()
    model.config._attn_implementation = "sdpa"
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = []
    print(
        f"{'length':>6} {'policy':<64} {'density':>7} {'CRA mean':>8} {'min':>6} {'loss':>7} {'vs full':>8} {'needles':>8} {'top-1':>6}",
        flush=True,
    )
    for length in args.lengths:
        prompts = make_prompts(
            lambda text: tokenizer.encode(text, add_special_tokens=False), length=length, count=args.prompts, needles=args.needles, seed=args.seed,
            first_ids=[tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else [],
            text=filler_text(args.seed, 12 * length * args.prompts, args.text),
        )  # fmt: skip
        with torch.no_grad():
            full_hits, full_loss, full_best = score(model, prompts)
        asked = args.prompts * args.needles
        for text in ("full", *(args.policy or DEFAULT)):
            if text == "full":
                row: dict[str, Any] = {
                    "density": 1.0,
                    "cra_mean": 1.0,
                    "cra_min": 1.0,
                    "recalled": full_hits,
                    "loss": float(full_loss.mean()),
                    "top1": 1.0,
                }
            else:
                with use_policies(model, parse_policy(text)) as record:
                    hits, loss, best = score(model, prompts)
                every = lambda store: torch.stack([torch.stack(v) for v in store.values()])  # noqa: E731
                row = {
                    "density": every(record.density).mean().item(),
                    "cra_mean": every(record.cra_mean).mean().item(),
                    "cra_min": every(record.cra_min).min().item(),
                    "density_by_layer": [[round(x, 3) for x in torch.stack(v).mean(0).tolist()] for v in record.density.values()],
                    "recalled": hits,
                    "loss": float(loss.mean()),
                    "top1": float((best == full_best).mean()),
                }
            row = {"length": length, "policy": text, "needles": asked, **row}
            rows.append(row)
            change = row["loss"] / float(full_loss.mean()) - 1
            print(
                f"{length:>6} {text:<64} {row['density']:>7.3f} {row['cra_mean']:>8.3f} {row['cra_min']:>6.3f} {row['loss']:>7.4f} {change:>+8.2%} "
                f"{row['recalled']:>4}/{asked} {row['top1']:>6.3f}",
                flush=True,
            )
    if args.output:
        args.output.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
