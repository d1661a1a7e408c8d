"""Which code runs a semantic op: implementations by provider, and an ordered, recorded choice.

A provider is a family of kernels (``cpp``, ``triton``) in a package of that name in this folder. Importing
the package registers the provider and, with :func:`implements`, its kernels. :func:`select` asks the
providers in order whether they can run an op on given (real or fake) arguments, and falls back to the
op's reference body. Every answer carries its reason.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch._C import parse_schema

from graphwright import kernels as _package
from graphwright.ir.errors import PassError
from graphwright.ir.ops import NAMESPACE, SEMANTIC_OPS, SemanticOp

REFERENCE = "reference"

Supports = Callable[..., "str | None"]


@dataclass(frozen=True)
class Provider:
    """A family of kernels.

    Args:
        name: how users ask for it; its torch ops are in the namespace ``graphwright_<name>``.
        devices: device types that it serves, e.g. ``("cpu",)``.
        available: gives ``(ok, reason)``; called before a kernel is first chosen; must not raise. May build.
        on_request: device types that it serves too, slowly: only where it is asked for by name.
    """

    name: str
    devices: tuple[str, ...]
    available: Callable[[], tuple[bool, str]]
    on_request: tuple[str, ...] = ()

    @property
    def namespace(self) -> str:
        """The torch.ops namespace of its kernels."""
        return f"{NAMESPACE}_{self.name}"


@dataclass(frozen=True)
class Implementation:
    """One registered kernel, before it is chosen.

    Attributes:
        op_name: the semantic op.
        provider: the provider's name.
        supports: gives None when the kernel takes the arguments, else the reason why not.
        load: gives the ``OpOverload`` that goes into graphs; only called when the provider is available.
        body: the Python body behind it; None for a compiled library's.
    """

    op_name: str
    provider: str
    supports: Supports
    load: Callable[[], torch._ops.OpOverload]
    body: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Kernel:
    """The choice for one op.

    Attributes:
        op_name: the semantic op.
        op: the ``OpOverload`` with the semantic op's schema, a valid target of FX nodes.
        provider: who runs it; ``"reference"`` for the op's own body.
        reason: why this one, and why not those before it in the order.
    """

    op_name: str
    op: torch._ops.OpOverload
    provider: str
    reason: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the kernel."""
        return self.op(*args, **kwargs)


_ASSUMED: ContextVar[frozenset[str]] = ContextVar("graphwright_assumed_providers", default=frozenset())
_PROVIDERS: dict[str, Provider] = {}
_IMPLEMENTATIONS: dict[tuple[str, str], Implementation] = {}


def register_provider(
    name: str,
    devices: Sequence[str],
    available: Callable[[], tuple[bool, str]],
    on_request: Sequence[str] = (),
) -> Provider:
    """Make a family of kernels known; families are preferred in the order of their names."""
    provider = Provider(name, tuple(devices), available, tuple(on_request))
    _PROVIDERS[name] = provider
    return provider


def semantic(op_name: str) -> SemanticOp:
    """The semantic op of that name.

    Raises:
        PassError: there is none.
    """
    if op_name not in SEMANTIC_OPS:
        raise PassError(f"there is no semantic op {op_name!r}", hint=f"known: {', '.join(SEMANTIC_OPS)}")
    return SEMANTIC_OPS[op_name]


@cache
def _schema(op_name: str) -> torch.FunctionSchema:
    return parse_schema(f"{NAMESPACE}::{semantic(op_name).schema}")


def _fake(op_name: str) -> Callable[..., Any]:
    """The shape function of the semantic op, by running the op on the fake tensors that come in."""

    def fake(*args: Any, **kwargs: Any) -> Any:
        return semantic(op_name).overload(*args, **kwargs)

    return fake


@cache
def _library(namespace: str) -> torch.library.Library:
    return torch.library.Library(namespace, "FRAGMENT")


def _same_interface(schema: torch.FunctionSchema, other: torch.FunctionSchema) -> bool:
    """Equal arguments (names, types, aliases, defaults) and results; the op's name may differ."""
    return str(schema).split("(", 1)[1] == str(other).split("(", 1)[1]


def _checked(op_name: str, op: torch._ops.OpOverload) -> torch._ops.OpOverload:
    wanted = _schema(op_name)
    if not _same_interface(op._schema, wanted):
        raise PassError(
            f"{op} has another schema than the semantic op {op_name}: {op._schema} against {wanted}",
            where=str(op),
            hint="give the kernel the semantic op's schema (graphwright/ir/ops.py)",
        )
    return op


def _define(op_name: str, namespace: str, body: Callable[..., Any]) -> Callable[[], torch._ops.OpOverload]:
    """Turn a Python body into a torch op with the semantic schema, when it is first needed."""

    @cache
    def load() -> torch._ops.OpOverload:
        library = _library(namespace)
        library.define(semantic(op_name).schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(op_name, body, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{namespace}::{op_name}", _fake(op_name), lib=library)
        return getattr(getattr(torch.ops, namespace), op_name).default

    return load


def _takes_everything(**_: Any) -> str | None:
    return None


def implements(
    op_name: str,
    provider: str,
    supports: Supports = _takes_everything,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a Python body as a provider's kernel for a semantic op.

    The body becomes a torch op ``graphwright_<provider>::<op_name>`` with the semantic op's schema and
    shape function. Its parameters must have the names and defaults of the schema's arguments.

    Args:
        op_name: a key of ``SEMANTIC_OPS``.
        provider: a registered provider's name.
        supports: called with the op's arguments by name (tensors may be fake); None means yes, text no.

    Raises:
        PassError: no such op or provider, or other parameters than the schema's.
    """

    def register(body: Callable[..., Any]) -> Callable[..., Any]:
        # The dispatcher leaves out arguments that have their default: the body needs the schema's defaults.
        arguments = _schema(op_name).arguments
        wanted = [f"{a.name}={a.default_value}" if a.has_default_value() else a.name for a in arguments]
        parameters = inspect.signature(body).parameters.values()
        found = [p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters]
        if found != wanted:
            raise PassError(
                f"the {provider} kernel for {op_name} takes {found}, the op's schema {wanted}",
                where=getattr(body, "__qualname__", repr(body)),
                hint="give the parameters the names and defaults of graphwright/ir/ops.py",
            )
        load = _define(op_name, _provider(provider).namespace, body)
        _add(Implementation(op_name, provider, supports, load, body))
        return body

    return register


def implements_compiled(op_name: str, provider: str, supports: Supports) -> None:
    """Register a torch op that the provider's compiled library defines under ``graphwright_<provider>``.

    Its schema is compared with the semantic op's when it is first loaded; the shape function is the
    semantic op's.

    Raises:
        PassError: no such op or provider.
    """
    semantic(op_name)
    namespace = _provider(provider).namespace

    @cache
    def load() -> torch._ops.OpOverload:
        op = _checked(op_name, getattr(getattr(torch.ops, namespace), op_name).default)
        torch.library.register_fake(f"{namespace}::{op_name}", _fake(op_name), lib=_library(namespace))
        return op

    _add(Implementation(op_name, provider, supports, load))


def _add(implementation: Implementation) -> None:
    _IMPLEMENTATIONS[implementation.op_name, implementation.provider] = implementation


@cache
def _discover() -> None:
    """Import the provider packages in this folder, in the order of their names."""
    for module in pkgutil.iter_modules(_package.__path__):
        if module.ispkg:
            importlib.import_module(f"{_package.__name__}.{module.name}")


def _provider(name: str) -> Provider:
    if name not in _PROVIDERS:
        known = ", ".join([*_PROVIDERS, REFERENCE])
        raise PassError(f"there is no kernel provider {name!r}", hint=f"known: {known}")
    return _PROVIDERS[name]


def providers() -> tuple[Provider, ...]:
    """All providers, in order of preference."""
    _discover()
    return tuple(_PROVIDERS[name] for name in sorted(_PROVIDERS))


def kernels(op_name: str | None = None) -> tuple[Implementation, ...]:
    """All registered kernels, or those for one op; nothing is built or loaded."""
    _discover()
    return tuple(k for k in _IMPLEMENTATIONS.values() if op_name in (None, k.op_name))


def _arguments(op_name: str, given: dict[str, Any]) -> dict[str, Any]:
    """The op's arguments by name, with the schema's defaults filled in."""
    schema = _schema(op_name)
    names = {argument.name for argument in schema.arguments}
    unknown = sorted(set(given) - names)
    if unknown:
        raise PassError(f"{op_name} has no argument {unknown[0]!r}", hint=f"its schema: {schema}")
    filled = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    return {**filled, **given}


def _refusal(
    provider: Provider, op_name: str, device: torch.device, arguments: dict[str, Any], by_name: bool
) -> str | None:
    """Why a provider cannot run an op, or None when it can."""
    implementation = _IMPLEMENTATIONS.get((op_name, provider.name))
    if implementation is None:
        return f"it has no kernel for {op_name}"
    if device.type not in provider.devices + (provider.on_request if by_name else ()):
        return f"it does not serve {device.type}"
    reason = implementation.supports(**arguments)
    if reason is not None:
        return reason
    if provider.name in _ASSUMED.get():
        return None
    ok, why = provider.available()
    return None if ok else why


@contextmanager
def assuming_available(*names: str) -> Iterator[None]:
    """Inside, these providers are chosen as if their device were here: for planning what runs elsewhere."""
    token = _ASSUMED.set(_ASSUMED.get() | set(names))
    try:
        yield
    finally:
        _ASSUMED.reset(token)


def select(
    op_name: str,
    device: torch.device | str,
    providers: Iterable[str] | str | None = None,
    **fake_args: Any,
) -> Kernel:
    """Choose the kernel for an op on given arguments.

    Args:
        op_name: the semantic op.
        device: where it will run.
        providers: names in order of preference; the default is all of them, by name. A provider that
            is named and cannot run the op is passed over with its reason; ``"reference"`` ends the search.
        fake_args: the op's arguments by name; tensors may be fake. Missing ones take their default.

    Returns:
        The first that can run it, else the reference body, with the reason.

    Raises:
        PassError: an op or provider that does not exist, a provider asked for by name that has no kernel
            for this op at all, or an argument that the op does not have.
    """
    _discover()
    op = semantic(op_name)
    arguments = _arguments(op_name, fake_args)
    device = torch.device(device)
    asked = [providers] if isinstance(providers, str) else None if providers is None else list(providers)
    passed_over: list[str] = []
    for name in sorted(_PROVIDERS) if asked is None else asked:
        if name == REFERENCE:
            passed_over.append("reference: asked for by name")
            break
        provider = _provider(name)
        if asked is not None and (op_name, name) not in _IMPLEMENTATIONS:
            have = sorted({k.provider for k in kernels(op_name)} | {REFERENCE})
            raise PassError(
                f"provider {name!r} has no kernel for {op_name}",
                hint=f"providers that have one: {', '.join(have)}",
            )
        refusal = _refusal(provider, op_name, device, arguments, asked is not None)
        if refusal is None:
            chosen = _IMPLEMENTATIONS[op_name, name].load()
            reason = "; ".join([*passed_over, f"{name}: first that takes these arguments"])
            return Kernel(op_name, chosen, name, reason)
        passed_over.append(f"{name}: {refusal}")
    reason = "; ".join(passed_over) or "no provider is registered"
    return Kernel(op_name, op.overload, REFERENCE, reason)
