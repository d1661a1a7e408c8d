"""The ground floor: semantic ops with their reference bodies, codecs, the graph, matcher and verifier."""

from graphwright.ir import depth_ops as _depth_ops  # noqa: F401  registers its ops
from graphwright.ir import eviction_ops as _eviction_ops  # noqa: F401  registers its ops
from graphwright.ir import packed_ops as _packed_ops  # noqa: F401
from graphwright.ir import prefill_ops as _prefill_ops  # noqa: F401
from graphwright.ir import prefix_ops as _prefix_ops  # noqa: F401
from graphwright.ir import sparse_ops as _sparse_ops  # noqa: F401
