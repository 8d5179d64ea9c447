"""Paper 033: two layers along different axes, their weights too."""

import regard


def block(case):
    layers = regard.nn.GaussianBlock([-1, 1], [3, 2], [3, 5], 2, padding_value=-7.0)
    regard.load_official(layers, case.params)
    y, weights = layers(case.inputs["x"], return_weights=True)
    return {"0": y, "mix0": weights[0], "mix1": weights[1]}
