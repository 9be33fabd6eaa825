"""DecDEC: dynamic error compensation for low-bit LLMs (Park et al., OSDI 2025)."""

__version__ = "1.0.0"
