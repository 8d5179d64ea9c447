"""Paper 127: folding the network for inference gives what the authors' folding gives."""

import regard


def fused(case):
    model = regard.models.SHViT(**case.kwargs)
    regard.load_official(model, case.params)
    return {"fused": model.fuse()(case.inputs["x"])}
