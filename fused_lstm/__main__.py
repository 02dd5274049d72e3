"""`python -m fused_lstm`: what was built, what this processor offers, what serves a call."""

from . import backends

print(backends())
