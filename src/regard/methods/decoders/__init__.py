"""What a model says, given what it looked at: methods that work through logits processors."""

from ..._lazy import lazy_exports

_TABLE = {
    "LargePiG": ".largepig",
    "ProxyMixer": ".proxy_mixer",
    "copy_gate": ".pointer",
    "pointer_distribution": ".pointer",
    "mix_in_pointer": ".pointer",
    "trusted_source": ".pointer",
    "attended_source": ".pointer",
    "early_exit_logits": ".early_exit",
    "js_divergence": ".early_exit",
    "contrast": ".early_exit",
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _TABLE)
