"""The ``graphwright`` command line.

Everything heavy (torch, transformers, graphwright itself) is imported inside the commands, so that
``--help`` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from graphwright.optimizer import cli_support as support
from graphwright.optimizer.cli_support import (
    BatchOption,
    ConfigArgument,
    Dtype,
    GenerateOption,
    GgufOption,
    KlOption,
    LatencyOption,
    MemoryOption,
    ModelArgument,
    PerplexityOption,
    PromptOption,
    ReportOption,
)

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
            from graphwright.optimizer.quantities import clean

            # A message may quote a file that anyone may have written.
            typer.echo(f"graphwright: {clean(error)}", err=True)
            raise typer.Exit(BAD_INPUT) from None


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Turn a Hugging Face causal language model into a faster program, and say why.",
)


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
    kl: KlOption = None,
    perplexity: PerplexityOption = None,
    memory: MemoryOption = None,
    latency: LatencyOption = None,
    passes: Annotated[
        list[str] | None,
        typer.Option("--pass", metavar="PASS", help="Apply this pass; repeat for more. Replaces the choice."),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Text to measure quality and drafts on, one prompt a line."),
    ] = None,
    seed: Annotated[int, typer.Option(help="For what is drawn at random, such as calibration text.")] = 0,
    save: Annotated[Path | None, typer.Option(metavar="DIR", help="Save the program here.")] = None,
    report: ReportOption = None,
) -> None:
    """Optimize a model for a machine and print the report."""
    support.check_suffix(report)
    prompts = support.read_prompts(calibration)
    budget = support.make_budget(kl, perplexity, memory, latency)
    import graphwright as gw

    workload = gw.Workload(batch=batch, prompt=prompt, generate=generate)
    loaded = support.load_model(model, gguf, dtype)
    fast = gw.optimize(
        loaded,
        target=target,
        workload=workload,
        budget=budget,
        passes=passes or None,
        calibration=prompts,
        seed=seed,
    )
    if save is not None:
        fast.save(save)
    support.show(fast.report)
    if report is not None:
        support.write(fast.report, report)


@app.command()
def plan(
    model: ConfigArgument,
    target: Annotated[
        str | None, typer.Option(help="The machine, here or not; see `graphwright targets`.")
    ] = None,
    compare: Annotated[
        str | None, typer.Option(metavar="TARGETS", help="Several machines side by side: h100,h200,mi300x.")
    ] = None,
    prompt: PromptOption = 1024,
    generate: GenerateOption = 256,
    batch: BatchOption = 1,
    gguf: GgufOption = None,
    kl: KlOption = None,
    perplexity: PerplexityOption = None,
    memory: MemoryOption = None,
    latency: LatencyOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    report: ReportOption = None,
) -> None:
    """Predict speed and memory from the configuration alone: no weights, no hardware."""
    support.check_suffix(report)
    names = _planned_targets(target, compare)
    budget = support.make_budget(kl, perplexity, memory, latency)
    import graphwright as gw
    from graphwright.optimizer.what_if import read_config

    workload = gw.Workload(batch=batch, prompt=prompt, generate=generate)
    config = read_config(model, gguf)
    made: Any
    if compare is None:
        made = gw.plan(config, names[0], workload=workload, budget=budget)
    else:
        from graphwright.optimizer import compare as comparing

        made = comparing.compare(config, names, workload=workload, budget=budget)
    if json:
        typer.echo(made.to_json(), nl=False)
    else:
        support.show(made)
    if report is not None:
        support.write(made, report)


def _planned_targets(target: str | None, compare: str | None) -> list[str]:
    """What to plan for: ``--target``, in front of what ``--compare`` lists unless it is one of them."""
    names = [name.strip() for name in (compare or "").split(",") if name.strip()]
    if target is not None and target not in names:
        names.insert(0, target)
    if not names:
        from graphwright.ir.errors import InputError

        raise InputError(
            "no machine to plan for",
            where="plan",
            hint="give --target h100, or --compare h100,h200; `graphwright targets` lists them",
        )
    return names


@app.command()
def calibrate(
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Measure again although there are figures.")
    ] = False,
    seconds: Annotated[float, typer.Option(help="About how long to measure for.")] = 6.0,
) -> None:
    """Measure this machine, so that predictions for it are its own."""
    from graphwright.optimizer.cli_calibrate import run

    run(refresh, seconds)


@app.command()
def targets() -> None:
    """List the machines that a program can be optimized for or planned on."""
    import graphwright as gw

    support.show_list(gw.targets())


@app.command()
def passes() -> None:
    """List the rewrite passes."""
    import graphwright as gw

    support.show_list(gw.passes())


@app.command()
def report(
    file: Annotated[Path, typer.Argument(metavar="FILE.json", help="A report that was saved as JSON.")],
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the HTML page here.")] = None,
) -> None:
    """Show a saved report, or turn it into HTML."""
    from graphwright.optimizer.report import Report

    saved = Report.from_json(support.read_text(file), where=str(file))
    if html is None:
        support.show(saved)
    else:
        support.write_text(html, saved.to_html())
