"""DuoAttention's training: the passkey prompts, and gates after each step of distillation on a tiny Llama."""

import sys
from pathlib import Path

import torch

from regard.losses import DuoGates, Passkeys, fit_duo

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tiny import CharTokenizer, tiny_llama


def run(case):
    return _passkeys(case.meta["official_kwargs"]["passkeys"]) | _training(case)


def _passkeys(options):
    out = {}
    for seed in options["seeds"]:
        passkeys = Passkeys(
            CharTokenizer(),
            options["text"],
            min_length=options["context_length_min"],
            max_length=options["context_length_max"],
            num_lengths=options["context_lengths_num_intervals"],
            num_passkeys=options["num_passkeys"],
            passkey_words=options["passkey_length"],
            depths=(options["min_depth_ratio"], options["max_depth_ratio"]),
            num_depths=options["depth_ratio_num_intervals"],
            reserve=options["buffer_size"],
            needle=options["needle"].replace("ordinal_number", "ordinal"),
            question=options["retrieval_question"].replace("ordinal_number", "ordinal"),
            before=options["prompt1"],
            after=options["prompt2"],
            separator=options["seperator"],
            seed=seed,
        )
        generator = torch.Generator().manual_seed(
            seed
        )  # theirs is torch's own, of which making the data set takes one passkey
        torch.randint(0, 26, (options["passkey_length"],), generator=generator)
        for number, length in enumerate(passkeys.lengths):
            ids, labels = passkeys.sample(length, generator)
            out |= {f"passkeys.{seed}.{number}.ids": ids, f"passkeys.{seed}.{number}.labels": labels}
    return out


def _training(case):
    options = case.meta["official_kwargs"]["train"]
    model = tiny_llama()
    model.load_state_dict(case.params | {"lm_head.weight": model.lm_head.weight})
    ids, labels = case.inputs["train.ids"], case.inputs["train.labels"]
    gates = DuoGates(3, 2, options["initial"])
    after, first = [], []
    clamp = gates.clamp

    def noted():  # called once before training, then after each step
        clamp()
        if gates.gates.grad is not None:
            first.append(gates.gates.grad.clone())
            after.append(gates.gates.detach().clone())

    gates.clamp = noted
    fit_duo(
        model,
        data=[{"input_ids": one, "labels": two} for one, two in zip(ids, labels)],
        sink=options["sink"],
        recent=options["recent"],
        steps=options["steps"],
        lr=options["lr"],
        l1=options["reg_weight"],
        gates=gates,
        progress=False,
    )
    losses = torch.tensor(gates.fitted.losses)
    return {"train.losses": losses, "train.gates": torch.stack(after), "train.first_grad": first[0]}
