"""The ``graphwright`` command line.

Everything heavy (torch, transformers, graphwright itself) is imported inside the commands, so that
``--help`` answers at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from graphwright.optimizer.report import Report

BAD_INPUT = 2


class _Group(TyperGroup):
    """Prints the errors that graphwright raises on purpose as a message, without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            from graphwright.ir.errors import GraphwrightError

            if not isinstance(error, GraphwrightError):
                raise
            typer.echo(f"graphwright: {error}", err=True)
            raise typer.Exit(BAD_INPUT) from None


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Turn a Hugging Face causal language model into a faster program, and say why.",
)


class Dtype(str, Enum):
    """The dtypes a model can be loaded in."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Hub id or local folder.")]
GgufOption = Annotated[str | None, typer.Option(metavar="FILE", help="GGUF file in the model's folder.")]
PromptOption = Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")]
GenerateOption = Annotated[int, typer.Option(min=1, help="Tokens to generate.")]
BatchOption = Annotated[int, typer.Option(min=1, help="Sequences at a time.")]


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Options that stand before the command."""
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"graphwright {installed('graphwright')}")
        raise typer.Exit()


@app.command()
def optimize(
    model: ModelArgument,
    target: Annotated[str, typer.Option(help="What to optimize for; see `graphwright targets`.")] = "auto",
    dtype: Annotated[Dtype, typer.Option(help="Dtype to load the model in.")] = Dtype.AUTO,
    prompt: PromptOption = 1024,
    generate: GenerateOption = 256,
    batch: BatchOption = 1,
    gguf: GgufOption = None,
    passes: Annotated[
        list[str] | None,
        typer.Option("--pass", metavar="PASS", help="Apply this pass; repeat for more. Replaces the choice."),
    ] = None,
    save: Annotated[Path | None, typer.Option(metavar="DIR", help="Save the program here.")] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the report: .html or .json.")
    ] = None,
) -> None:
    """Optimize a model for a machine and print the report."""
    if report is not None:
        _check_suffix(report)
    import graphwright as gw

    workload = gw.Workload(batch=batch, prompt=prompt, generate=generate)
    loaded = _load_model(model, gguf, dtype)
    fast = gw.optimize(loaded, target=target, workload=workload, passes=passes or None)
    if save is not None:
        fast.save(save)
    _show(fast.report)
    if report is not None:
        _write(fast.report, report)


@app.command()
def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, local folder or config.json.")],
    target: Annotated[str, typer.Option(help="The machine, here or not; see `graphwright targets`.")],
    prompt: PromptOption = 1024,
    generate: GenerateOption = 256,
    batch: BatchOption = 1,
    gguf: GgufOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Predict speed and memory from the configuration alone: no weights, no hardware."""
    import graphwright as gw

    workload = gw.Workload(batch=batch, prompt=prompt, generate=generate)
    report = gw.plan(_load_config(model, gguf), target, workload=workload)
    if json:
        typer.echo(report.to_json(), nl=False)
    else:
        _show(report)


@app.command()
def targets() -> None:
    """List the machines that a program can be optimized for or planned on."""
    import graphwright as gw

    _list(gw.targets())


@app.command()
def passes() -> None:
    """List the rewrite passes."""
    import graphwright as gw

    _list(gw.passes())


@app.command()
def report(
    file: Annotated[Path, typer.Argument(metavar="FILE.json", help="A report that was saved as JSON.")],
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the HTML page here.")] = None,
) -> None:
    """Show a saved report, or turn it into HTML."""
    from graphwright.optimizer.report import Report

    saved = Report.from_json(_read(file), where=str(file))
    if html is None:
        _show(saved)
    else:
        _write_text(html, saved.to_html())


def _show(report: Report) -> None:
    from rich.console import Console

    console = Console()
    if console.is_terminal:
        console.print(report)
    else:
        typer.echo(str(report))


def _list(entries: Mapping[str, str]) -> None:
    width = max(map(len, entries), default=0)
    for name, line in entries.items():
        typer.echo(f"{name:<{width}}  {line}")


def _check_suffix(path: Path) -> None:
    from graphwright.ir.errors import InputError

    if path.suffix not in (".html", ".json"):
        raise InputError(
            f"cannot tell the report's format from {path.name!r}",
            where="--report",
            hint="end the name in .html or .json",
        )


def _write(report: Report, path: Path) -> None:
    _write_text(path, report.to_html() if path.suffix == ".html" else report.to_json())


def _write_text(path: Path, text: str) -> None:
    from graphwright.ir.errors import InputError

    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write the report: {error.strerror}", where=str(path)) from None


def _read(path: Path) -> str:
    from graphwright.ir.errors import InputError

    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the report: {error}", where=str(path)) from None


def _load_model(name: str, gguf: str | None, dtype: Dtype) -> Any:
    """The transformers model; code from the hub is never run."""
    from transformers import AutoModelForCausalLM

    return _from_pretrained(AutoModelForCausalLM, name, gguf, dtype=dtype.value)


def _load_config(name: str, gguf: str | None) -> Any:
    """The transformers config of a hub id, a folder or a ``config.json``."""
    from transformers import AutoConfig

    return _from_pretrained(AutoConfig, name, gguf)


def _from_pretrained(factory: Any, name: str, gguf: str | None, **options: Any) -> Any:
    from graphwright.ir.errors import InputError

    if gguf is not None:
        options["gguf_file"] = gguf
    try:
        return factory.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        first_line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(
            f"transformers cannot load it: {first_line.strip()}",
            where=name,
            hint="give a hub id that is reachable or cached, or a local folder; --gguf FILE for GGUF weights",
        ) from error
