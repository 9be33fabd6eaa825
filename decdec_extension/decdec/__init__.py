"""DecDEC: dynamic error compensation for low-bit LLMs (Park et al., OSDI 2025)."""

__version__ = "1.0.0"

_FROM_HUB = ("attach", "load", "set_compensation")


def __getattr__(name: str) -> object:
    """``decdec.attach``, ``load`` and ``set_compensation`` are :mod:`decdec.hub`'s, imported when first asked for."""
    if name in _FROM_HUB:
        from decdec import hub

        return getattr(hub, name)
    raise AttributeError(f"module 'decdec' has no attribute {name!r}")
