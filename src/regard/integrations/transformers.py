"""Joining Hugging Face transformers models: one function registered with `AttentionInterface` and `AttentionMaskInterface`.

No architecture is patched. `attach` sets the attention implementation in the model's configs to "regard" and marks the model's
attention modules; each of their calls then becomes an `AttentionCall`. `detach` puts back what was there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .. import ops
from ..methods.call import AttentionCall, Method, UnsupportedModelError
from ..ops import backends
from . import masks
from .generation import watch
from .session import Session, check_seams, describe
from .sites import ATTRIBUTE, Site, find_sites, is_timm_attention, make_site, site_of, sites_of
from .timm import timm_forward

NAME = "regard"


@dataclass
class _UsedConfig:
    """A config object that speaks of "regard" at present. Models may share one, so it goes back when the last session leaves."""

    config: Any
    implementation: str | None
    sessions: list[Session] = field(default_factory=list)


_USED: dict[int, _UsedConfig] = {}


def attach(model: nn.Module, *methods: Method, spans: Mapping[str, Tensor] | None = None) -> Session:
    """Join methods to a model, for a `with` block or until `.detach()`.

        with regard.attach(model, regard.SlidingWindow(512)):
            model.generate(**inputs)

    Args:
        model: a transformers model (or a module that holds one) whose attention goes through `AttentionInterface`.
        methods: any number; they compose where their seams differ. No method at all, or `Dense()`, changes nothing.
        spans: what the tokens of the prompt are, name -> bool (B, tokens); methods read them as `call.spans`.

    Returns:
        the `Session`. The weights are never changed; after detach the outputs are bit-identical to before.

    Raises:
        UnsupportedModelError (a ValueError): the model's attention does not go through the interface, or a method cannot serve it.
        ValueError: two methods claim the same seam, or something is attached already.
        TypeError: `model` is no module, or a method is none (a class in place of an instance, say).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, need a torch.nn.Module that holds a transformers model")
    check_seams(methods)
    for site in sites_of(model):
        raise ValueError(
            f"model: {describe(site.session.methods)} is attached to this {type(site.session.model).__name__} already; detach first, "
            "or attach everything together: attach(model, first, second)"
        )
    session = Session(model, methods, spans)
    sites = find_sites(session)
    entries = _outermost(model) or [model]
    session.entry = entries[0]
    for method in methods:
        method.check(session.entry)
    _register()
    try:
        for module, site in sites.items():
            _mark(session, module, site)
            if is_timm_attention(module):
                session.override(module, "forward", timm_forward(module, site))
        for config in _configs(model):
            _use(session, config)
        for entry in entries:
            watch(session, entry)
        for method in methods:
            method.setup(session)
    except BaseException:
        session.detach()
        raise
    return session


def detach(model: nn.Module) -> None:
    """Detach whatever is attached to `model` or to a part of it. If nothing is, nothing happens."""
    for session in {id(site.session): site.session for site in sites_of(model)}.values():
        session.detach()


def session_of(model: nn.Module) -> Session | None:
    """The session attached to `model` or to a part of it, if any."""
    return next((site.session for site in sites_of(model)), None)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What the attention layers of an attached model call; the signature is transformers' own."""
    for name in ("indices", "block_indices", "cache"):
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(
                f"model: {type(module).__name__} gives its attention {name!r}, a sparse or paged form that regard does not take"
            )
    site = site_of(module) or _adopt(module)
    session = site.session
    if query.shape[0] == 1 != key.shape[0]:  # learned queries, shared by the batch
        query = query.expand(key.shape[0], -1, -1, -1)
    mask, bias = masks.split_mask(attention_mask)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = bool(is_causal) and attention_mask is None and query.shape[2] > 1
    if causal and key.shape[2] > query.shape[2]:
        # More keys than queries and no mask: that is an empty static cache, whose end holds nothing yet.
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
        position_bias = None if position_bias is None else position_bias[..., : query.shape[2]]
    call = AttentionCall(
        module=module,
        layer=site.layer,
        q=query,
        k=key,
        v=value,
        kind="cross" if site.cross else "self",
        tower=site.tower,
        mask=mask,
        causal=causal,
        scale=scaling,
        dropout=float(dropout),
        soft_cap=softcap,
        sinks=s_aux,
        window=sliding_window,
        cache=_cache_layer(site),
        step=session.step if session is not None else None,
        num_layers=site.num_layers,
        session=session,
        biases=[part for part in (bias, position_bias) if part is not None],
    )
    if session is None:
        out = call.run()
    else:
        session.arrived = True
        session.watch_positions(call)
        out = call.run([method for method in session.methods if method.applies(call)])
        for observe in session.observers:
            observe(call)
    weights = call.weights().to(query.dtype) if kwargs.get("output_attentions") else None
    return out.transpose(1, 2).contiguous(), weights


def _cache_layer(site: Site) -> Any:
    """The cache layer that holds this call's keys, out of the cache that the module's forward was just given."""
    past, site.past = site.past, None
    if past is None:
        return None
    if hasattr(past, "self_attention_cache"):
        past = past.cross_attention_cache if site.cross else past.self_attention_cache
    layers = getattr(past, "layers", ())
    return layers[site.layer] if site.layer < len(layers) else None


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    (
        ops.attention,
        ops.scores,
        backends.load("sdpa"),
        backends.load("cpu"),
    )  # now, not in the middle of a compiled forward
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, masks.attention_mask)


def _mark(session: Session, module: nn.Module, site: Site) -> None:
    module.__dict__[ATTRIBUTE] = site
    session.on_detach(lambda: module.__dict__.pop(ATTRIBUTE))

    def remember_cache(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = ("past_key_values", "past_key_value", "layer_past")  # the last is GPT-NeoX's
        site.past = next((past for name in names if (past := kwargs.get(name)) is not None), None)

    session.on_detach(module.register_forward_pre_hook(remember_cache, with_kwargs=True).remove)


def _adopt(module: nn.Module) -> Site:
    """A site for a module that `attach` did not see: one added since, or one of another model that shares the config object."""
    used = _USED.get(id(getattr(module, "config", None)))
    for session in used.sessions if used else ():
        for path, candidate in session.model.named_modules():
            if candidate is module:
                site = make_site(session, path, module, list(sites_of(session.model)))
                _mark(session, module, site)
                return site
    layer = getattr(module, "layer_idx", None)
    return Site(None, "text", layer if isinstance(layer, int) else 0, cross=False)


def _configs(model: nn.Module) -> Iterator[Any]:
    """Every config object that the model or a part of it reads, sub-configs included, each once."""
    queue: list[Any] = [module.__dict__.get("config") for module in model.modules()]
    seen: set[int] = set()
    while queue:
        config = queue.pop()
        if hasattr(config, "_attn_implementation") and id(config) not in seen:
            seen.add(id(config))
            yield config
            queue += [getattr(config, name, None) for name in config.sub_configs]


def _use(session: Session, config: Any) -> None:
    used = _USED.setdefault(id(config), _UsedConfig(config, config._attn_implementation))
    used.sessions.append(session)
    config._attn_implementation_internal = NAME

    def undo() -> None:
        used.sessions.remove(session)
        if not used.sessions:
            config._attn_implementation_internal = used.implementation
            del _USED[id(config)]

    session.on_detach(undo)


def _outermost(model: nn.Module) -> list[nn.Module]:
    """The transformers models at the top: the model itself, or those that a wrapper holds."""
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        return [model]
    return [found for child in model.children() for found in _outermost(child)]
