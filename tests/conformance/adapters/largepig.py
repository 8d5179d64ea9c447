"""LargePiG's scoring, from the authors' LLaMA weights and arguments to ours; and the MC metrics."""

import torch

import regard
from regard.bench.answers import answer_scores
from regard.bench.metrics_mc import mc_scores
from regard.methods.decoders import LargePiG, attended_source, trusted_source


def llama(case):
    from transformers import LlamaConfig, LlamaForCausalLM

    kwargs = {k: v for k, v in case.meta["official_kwargs"].items() if k != "attn_implementation"}
    model = LlamaForCausalLM(LlamaConfig(**kwargs)).eval()
    model.load_state_dict(case.params, strict=True)
    return model


def method_of(args):
    """The authors' keyword arguments as our fields; None for their baseline."""
    if args["mode"] == "baseline":
        return None
    source = None
    if "start_p" in args:
        source = (args["start_p"], args["end_p"])
    elif "ref_len" in args:
        source = (-args["ref_len"], None)
    return LargePiG(
        source=source,
        candidates=args["candidate_layers"],
        mature=args["mature_layer"],
        scale=args.get("scale_value", 100),
        normalize=args.get("normalization", False),
        contrast=not args.get("only_pointer", False),
        pointer=args["pointer"],
        relative_top=args.get("relative_top", 0.1),
        attention_layers=args.get("attention_layers"),
        variant="released",
    )


def score(case):
    model = llama(case)
    answers = [row[:n] for row, n in zip(case.inputs["answers"], case.inputs["answer_len"].tolist(), strict=True)]
    out = {}
    for name, args in case.args.items():
        if "mode" in args:
            method = method_of(args)
            out[name] = answer_scores(model, case.inputs["prompt"], answers, *([] if method is None else [method]))
    if "mc" in case.args:
        true, best = case.args["mc"]["num_true"], case.args["mc"]["best"]
        rows = [mc_scores(out[name][:true], out[name][true:], best) for name in ("pointer", "baseline")]
        out["mc"] = torch.tensor([[m.mc1, m.mc2, m.mc3, m.best, m.margin] for m in rows])
    return out


def score_options(case):
    out = score(case)
    rows = [mc_scores(true, false, len(true) - 1) for true, false in case.args["mc_edges"]["lists"]]
    out["mc_edges"] = torch.tensor([[m.mc1, m.mc2, m.mc3, m.best, m.margin] for m in rows])
    return out


def generate(case):
    """`generate` with the method attached; probabilities are what our last processor leaves, as the sampler reads them."""
    model = llama(case)
    prompt, out = case.inputs["prompt"], {}
    for name, args in case.args.items():
        settings = {
            "max_new_tokens": args["max_new_tokens"],
            "pad_token_id": 0,
            "do_sample": args.get("do_sample", False),
        }
        settings |= {key: args[key] for key in ("temperature", "top_k", "top_p", "repetition_penalty") if key in args}
        model.generation_config.eos_token_id = None
        options = {"return_dict_in_generate": True, "output_scores": True, **settings}
        if name == "plain":
            with regard.attach(model, LargePiG(scale=0)):
                out["plain.sequences"] = model.generate(prompt, **settings)
            continue
        method = method_of({"mode": "largepig", **args})
        if settings["do_sample"] and method.normalize:
            method.normalize = "first"
        with regard.attach(model, method):
            made = model.generate(prompt, **options)
        scores = torch.stack(made.scores, 1)
        probs = scores.exp() if method.pointer else scores.softmax(-1)
        out[f"{name}.probs"] = probs
        # drawing is random; the authors' draw was recorded as the likeliest token
        out[f"{name}.sequences"] = torch.cat([prompt, probs.argmax(-1)], 1) if settings["do_sample"] else made.sequences
    return out


def source_masks(case):
    out = {}
    for name, args in case.args.items():
        start, end = args["span"]
        attention = case.inputs["attention"][:, start:end, start:end]
        if name == "attended":
            out[name] = attended_source(attention, part=args["len_alpha"]).long()
            continue
        kind = name.partition("_")[0]
        options = {"entropy": args["use_entropy"]}
        if kind == "decode":
            options |= {"history": args["alpha"], "threshold": 1.0, "skip": 0, "share": None, "eps": 1e-10}
        else:
            options |= {"threshold": args["alpha"], "history": args.get("weight", 0.5)}
        kept = trusted_source(
            case.inputs["logits"][:, start:end], case.inputs["ids"][:, start:end], attention, **options
        )
        out[name] = kept.long()
    return out
