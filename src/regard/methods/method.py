"""`Method`: what is attached to a pretrained model. Its overridden hooks are the seams it claims."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from .layer_spec import in_layers

if TYPE_CHECKING:
    from ..ops.masks import Mask
    from ..ops.selection import Selection
    from .call import AttentionCall

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

SEAMS = ("mask", "score", "select", "attend", "edit", "cache", "logits")


class UnsupportedModelError(ValueError):
    """The method, or regard itself, cannot serve this model; the message says why."""


@dataclass
class Method:
    """Base of everything that `regard.attach` joins to a model: a small dataclass whose fields are the paper's knobs.

    A subclass overrides the hooks of the seams it claims, and only those; `seams()` reads which from the class. Two attached
    methods may not claim the same seam. Hooks are called for every `AttentionCall` that `applies` accepts.

    Class attributes:
        kinds: kinds of attention that the method treats. towers: towers that it treats; None = the one that generates text
            (or the only one). honours_edits: whether `attend` itself honours `call.bias()` and `call.weight_edits`.
            bounds_positions: whether the model never meets a distance beyond those it was trained on, however long the context
            (may be a property).

    A field named `layers` (layer numbers, negative from the end; "first:n", "last:n", "odd", "even"; None = all), if the subclass has
    one, restricts it.
    """

    kinds: ClassVar[tuple[str, ...]] = ("self",)
    towers: ClassVar[tuple[str, ...] | None] = None
    honours_edits: ClassVar[bool] = False
    bounds_positions: ClassVar[bool] = False

    # Seams

    def mask(self, call: AttentionCall) -> Mask | None:
        """Who may look at whom, by absolute positions; joined to the model's own mask with `&`. None: no restriction here."""
        return None

    def score(self, call: AttentionCall) -> ScoreMod | None:
        """A score mod, applied to the scaled scores after the model's own soft cap."""
        return None

    def select(self, call: AttentionCall) -> Selection | None:
        """Which key blocks each query block looks at; the model's own mask holds inside."""
        return None

    def attend(self, call: AttentionCall) -> Tensor | None:
        """The head outputs (B, H, N, Dv), computed by the method itself (over a ragged cache, say). None: not this call."""
        return None

    def edit(self, call: AttentionCall) -> None:
        """Contribute through `call.add_bias`, `scale_keys`, `on_weights`, `on_output`; or only look."""

    def cache(self, model: nn.Module) -> Any:
        """A fresh, empty transformers `Cache` for the decoder of `model`; called once a generation."""
        return None

    def logits(self, model: nn.Module, session: Any) -> Any:
        """A transformers `LogitsProcessor`, or a list of them, for one generation. They see the raw logits, before the
        processors of `generate` itself (in beam search: log-probabilities); one with a true attribute `last` comes after all."""
        return None

    # Not seams

    def check(self, model: nn.Module) -> None:
        """Raise `UnsupportedModelError` when the method cannot serve `model`. Called by `attach` before anything is changed."""

    def setup(self, session: Any) -> None:
        """Called once, when everything is in place; may register `session.capture(name, module)` for what `logits` wants to read."""

    def applies(self, call: AttentionCall) -> bool:
        """Whether the hooks are to be called for this call."""
        towers = self.towers if self.towers is not None else (getattr(call.session, "main_tower", call.tower),)
        if call.kind not in self.kinds or call.tower not in towers:
            return False
        return in_layers(getattr(self, "layers", None), call.layer, call.num_layers)

    @classmethod
    def seams(cls) -> tuple[str, ...]:
        """The seams that this class claims: the hooks it overrides."""
        return cls._claimed

    _claimed: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._claimed = tuple(name for name in SEAMS if getattr(cls, name) is not getattr(Method, name))
