"""Symbolic sizes as text, and back: an expression such as ``2*s44*s70`` over a table of symbols.

The text is parsed and evaluated by the few rules below; nothing else in it is ever executed.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

_LONGEST = 1000


def describe_symbol(symbol: Any, env: Any) -> dict[str, int]:
    """The size at capture time, and what is known about all sizes beyond "at least two"."""
    known = getattr(env, "backed_var_to_val", None) or env.var_to_val
    found = {"hint": int(known[symbol])}
    bounds = env.var_to_range.get(symbol)
    if bounds is not None and isinstance(bounds.upper, sympy.Integer):
        found["upper"] = int(bounds.upper)
    if bounds is not None and isinstance(bounds.lower, sympy.Integer) and bounds.lower > 2:
        found["lower"] = int(bounds.lower)
    return found


def parse_size(text: str, symbols: Mapping[str, Any]) -> Any:
    """The size that an expression over ``symbols`` means.

    Raises:
        ValueError, SyntaxError: anything but arithmetic over integers and these symbols.
    """
    if len(text) > _LONGEST:
        raise ValueError(f"a size of {len(text)} characters")
    return _evaluate(ast.parse(text, mode="eval").body, symbols)


def new_symbol(env: ShapeEnv, name: str, about: Mapping[str, int]) -> Any:
    """A fresh dynamic size, under the same name where torch allows: compilers key their caches on it."""
    source = ConstantSource(_source_for(name))
    hint = int(about["hint"])
    symbol = env.create_symbol(hint, source=source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
    if "lower" in about or "upper" in about:
        bounds = env.var_to_range[symbol]
        env.constrain_symbol_range(symbol, about.get("lower", 2), about.get("upper", bounds.upper))
    return env.create_symintnode(symbol, hint=hint, source=source)


def _source_for(name: str) -> str:
    """A source from whose name torch derives the symbol ``name`` (its number is a hash modulo 100)."""
    wanted = name.lstrip("s")
    for serial in itertools.count():
        source = f"graphwright_{name}_{serial}"
        number = int(hashlib.sha256(source.encode()).hexdigest(), 16) % 100
        if str(number) == wanted or serial == 2000:
            return source
    raise AssertionError("the loop above ends")


_INFIX: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "Max": torch.sym_max,
    "Min": torch.sym_min,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "FloorDiv": operator.floordiv,
}


def _evaluate(tree: ast.expr, symbols: Mapping[str, Any]) -> Any:
    """Arithmetic over integers and known symbols; anything else is refused."""
    if isinstance(tree, ast.Constant) and type(tree.value) is int:
        return tree.value
    if isinstance(tree, ast.Name) and tree.id in symbols:
        return symbols[tree.id]
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
        return -_evaluate(tree.operand, symbols)
    if isinstance(tree, ast.BinOp) and type(tree.op) in _INFIX:
        left, right = _evaluate(tree.left, symbols), _evaluate(tree.right, symbols)
        if isinstance(tree.op, ast.Pow) and (not isinstance(right, int) or not 0 <= right <= 8):
            raise ValueError("a size with an exponent outside 0 .. 8")
        return _INFIX[type(tree.op)](left, right)
    if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and not tree.keywords:
        function = _FUNCTIONS[tree.func.id]
        left, right = (_evaluate(a, symbols) for a in tree.args)
        return function(left, right)
    raise ValueError(f"a size with {ast.dump(tree)[:80]}")
