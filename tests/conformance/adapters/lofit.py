"""LoFiT's own model classes, met by transformers' and the attached vectors."""

import re

from transformers import GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM

import regard
from regard.losses import masked_lm_loss
from regard.methods import HeadAffine

VECTOR = re.compile(r"attn_[Av]\.\d+$")


def loaded(model, params):
    model.load_state_dict({name: tensor for name, tensor in params.items() if not VECTOR.search(name)})
    return model.eval()


def gemma(case):
    kwargs = {**case.meta["official_kwargs"], "tie_word_embeddings": False, "hidden_act": "gelu_pytorch_tanh"}
    model = loaded(GemmaForCausalLM(GemmaConfig(**kwargs)), case.params)
    tuned = HeadAffine.from_official(case.params, case.args["applied_layers"])
    with regard.attach(model, regard.LoFiT(tuned)):
        return {"logits": model(case.inputs["input_ids"]).logits}


def llama_gradients(case):
    """Logits, loss, and the gradients of every vector, under the authors' names."""
    model = loaded(LlamaForCausalLM(LlamaConfig(**case.meta["official_kwargs"])), case.params)
    tuned = HeadAffine.from_official(case.params)
    batch = {name: case.inputs[name] for name in ("input_ids", "labels")}
    with regard.attach(model, regard.LoFiT(tuned)):
        out = {"logits": model(batch["input_ids"]).logits, "loss": masked_lm_loss(model, batch)}
        out["loss"].backward()
    for name, vectors in (("A", tuned.scale), ("v", tuned.shift)):
        for (layer, head), gradient in zip(tuned.heads.tolist(), vectors.grad):
            out[f"grad.model.layers.{layer}.self_attn.attn_{name}.{head}"] = gradient
    return out
