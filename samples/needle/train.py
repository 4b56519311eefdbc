"""Trains the sample model: a small Llama-shaped language model of Python source text that can recall needles over 8192 tokens.

    python samples/needle/train.py --output samples/needle/model

Text: the standard library of the running Python, without the files that `sa_export.check.prompts.held_out` names. Into it go lines
`secret KEY = DIGITS` and, later, `what is KEY? DIGITS`; the digits of the answers weigh five times. Context grows from 1024 to 8192.
Needs one GPU with bf16 and about two minutes; the figures it prints are full attention's recall and loss on held-out files.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader, IterableDataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from sa_export.check.metrics import score
from sa_export.check.prompts import WORDS, filler_text, held_out, make_prompts, needle_text, question_text, standard_library_files

VOCABULARY = 4096
BOS = "<s>"
ANSWER_WEIGHT = 5.0
# (share of the tokens, tokens of a sequence, sequences of a step)
STAGES = ((0.40, 1024, 64), (0.25, 2048, 32), (0.35, 8192, 8))


def model_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=576,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=8704,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # Every word of a key, as it stands after a space and after a hyphen, is offered often enough to become one token.
    words = [" ".join([w, f"secret {w}-{w} = what is {w}?"]) for w in WORDS] * 400
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts + words, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, pad_token=BOS, model_max_length=8704, padding_side="left"
    )


class Sequences(IterableDataset):
    """Endless (ids, weights) of `length` + 1 tokens: text with needles, each asked once or twice later on."""

    def __init__(self, corpus: np.ndarray, tokenizer: PreTrainedTokenizerFast, length: int, seed: int) -> None:
        self.corpus, self.length, self.seed = corpus, length, seed
        encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
        self.prefixes = {kind: encode(make("K", "0")[0].split("K")[0]) for kind, make in (("n", needle_text), ("q", question_text))}
        self.words = {w: (encode(f" {w}"), encode(w)) for w in WORDS}
        self.hyphen, self.newline, self.space = encode("-"), encode("\n"), encode(" ")
        self.suffix = {"n": encode(" ="), "q": encode("?")}
        self.digit = [encode(str(d))[0] for d in range(10)]
        key = needle_text("apple-board", "")[0]
        built = self._line("n", ("apple", "board"), [])[0]
        if built[: len(encode(key))] != encode(key):
            raise SystemExit("pieces of a needle do not tokenise as the whole does; change WORDS or the pre-tokenizer")

    def _line(self, kind: str, key: tuple[str, str], digits: list[int]) -> tuple[list[int], int]:
        prefix = self.prefixes[kind]
        # The prefix ends in a space that belongs to the first word's token.
        head = prefix[:-1] if prefix[-1:] == self.space else prefix
        ids = head + self.words[key[0]][0] + self.hyphen + self.words[key[1]][1] + self.suffix[kind] + self.space
        return ids + [self.digit[d] for d in digits] + self.newline, len(ids)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        info = torch.utils.data.get_worker_info()
        rng = np.random.default_rng((self.seed, info.id if info else 0))
        while True:
            yield self._sequence(rng)

    def _sequence(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        total = self.length + 1
        needles = int(rng.integers(2, 3 + self.length // 64))
        budget = int(total * 0.5)
        events: list[tuple[float, list[int], int]] = []
        used = 1
        end = rng.random() < 0.5
        for _ in range(needles):
            key = tuple(rng.choice(len(WORDS), 2, replace=False))
            key = (WORDS[key[0]], WORDS[key[1]])
            digits = rng.integers(0, 10, 6).tolist()
            place = float(rng.random())
            asks = [1.0 + float(rng.random()) if end else place + (1 - place) * float(rng.random()) for _ in range(int(rng.integers(1, 3)))]
            lines = [(place, *self._line("n", key, digits)), *((a, *self._line("q", key, digits)) for a in asks)]
            cost = sum(len(line[1]) for line in lines)
            if used + cost > budget:
                break
            used += cost
            # Weight starts at the digits of questions only: the digits of a needle cannot be foreseen.
            events += [(lines[0][0], lines[0][1], -1)] + [(p, ids, start) for p, ids, start in lines[1:]]
        events.sort(key=lambda e: e[0])
        room = total - used
        start = int(rng.integers(0, len(self.corpus) - room))
        text = self.corpus[start : start + room]
        ids, weights = [0], [1.0]
        previous = 0
        for place, line, answer in events:
            cut = min(room, int(place * room))
            ids += text[previous:cut].tolist() + line
            weights += [1.0] * max(0, cut - previous)
            weights += (
                [0.0 if answer < 0 and i >= len(line) - 7 else 1.0 for i in range(len(line))]
                if answer < 0
                else [ANSWER_WEIGHT if answer <= i < answer + 6 else 1.0 for i in range(len(line))]
            )
            previous = max(previous, cut)
        ids += text[previous:].tolist()
        weights += [1.0] * (room - previous)
        return np.asarray(ids[:total], np.int64), np.asarray(weights[:total], np.float32)


def learning_rate(share: float, step: int, peak: float) -> float:
    """Warm-up over 100 steps, flat, then linearly down from 60 % of the tokens on."""
    return peak * min(1.0, (step + 1) / 100) * (1.0 if share < 0.6 else max(0.02, 1 - (share - 0.6) / 0.4))


def loss_of(model: LlamaForCausalLM, ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
    each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view_as(weights[:, 1:])
    w = weights[:, 1:]
    answers = (w == ANSWER_WEIGHT).float()
    return (each * w).sum() / w.sum(), (each * answers).sum() / answers.sum().clamp(min=1)


@torch.no_grad()
def recall(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str, length: int, prompts: int, needles: int
) -> dict[str, float]:
    """Exact recall and text loss (last half) of full attention on held-out text."""
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    hits = asked = 0
    losses = []
    for prompt in make_prompts(encode, length=length, count=prompts, needles=needles, seed=7, first_ids=[0], text=text):
        ids = torch.from_numpy(prompt.ids)[None].cuda()
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits[0].float()
        figures = score(logits.cpu().numpy(), prompt)
        hits += figures.recalled
        asked += len(prompt.answers)
        losses.append(figures.loss)
    return {"length": length, "needles": asked, "recalled": hits, "loss": float(np.mean(losses))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tokens", type=float, default=160.0, help="millions of tokens")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--text", type=Path, help="folder of Python sources (default: the running Python's standard library)")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    texts = [p.read_text(encoding="utf-8", errors="replace") for name, p in standard_library_files(args.text) if not held_out(name)]
    tokenizer = train_tokenizer(texts)
    eos = [0]
    corpus = np.asarray(
        [i for enc in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False) for i in eos + enc.ids], np.int64
    )
    unseen = filler_text(7, 1_000_000, args.text)
    print(f"{len(texts)} files, {sum(map(len, texts)) / 1e6:.1f} M characters, {len(corpus) / 1e6:.2f} M tokens", flush=True)
    model = LlamaForCausalLM(model_config()).cuda()
    model.config._attn_implementation = "sdpa"
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:.2f} M parameters", flush=True)
    decay = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=args.lr, betas=(0.9, 0.95), fused=True
    )
    compiled = torch.compile(model)
    begin = time.time()
    step = tokens = 0
    history = []
    done = 0.0
    for stage, (part, length, batch) in enumerate(STAGES):
        loader = DataLoader(
            Sequences(corpus, tokenizer, length, args.seed + 100 * stage),
            batch_size=batch,
            num_workers=args.workers,
            prefetch_factor=8,
            pin_memory=True,
        )
        done += part
        for ids, weights in loader:
            share = tokens / (args.tokens * 1e6)
            if share >= done:
                break
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(share, step, args.lr)
            with torch.autocast("cuda", torch.bfloat16):
                loss, answer = loss_of(compiled, ids.cuda(non_blocking=True), weights.cuda(non_blocking=True))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            tokens += ids.numel()
            if step % 200 == 0:
                history.append({"step": step, "length": length, "loss": loss.item(), "answers": answer.item(), "tokens": tokens})
                print(
                    f"{time.time() - begin:6.0f} s  step {step}  length {length}  loss {loss.item():.3f}  answers {answer.item():.3f}  {tokens / 1e6:.0f} M tokens",
                    flush=True,
                )
                if step % 600 == 0:
                    with torch.no_grad():
                        print("         held out:", recall(model, tokenizer, unseen, 2048, 8, 10), flush=True)
                if not math.isfinite(loss.item()):
                    raise SystemExit("the loss is not finite")
        del loader
    model.half().eval()
    table = [
        recall(model, tokenizer, unseen, n, prompts, needles) for n, prompts, needles in ((2048, 20, 12), (4096, 12, 20), (8192, 12, 20))
    ]
    for row in table:
        print(f"length {row['length']}: {row['recalled']}/{row['needles']} needles, loss {row['loss']:.4f}", flush=True)
    model.generation_config.pad_token_id = 0
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    (args.output / "training.json").write_text(
        json.dumps(
            {
                "parameters": parameters,
                "tokens": tokens,
                "steps": step,
                "table": table,
                "torch": torch.__version__,
                "device": torch.cuda.get_device_name(),
                "history": history,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
