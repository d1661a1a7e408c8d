"""What the capture of a model depends on, as one hash; None where that cannot be known.

dynamo specializes a graph on code and on plain values. Both are hashed: the configuration, the plain
attributes of every module, the metadata of its tensors, and the code that its forward can reach by
name, which also sees functions that were replaced at run time.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import platform
import sys
import types
from collections.abc import Iterator
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.modules import module as torch_module
from transformers import PreTrainedConfig, PreTrainedModel

import graphwright

# Changed with the versions of their packages, which are hashed.
_FRAMEWORKS = (
    frozenset({"torch", "numpy", "graphwright", "sympy", "huggingface_hub", "safetensors", "accelerate"})
    | sys.stdlib_module_names
)
# Loading, saving and generating: transformers' base classes mix them into every model.
_MACHINERY = tuple(
    f"transformers.{name}"
    for name in ("modeling_utils", "generation", "utils", "integrations", "core_model_loading", "distributed")
)
_OWN_SOURCES = ("ir", "optimizer/capture.py", "optimizer/export.py", "optimizer/graph_cache.py")
_CONFIG_NOISE = frozenset(
    {"_name_or_path", "_model_name_or_path", "_commit_hash", "transformers_version"}
) | frozenset({"_attn_implementation", "_attn_implementation_internal", "_experts_implementation"})
_ATTRIBUTE_NOISE = frozenset(
    {"name_or_path", "generation_config", "_parameters", "_buffers", "_modules", "_backward_hooks"}
    | {"_backward_pre_hooks", "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks"}
    | {"_load_state_dict_post_hooks", "_is_full_backward_hook", "warnings_issued"}
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_MOST_CODE = 5000
_DEPTH = 4


class Unstable(Exception):
    """Something about the model has no identity that another process could recognize."""


def fingerprint(model: PreTrainedModel) -> tuple[str, frozenset[str]] | None:
    """A hash of everything that the captured graph depends on.

    Returns:
        The hash, and digests of the tensors that modules hold as plain attributes; None if a module is
        hooked, patched or defined where no other process would find it again.
    """
    try:
        return _Fingerprint(model).result()
    except Unstable:
        return None


def tensor_digest(tensor: torch.Tensor) -> str:
    """A hash of a tensor's contents, shape and dtype."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    content = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode() + content).hexdigest()


def clean_config(config: Any) -> dict[str, Any]:
    """A configuration as JSON types, without names, paths and versions."""

    def clean(content: Any) -> Any:
        if isinstance(content, dict):
            return {str(k): clean(v) for k, v in content.items() if k not in _CONFIG_NOISE}
        if isinstance(content, list | tuple):
            return [clean(v) for v in content]
        if content is None or isinstance(content, bool | int | str):
            return content
        if isinstance(content, float) and content - content == 0:
            return content
        return str(content)

    found: dict[str, Any] = clean(config.to_dict())
    return found


class _Fingerprint:
    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.hash = hashlib.sha256()
        self.seen_code: set[int] = set()
        self.pending: list[Any] = []
        self.keep_alive: list[Any] = []  # so that no id is used twice
        self.configs: dict[int, int] = {}
        self.constants: set[str] = set()

    def result(self) -> tuple[str, frozenset[str]]:
        self.add("environment", _environment(), _own_sources())
        self.add("globals", str(torch.get_default_dtype()), torch.is_autocast_enabled("cpu"))
        if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
            raise Unstable("global forward hooks")
        self.tensors()
        classes: dict[type, None] = {}
        for name, module in self.model.named_modules():
            self.module(name, module)
            classes.setdefault(type(module))
        for cls in classes:
            self.module_class(cls)
        while self.pending:
            self.code_of(self.pending.pop())
        return self.hash.hexdigest(), frozenset(self.constants)

    def add(self, *parts: Any) -> None:
        self.hash.update(repr(parts).encode() + b"\0")

    def tensors(self) -> None:
        """Metadata only, with which tensors are one and the same."""
        first: dict[int, str] = {}
        named = itertools.chain(
            self.model.named_parameters(remove_duplicate=False),
            self.model.named_buffers(remove_duplicate=False),
        )
        for name, tensor in named:
            owner = first.setdefault(id(tensor), name)
            kind = type(tensor).__qualname__
            self.add(
                name, owner, kind, str(tensor.dtype), tuple(tensor.shape), tensor.stride(), tensor.device.type
            )

    def module(self, name: str, module: torch.nn.Module) -> None:
        if any(getattr(module, hooks, None) for hooks in _HOOKS):
            raise Unstable(f"{name} has forward hooks")
        attributes = vars(module)
        if "forward" in attributes or "__call__" in attributes or attributes.get("_compiled_call_impl"):
            raise Unstable(f"{name} has a forward of its own")
        self.add("module", name, type(module).__module__, type(module).__qualname__)
        for key in sorted(attributes):
            if key not in _ATTRIBUTE_NOISE and key not in _HOOKS:
                self.add(key, self.plain(attributes[key], _DEPTH))

    def plain(self, value: Any, depth: int) -> Any:
        """``value`` as data whose repr is the same in every process."""
        if value is None or isinstance(value, bool | int | float | complex | str | bytes):
            return value
        if isinstance(value, torch.dtype | torch.device | torch.memory_format | torch.layout | torch.Size):
            return str(value)
        if isinstance(value, Enum):
            return str(value)
        if isinstance(value, torch.Tensor):
            if value.device.type == "meta":
                return ("meta", str(value.dtype), tuple(value.shape))
            digest = tensor_digest(value)
            self.constants.add(digest)
            return digest
        if isinstance(value, PreTrainedConfig):
            return self.config(value)
        if isinstance(value, type):
            return f"{value.__module__}.{value.__qualname__}"
        if isinstance(value, torch.nn.Module):
            return ("module", type(value).__qualname__)  # reached by its own name, or code that is hashed
        if callable(value) and not hasattr(value, "__dict__"):
            return ("builtin", str(getattr(value, "__qualname__", type(value).__qualname__)))
        if isinstance(value, types.FunctionType | types.MethodType | types.BuiltinFunctionType):
            return self.function(value)
        if isinstance(value, functools.partial):
            return [self.plain(part, depth) for part in (value.func, value.args, value.keywords)]
        if depth == 0:
            return type(value).__qualname__
        if isinstance(value, dict):
            return sorted((repr(k), repr(self.plain(v, depth - 1))) for k, v in value.items())
        if isinstance(value, list | tuple):
            return [self.plain(v, depth - 1) for v in value]
        if isinstance(value, set | frozenset):
            return sorted(repr(self.plain(v, depth - 1)) for v in value)
        fields = getattr(value, "__dict__", {})
        return (type(value).__qualname__, self.plain(dict(fields), depth - 1))

    def config(self, config: Any) -> Any:
        if id(config) in self.configs:
            return ("config", self.configs[id(config)])
        self.configs[id(config)] = len(self.configs)
        self.keep_alive.append(config)
        return json.dumps(clean_config(config), sort_keys=True)

    # --- code ------------------------------------------------------------------------------------

    def module_class(self, cls: type) -> None:
        for base in cls.__mro__:
            if _is_framework(base.__module__) and base.__module__ != "__main__":
                if base is cls:
                    self.add(_identity(base))
                continue
            self.add(_identity(base), _file_hash(base.__module__))
            for name, member in sorted(vars(base).items()):
                if name not in ("__doc__", "__module__", "__dict__", "__weakref__", "_abc_impl"):
                    self.member(name, member)

    def member(self, name: str, member: Any) -> None:
        if isinstance(member, staticmethod | classmethod):
            member = member.__func__
        if isinstance(member, property):
            for accessor in (member.fget, member.fset):
                self.reach(accessor)
        elif isinstance(member, types.FunctionType):
            self.add(name, self.function(member))
        elif member is None or isinstance(member, bool | int | float | str | tuple | list):
            self.add(name, self.plain(member, _DEPTH))

    def function(self, function: Any) -> Any:
        function = getattr(function, "__func__", function)
        self.reach(function)
        return (str(getattr(function, "__module__", "")), str(getattr(function, "__qualname__", "")))

    def reach(self, function: Any) -> None:
        if isinstance(function, types.FunctionType) and id(function) not in self.seen_code:
            if _is_framework(function.__module__ or ""):
                return
            self.seen_code.add(id(function))
            self.keep_alive.append(function)
            self.pending.append(function)
            if len(self.seen_code) > _MOST_CODE:
                raise Unstable("too much code to follow")

    def code_of(self, function: types.FunctionType) -> None:
        """A function's code, its defaults, and what its names mean."""
        self.add(function.__module__, function.__qualname__)
        self.code(function.__code__)
        for default in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self.add(self.plain(default, 1))
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
            self.named(name, _cell(cell))
        for name in sorted(set(_names(function.__code__))):
            if name in function.__globals__:
                self.named(name, function.__globals__[name])
        self.reach(getattr(function, "__wrapped__", None))

    def named(self, name: str, value: Any) -> None:
        if value is None or isinstance(value, bool | int | float | str):
            self.add(name, value)
        elif isinstance(value, types.FunctionType):
            self.add(name, self.function(value))
        elif isinstance(value, tuple | list):
            self.add(name, self.plain(value, 2))
        elif isinstance(value, type):
            self.add(name, value.__module__, value.__qualname__)

    def code(self, code: types.CodeType) -> None:
        self.add(code.co_name, code.co_code, code.co_names, code.co_varnames, code.co_freevars)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self.code(constant)
            else:
                self.add(self.plain(constant, 2))


def _is_framework(module: str) -> bool:
    return module.split(".")[0] in _FRAMEWORKS or module.startswith(_MACHINERY)


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _identity(cls: type) -> str:
    """Where another process finds this class."""
    found: Any = sys.modules.get(cls.__module__)
    for part in cls.__qualname__.split("."):
        found = getattr(found, part, None)
    if found is not cls or cls.__module__ == "__main__":
        raise Unstable(f"{cls.__module__}.{cls.__qualname__} cannot be found again")
    return f"{cls.__module__}.{cls.__qualname__}"


@cache
def _file_hash(module: str) -> str:
    path = getattr(sys.modules.get(module), "__file__", None)
    try:
        return hashlib.sha256(Path(path or "").read_bytes()).hexdigest()
    except OSError:
        raise Unstable(f"{module} has no source file") from None


@cache
def _own_sources() -> str:
    """A hash of the code that captures, raises and stores graphs."""
    root = Path(graphwright.__file__).parent
    found = hashlib.sha256(Path(__file__).read_bytes())
    for name in _OWN_SOURCES:
        path = root / name
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            found.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return found.hexdigest()


def _environment() -> tuple[str, ...]:
    return (platform.python_version(), torch.__version__, transformers.__version__)
