"""Paper 003: whole training steps of the authors' classifier, their attention layers, their pair model."""

import torch

import regard
from regard.losses import AttentionAT, classification_loss
from regard.models import AttentionClassifier
from regard.nn import AdditiveAttention, ScaledDotPooling


def _below(tensors, prefix):
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _named_grads(model, official):
    """Our gradients under the authors' names: tell them apart by what loads where."""
    ours = dict(model.named_parameters())
    names = model.official_keys({name: torch.full((1,), float(i)) for i, name in enumerate(official)})
    listed = list(official)
    return {f"grad.{listed[int(mark)]}": ours[name].grad for name, mark in names.items() if ours[name].grad is not None}


def hidden_states(case):
    """States are given; the perturbation and the logit gradient are recorded too."""
    inputs = case.inputs
    model = AttentionClassifier(None, 1, inputs["hidden"].shape[2], encoder="none")
    regard.load_official(model, case.params)
    kwargs = case.meta["official_kwargs"]
    step = AttentionAT(kwargs["xi"], kwargs["lam_adv"], interpretable="iAT" in kwargs["attention"], variant="released")
    given = {"inputs_embeds": inputs["hidden"], "attention_mask": inputs["mask"]}
    weight = float(inputs["pos_weight"][0, 0])
    made = step(model, given, inputs["label"], lambda logits, labels: classification_loss(logits, labels, weight))
    made.total.backward()
    delta = torch.zeros_like(inputs["mask"], requires_grad=True)
    loss = classification_loss(model(**given, logits_delta=delta).logits, inputs["label"], weight)
    found = {"logit": made.output.logits, "attention": made.output.attention, "perturbation": made.perturbation}
    found |= {"loss": made.clean + step.lam * made.adversarial, "loss_adv": made.adversarial}
    found["logit_grad"] = torch.autograd.grad(loss, delta)[0]
    return found | _named_grads(model, case.params)


def whole(case):
    inputs, kwargs = case.inputs, case.meta["official_kwargs"]
    model = AttentionClassifier(23, 1, 10, 7)
    regard.load_official(model, case.params)
    step = AttentionAT(kwargs["xi"], kwargs["lam_adv"], interpretable="iAT" in kwargs["attention"], variant="released")
    weight = float(inputs["pos_weight"][0, 0])
    given = {"input_ids": inputs["ids"], "attention_mask": inputs["mask"]}
    made = step(model, given, inputs["label"], lambda logits, labels: classification_loss(logits, labels, weight))
    made.total.backward()
    found = {"logit": made.output.logits, "attention": made.output.attention, "loss_adv": made.adversarial}
    return found | {"loss": made.clean + step.lam * made.adversarial} | _named_grads(model, case.params)


def layers(case):
    hidden, query, mask = case.inputs["hidden"], case.inputs["query"], case.inputs["mask"]
    dim, found = hidden.shape[2], {}
    for name, layer in (
        ("bc_tanh", AdditiveAttention(dim)),
        ("bc_dot", ScaledDotPooling(dim)),
        ("qa_tanh", AdditiveAttention(dim, query_dim=dim)),
        ("qa_dot", ScaledDotPooling(dim, query=True)),
    ):
        regard.load_official(layer, _below(case.params, name + "."))
        pooled = layer(hidden, mask, query if name.startswith("qa") else None)
        found |= {f"{name}.weights": pooled.weights, f"{name}.context": pooled.context}
    return found


def pair(case):
    inputs = case.inputs
    attention = "dot" if "Dot" in case.meta["official_kwargs"]["attention"] else "additive"
    model = AttentionClassifier(19, 4, 6, 5, attention=attention, pair=True)
    regard.load_official(model, case.params)
    made = model(
        inputs["paragraph"],
        inputs["paragraph_mask"],
        question_ids=inputs["question"],
        question_mask=inputs["question_mask"],
    )
    loss = classification_loss(made.logits, inputs["answer"])
    loss.backward()
    return {"logit": made.logits, "attention": made.attention, "loss": loss} | _named_grads(model, case.params)
