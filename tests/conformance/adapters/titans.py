"""Paper 049: lucidrains' neural memory, whole with gradients, and read in pieces; its state under its names."""

import torch

import regard


def _memory(case):
    given = case.meta["official_kwargs"]
    model = given.get("default_model_kwargs", {})
    memory = (
        regard.nn.ChunkedNeuralMemory(
            given["dim"],
            given.get("heads", 1),
            head_dim=given.get("dim_head"),
            chunk_size=given["chunk_size"],
            batch_size=given.get("batch_size"),
            depth=model["depth"],
            expansion=model["expansion_factor"],
            residual=given.get("mem_model_norm_add_residual", True),
            momentum=given.get("momentum", True),
            max_step=given.get("default_step_transform_max_lr", 1.0),
            pre_norm=given.get("pre_rmsnorm", True),
            post_norm=given.get("post_rmsnorm", False),
            qk_norm=given.get("qk_rmsnorm", False),
            variant="released",
        )
        .eval()
        .to(case.inputs["seq"].dtype)
    )
    regard.load_official(memory, case.params)
    return memory


def _names(memory):
    """Of the memory's weights, theirs: without the norm around it there is no `model.`."""
    residual = memory.first[-1].dim() == 2
    lead = "model.weights" if residual else "weights"
    count = len(memory.first) - residual
    return [f"{lead}.{i}" for i in range(count)] + ["norm.gamma"] * residual


def _state(memory, state):
    out, end = {"seq_index": torch.tensor([state.memory.position])}, state.memory
    for name, w, s, a in zip(_names(memory), end.weights, end.momentum, end.anchor):
        out[f"last_update.{name}"], out[f"weights.{name}"] = w.flatten(0, 1), a.flatten(0, 1)
        if memory.momentum_proj is not None:
            out[f"last_momentum.{name}"] = s.flatten(0, 1)[None]
    return out


def _read(memory, x, pieces, **first):
    state, made = None, []
    for piece in x.split(pieces, dim=1):
        y, state = memory(piece, state=state, return_state=True, **first)
        made.append(y)
        first = {}
    return made, state


def heads(case):
    memory = _memory(case)
    made, state = _read(memory, case.inputs["seq"], [9, 1, 6], store_mask=case.inputs["store_mask"][:, :9])
    out = {f"y{i + 1}": y for i, y in enumerate(made)}
    out["state.cache_store_segment"] = state.waiting
    return out | {f"state.{name}": tensor for name, tensor in _state(memory, state).items()}


def _official(memory, name):
    """Theirs for one of our parameters."""
    if name.startswith("first."):
        count, place = len(memory.first), int(name.split(".")[1])
        residual = memory.first[-1].dim() == 2
        return f"memory_model_parameters.{(place + 1) % count if residual else place}"
    theirs = {
        "q_proj": "to_queries", "k_proj": "to_keys", "v_proj": "to_values", "step_proj": "to_adaptive_step.0",
        "momentum_proj": "to_momentum.0", "forget_proj": "to_decay_factor.0", "gate_proj": "retrieve_gate.0", "out_proj": "combine_heads",
    }  # fmt: skip
    path, _, kind = name.rpartition(".")
    return f"{theirs.get(path, path)}.{kind}"


def pieces(case):
    memory = _memory(case)
    x = case.inputs["seq"].clone().requires_grad_()
    with torch.enable_grad():
        y, state = memory(x, return_state=True)
        named = dict(memory.named_parameters())
        grads = torch.autograd.grad((y * case.inputs["grad_out"]).sum(), [x, *named.values()])
    out = {"y": y, "dx": grads[0], **_state(memory, state)}
    out |= {f"d_{_official(memory, name)}": grad for name, grad in zip(named, grads[1:])}
    made, _ = _read(memory, case.inputs["seq"], case.args["pieces"])
    return out | {f"piece{i}": y for i, y in enumerate(made)}
