"""FIT: networks without side tokens; images cut into groups."""

import regard


def without_sides(case):
    """The authors make the stem of side tokens and its norm only when there are some."""
    model = regard.models.FIT(**case.kwargs).eval()
    regard.load_official(model, case.params)
    x, latents = model(case.inputs["x"])
    return {"x": x, "latents": latents}


def images(case):
    x = case.inputs["x"]
    groups = regard.nn.group_image(x, tile=4, patch=2)
    snake = regard.nn.group_image(x, tile=4, order="snake")
    assert (regard.nn.ungroup_image(groups, *x.shape[2:], tile=4, patch=2) == x).all()
    return {"groups": groups, "snake": snake.flatten(2)}
