"""Steering and scores of context_awareness: from the authors' sections and head lists to our spans."""

import torch

import regard
from regard.lens import span_dependency
from regard.methods import AttentionCall
from regard.methods.edits import Emphasize


def span_of(sections, length):
    """One bool span (B, length) from lists of [begin, end) per row."""
    position = torch.arange(length)
    span = torch.zeros(len(sections[0]), length, dtype=torch.bool)
    for section in sections:
        for row, (begin, end) in enumerate(section):
            span[row] |= (position >= begin) & (position < end)
    return span


def steer(case):
    """One layer's mask: ours is the bias of a call, at the layer that the number of passes through the authors' hook makes it."""
    mask, scores = case.inputs["mask"], case.inputs["scores"]
    out = {}
    for name, args in case.args.items():
        span = span_of(args["sections"], args["input_len"])
        heads = args["heads"]
        method = Emphasize(span, args["alpha"], heads=heads, form=args["scale_position"], variant="released")
        batch, count, q_len, kv_len = scores.shape
        call = AttentionCall(
            module=None,
            layer=args["calls"] - 1,
            q=torch.zeros(batch, count, q_len, 4),
            k=torch.zeros(batch, count, kv_len, 4),
            v=torch.zeros(batch, count, kv_len, 4),
            num_layers=8,
        )
        call.biases += [mask, scores]
        assert method.applies(call)
        method.edit(call)
        biases = mask + sum(call.biases[2:])
        out[f"{name}.mask"] = biases.expand(-1, 1 if heads is None else count, -1, -1)
        out[f"{name}.probs"] = call.weights()
    return out


def whole_model(case):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**case.meta["official_kwargs"])).eval()
    model.load_state_dict(case.params, strict=True)
    ids, mask, continuation = (case.inputs[name] for name in ("input_ids", "attention_mask", "continuation"))
    out = {}
    for name, args in case.args.items():
        config = args["head_config"]
        which = {"layers": config} if isinstance(config, list) else {"heads": {int(k): v for k, v in config.items()}}
        span = span_of(args["sections"], ids.shape[1])
        method = Emphasize("user", args["alpha"], form=args["scale_position"], variant="released", **which)
        with torch.no_grad(), regard.attach(model, method, spans={"user": span}):
            step = model(ids, attention_mask=mask, use_cache=True)
            logits, seen = [step.logits], mask
            for i in range(continuation.shape[1]):
                seen = torch.cat([seen, seen.new_ones(2, 1)], 1)
                step = model(
                    continuation[:, i : i + 1],
                    attention_mask=seen,
                    past_key_values=step.past_key_values,
                    use_cache=True,
                )
                logits.append(step.logits)
        padding = torch.nn.functional.pad(mask == 0, (0, continuation.shape[1]))  # nobody reads it; recorded as 0
        out[name] = torch.cat(logits, 1).masked_fill(padding[..., None], 0.0)
    return out


def score(case):
    heads = case.args["heads"]
    out = {}
    for name in ("0", "1"):
        ids, real = case.inputs[f"{name}.input_ids"], case.inputs[f"{name}.attention_mask"].bool()
        users, responses = marked(ids[0].tolist(), real[0].tolist(), case.args)
        each = span_dependency(case.inputs[f"{name}.attention"][:, heads], users[None], responses[None])
        out[f"{name}.separate"], out[f"{name}.score"] = each[0], each.mean()
    return out


def marked(ids, real, args):
    """Whose each token is, by the literal markers of the format: the user's (and system's) words, and each response."""
    markers = {"system": args["system"], "user": args["user"], "assistant": args["assistant"]}
    users = torch.zeros(len(ids), dtype=torch.bool)
    responses, who, at = [], "", 0
    while at < len(ids):
        found = next((n for n, marker in markers.items() if ids[at : at + len(marker)] == marker), None)
        if found:
            who, at = found, at + len(markers[found])
            if who == "assistant":
                responses.append(torch.zeros(len(ids), dtype=torch.bool))
            continue
        if who == "assistant":
            responses[-1][at] = real[at]
        else:
            users[at] = ids[at] not in (1, 2, 13)
        at += 1
    return users, torch.stack(responses)
