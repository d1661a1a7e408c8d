"""What passes and runtime both know of speculation."""

from __future__ import annotations

#: Verifiers that change the distribution of sampled tokens. With one of these, speculation is lossy.
LOSSY_VERIFIERS = frozenset({"typical"})
