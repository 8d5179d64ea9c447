"""Paper 076: one local and one global block in a row, as the authors' stages run them."""

import regard


def blocks(case):
    shared = {"mlp_ratio": 2.0, "cpe_act": True}
    pair = (regard.nn.LocalWindowBlock(16, 2, 5, **shared), regard.nn.LinearGlobalBlock(16, 2, **shared))
    x = case.inputs["x"]
    for i, block in enumerate(pair):
        prefix = f"blocks.{i}."
        state = {key.removeprefix(prefix): value for key, value in case.params.items() if key.startswith(prefix)}
        regard.load_official(block.eval(), state)
        x = block(x, (9, 7))
    return {"0": x}
