"""What the commands of :mod:`graphwright.optimizer.cli` share: options, files, printing, loading.

Nothing heavy is imported at the top, so that ``--help`` answers at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

if TYPE_CHECKING:
    from graphwright.cost_model.workload import Budget

INTERRUPTED = 130  # what a shell reports for a command that Ctrl-C ended


class Dtype(str, Enum):
    """The dtypes a model can be loaded in."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Hub id or local folder.")]
ConfigArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Hub id, local folder or configuration as JSON.")
]
GgufOption = Annotated[str | None, typer.Option(metavar="FILE", help="GGUF file in the model's folder.")]
PromptOption = Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")]
GenerateOption = Annotated[int, typer.Option(min=1, help="Tokens to generate.")]
BatchOption = Annotated[int, typer.Option(min=1, help="Sequences at a time.")]
KlOption = Annotated[
    float | None, typer.Option(help="Budget: mean KL divergence per token that may be lost, in nats.")
]
PerplexityOption = Annotated[
    float | None, typer.Option(help="Budget: perplexity as a ratio; 1.01 allows one per cent more.")
]
MemoryOption = Annotated[
    str | None, typer.Option(metavar="SIZE", help='Budget: peak memory, e.g. "40GiB" or "512MB".')
]
LatencyOption = Annotated[
    float | None, typer.Option(metavar="SECONDS", help="Budget: time per decoded token, in seconds.")
]
ReportOption = Annotated[
    Path | None,
    typer.Option("--report", "--html", metavar="FILE", help="Also write the report: .html or .json."),
]


class _Document(Protocol):
    """What can be shown and written: a report, or a comparison of several."""

    def to_json(self) -> str: ...

    def to_html(self) -> str: ...


def make_budget(
    kl: float | None, perplexity: float | None, memory: str | None, latency: float | None
) -> Budget | None:
    """The budget of the four options; None if none was given."""
    bounds = {"kl": kl, "perplexity": perplexity, "memory": memory, "latency": latency}
    given = {name: bound for name, bound in bounds.items() if bound is not None}
    if not given:
        return None
    import graphwright as gw

    return gw.Budget(**given)  # type: ignore[arg-type]


def show(document: Any) -> None:
    """Print a report or a comparison: drawn on a terminal, plain text elsewhere."""
    from rich.console import Console

    console = Console()
    if console.is_terminal:
        console.print(document)
    else:
        typer.echo(str(document))


def show_list(entries: Mapping[str, str]) -> None:
    """Names and their lines in two columns."""
    width = max(map(len, entries), default=0)
    for name, line in entries.items():
        typer.echo(f"{name:<{width}}  {line}")


# --- files ---------------------------------------------------------------------------------------


def check_suffix(path: Path | None) -> None:
    """Refuse a file name that tells no format, before any work.

    Raises:
        InputError: it ends in neither .html nor .json.
    """
    from graphwright.ir.errors import InputError

    if path is not None and path.suffix not in (".html", ".json"):
        raise InputError(
            f"cannot tell the report's format from {path.name!r}",
            where="--report",
            hint="end the name in .html or .json",
        )


def write(document: _Document, path: Path) -> None:
    """Write HTML or JSON, as the suffix says."""
    write_text(path, document.to_html() if path.suffix == ".html" else document.to_json())


def write_text(path: Path, text: str) -> None:
    """Write a file.

    Raises:
        InputError: it cannot be written.
    """
    from graphwright.ir.errors import InputError

    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write the report: {error.strerror}", where=str(path)) from None


def read_text(path: Path, what: str = "the report") -> str:
    """Read a file.

    Raises:
        InputError: it cannot be read, or is not UTF-8 text.
    """
    from graphwright.ir.errors import InputError

    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {what}: {error}", where=str(path)) from None


def read_prompts(path: Path | None) -> list[str] | None:
    """Calibration text, one prompt a line; empty lines separate and do not count. None without a file.

    Raises:
        InputError: not readable as UTF-8 text, or without a prompt.
    """
    if path is None:
        return None
    prompts = [line.strip() for line in read_text(path, "the calibration text").splitlines()]
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        from graphwright.ir.errors import InputError

        raise InputError(
            "the calibration text is empty",
            where=str(path),
            hint="write one prompt a line, like those that will run; or leave --calibration out",
        )
    return prompts


# --- models --------------------------------------------------------------------------------------


def load_model(name: str, gguf: str | None, dtype: Dtype) -> Any:
    """The transformers model; code from the hub is never run.

    Raises:
        InputError: transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM

    from graphwright.ir.errors import InputError
    from graphwright.optimizer.what_if import first_line

    options = {} if gguf is None else {"gguf_file": gguf}
    try:
        return AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype.value, trust_remote_code=False, **options
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(
            f"transformers cannot load it: {first_line(error)}",
            where=name,
            hint="give a hub id that is reachable or cached, or a local folder; --gguf FILE for GGUF weights",
        ) from error
