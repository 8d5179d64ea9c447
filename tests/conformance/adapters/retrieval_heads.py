"""Masked heads, retrieval scores and needle spans of Retrieval_Head."""

import torch
from torch.nn import functional as F

from regard.lens import HeadScores, Needle, find_span, retrieval_heads
from regard.lens.needle import NeedleSample
from regard.lens.retrieval_heads import CopyCounter
from regard.methods import AttentionCall
from regard.methods.edits import MaskHeads


def rotate(x, position, theta=10000.0):
    """Rotary embedding in the half-split layout; x (B, H, N, D), position (N,)."""
    half = x.shape[-1] // 2
    angle = position[:, None] * theta ** (-torch.arange(half) / half)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([x[..., :half] * cos - x[..., half:] * sin, x[..., half:] * cos + x[..., :half] * sin], -1)


class Past:
    """As much of a cache layer as a call asks for."""

    def __init__(self, length):
        self.length = length

    def get_seq_length(self):
        return self.length


def masked_step(case):
    """One decode step of one layer, with and without its heads masked."""
    kwargs = case.meta["official_kwargs"]
    dim = kwargs["hidden_size"] // kwargs["num_attention_heads"]
    x = case.inputs["hidden_states"]
    q, k, v = (F.linear(x, case.params[f"{n}_proj.weight"]).unflatten(-1, (-1, dim)).transpose(1, 2) for n in "qkv")
    position = case.inputs["position_ids"][0]
    k = torch.cat([case.inputs["past_key"], rotate(k, position)], 2)
    v = torch.cat([case.inputs["past_value"], v], 2)
    out = {}
    for name, methods in (("plain", []), ("masked", [MaskHeads(case.args["block_list"])])):
        call = AttentionCall(
            module=None,
            layer=kwargs["layer_idx"],
            q=rotate(q, position),
            k=k,
            v=v,
            cache=Past(k.shape[2]),
            num_layers=kwargs["num_hidden_layers"],
        )
        heads = call.run(methods)
        out[f"{name}.output"] = F.linear(heads.transpose(1, 2).flatten(2), case.params["o_proj.weight"])
        out[f"{name}.weights"] = call.weights()
    return out


def scores(case):
    """Retrieval scores of hand-made attention, and needle spans."""
    out = {}
    for name, args in case.args.items():
        attention, ids = case.inputs[f"{name}.attention"], case.inputs[f"{name}.prompt_ids"]
        counter = CopyCounter(ids, tuple(args["span"]))
        for step, token in enumerate(case.inputs[f"{name}.tokens"].tolist()):
            looked_at = attention[step, :, :, : len(ids) + step].topk(args["topk"]).indices
            counter.add(looked_at, token)
        out[f"{name}.score"] = counter.score()
    pairs = zip(case.inputs["find.prompts"], case.inputs["find.needles"], strict=True)
    out["find.spans"] = torch.tensor(
        [find_span(prompt[prompt >= 0], needle[needle >= 0].tolist()) for prompt, needle in pairs]
    )
    return out


def aggregate(case):
    """Published scores of a real model, averaged and ranked."""
    table = HeadScores.from_runs(case.inputs["runs"])
    return {"mean": table.scores, "top": torch.tensor(table.top(30)), "above": torch.tensor(len(table.above(0.1)))}


class Wordless:
    """A tokenizer without line breaks or an end, as in the recording: every run has all its steps."""

    eos_token_id = None

    def decode(self, ids, **_):
        return " ".join(f"t{int(i)}" for i in torch.as_tensor(ids).flatten())


def whole_run(case):
    """Greedy answers of a whole model, and what every head copied meanwhile."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**case.meta["official_kwargs"])).eval()
    model.load_state_dict(case.params, strict=True)
    said = []
    model.register_forward_hook(lambda module, args, output: said.append(int(output.logits[0, -1].argmax())))
    samples = [
        NeedleSample(prompt[None], tuple(span), Needle("t", "", "t"), len(prompt), 0.0, "")
        for prompt, span in zip(case.inputs["prompts"], case.inputs["spans"].tolist())
    ]
    steps = case.args["decode_len"]
    table = retrieval_heads(model, Wordless(), samples, max_new_tokens=steps, min_recall=-1.0)
    runs = torch.tensor(said).unflatten(0, (len(samples), steps + 1))  # the first forward of a run reads the prompt
    return {"scores": table.runs, "said": runs[:, 1:]}
