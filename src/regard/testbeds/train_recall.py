"""Train the shipped model of the recall testbed: `python -m regard.testbeds.train_recall --out FOLDER` (50 minutes on one busy core).

A Llama of three layers learns on short sequences, where the circuit for looking a word up forms quickly, and then on longer ones,
where it learns to hold it among thousands of others. The state is kept after every stage, so that a stopped run goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .._files import write_whole
from . import recall

STAGES = (
    ((24,), 128, 1500, 2e-3),
    ((64,), 64, 600, 1e-3),
    ((256,), 16, 500, 1e-3),
    ((1024,), 4, 400, 1e-3),
    ((2048,), 2, 400, 1e-3),
    ((4096,), 1, 300, 1e-3),
    ((64, 256, 1024, 2048, 4096), 2, 400, 5e-4),
)
"""(sequence lengths, sequences of the longest one in a batch, steps, learning rate): a batch is of one length, drawn anew each step."""


def build(seed: int = 0) -> Any:
    """The untrained model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=recall.VOCAB_SIZE,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
            pad_token_id=recall.PAD,
            bos_token_id=recall.BOS,
            eos_token_id=None,
        )
    )
    # Unit vectors, nearly orthogonal: from the usual tiny embeddings the circuit takes several times as long to form.
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=128**-0.5)
    return model


def _rate(step: int, warm: int, steps: int) -> float:
    return min((step + 1) / warm, max(0.1, 1 - step / steps))


def batch(seq_len: int, size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (size, seq_len) and labels, -100 where nothing can be known. Two thirds recall, one third copying.

    Copies are of any length: were it always the same, looking back by so many positions would do and no word would be looked up.
    """
    samples = []
    for _ in range(size):
        if torch.rand((), generator=generator) < 0.67:
            queries = max(2, seq_len // 8)
            most = min(recall.NUM_WORDS // 4, (seq_len - 2 - 2 * queries) // 2)
            pairs = int(torch.randint(2, most + 1, (), generator=generator))
            samples.append(recall.recall_sample(seq_len, pairs, queries, generator))
        else:
            most = min((seq_len - 2) // 2, recall.NUM_WORDS // 2)
            length = int(torch.randint(max(2, most // 4), most + 1, (), generator=generator))
            samples.append(recall.copy_sample(seq_len, length, generator))
    ids = torch.stack([sample.ids for sample in samples])
    answers = torch.stack([sample.answers for sample in samples])
    return ids, torch.where(answers, ids, -100)


def train(
    out: Path, seed: int = 0, stages: tuple[tuple[tuple[int, ...], int, int, float], ...] = STAGES, say: Any = print
) -> Any:
    """Train, stage by stage, and write model and tokenizer to `out`."""
    from safetensors.torch import load_file, save

    model = build(seed)
    kept = out / "training.safetensors"
    done = 0
    if kept.is_file():
        model.load_state_dict(load_file(kept), strict=False)
        model.tie_weights()
        done = json.loads((out / "training.json").read_text())["stages"]
    out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    for number, (lengths, size, steps, rate) in enumerate(stages):
        if number < done:
            continue
        generator = torch.Generator().manual_seed(seed * 1000 + number)
        optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.98), weight_decay=0.01)
        warm = min(100, max(1, steps // 4))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_rate, warm=warm, steps=steps))
        model.train()
        losses = []
        for step in range(steps):
            seq_len = lengths[0]
            if len(lengths) > 1:
                seq_len = lengths[int(torch.randint(len(lengths), (), generator=generator))]
            ids, labels = batch(seq_len, size * lengths[-1] // seq_len, generator)
            loss = model(ids, labels=labels, use_cache=False).loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
            if step % 100 == 99 or step == steps - 1:
                recent = sum(losses[-50:]) / len(losses[-50:])
                say(
                    f"{seq_len} tokens, step {step + 1}/{steps}: loss {recent:.4f}, {time.perf_counter() - began:.0f} s"
                )
        state = {name: value.contiguous() for name, value in model.state_dict().items() if name != "lm_head.weight"}
        write_whole(kept, save(state))
        write_whole(out / "training.json", json.dumps({"stages": number + 1}))
    model.eval()
    generator = torch.Generator().manual_seed(12345)
    for seq_len in (256, 1024, 2048, 4096):
        found = recall.accuracy(model, [recall.recall_sample(seq_len, 64, 16, generator) for _ in range(4)])
        copied = recall.accuracy(model, [recall.copy_sample(seq_len, generator=generator) for _ in range(4)])
        say(f"{seq_len} tokens: recall {found:.3f}, copy {copied:.3f}")
    model.save_pretrained(out)
    recall.tokenizer().save_pretrained(out)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    train(given.out, given.seed, say=lambda text: print(text, flush=True))


if __name__ == "__main__":
    main()
