"""What each lossy option costs in quality, one site at a time.

The planner chooses among thousands of combinations and measures none of them: it adds up what each
option loses by itself, as HAWQ-V3 does for an integer program over the precisions of layers (Yao et al.,
ICML 2021, on mixed precision and integer linear programming). That losses of small disturbances add up
is an assumption, so the program that is chosen is measured once as a whole and compared with the sum,
see :func:`graphwright.optimizer.quality.check_combined`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from graphwright.ir.errors import InputError, PassError
from graphwright.ir.graph import Graph
from graphwright.ir.verifier import verify
from graphwright.optimizer.quality.metrics import STEP_TOKENS, Reference
from graphwright.optimizer.quality.store import Sensitivity, SensitivityStore, code_version, store_key
from graphwright.optimizer.quality.text import Calibration
from graphwright.passes.base import Pass, parse_layers
from graphwright.runtime.program import Program

Progress = Callable[[str, float], None]
Key = tuple[str, str]


@dataclass(frozen=True)
class Option:
    """One lossy way to run one site.

    Attributes:
        site: the site's name, a layer or an attention.
        pass_string: the pass as it prints, without the site: what is the same at every site.
        apply: rewrites a copy of the exact graph at this site and nowhere else.
        version: what tells the pass's code from an earlier one, where it is not graphwright's own (which
            is part of every file's key): a result of other code is not used again.
    """

    site: str
    pass_string: str
    apply: Callable[[Graph], None]
    version: str = ""

    @property
    def key(self) -> Key:
        """What the result is filed under."""
        return self.site, self.pass_string


def site_options(graph: Graph, passes: Iterable[Pass]) -> list[Option]:
    """Every pass at every site of ``graph`` where it is legal; the sites of a pass in the model's order.

    Args:
        graph: the exact graph; not changed.
        passes: lossy passes, with their options settled; ``layers`` restricts a pass to some sites and
            is not part of the options' pass strings.
    """
    found: dict[Key, Option] = {}
    for rewrite in passes:
        layers = parse_layers(rewrite.layers)
        anywhere = replace(rewrite, layers="")
        for site in anywhere.find(graph):
            if (layers is None or site.layer in layers) and anywhere.legal(site).ok:
                apply, version = _at_site(anywhere, site.name), code_version(type(anywhere))
                option = Option(site.name, str(anywhere), apply, version)
                found.setdefault(option.key, option)
    return list(found.values())


def measure_sensitivities(
    graph: Graph,
    options: Sequence[Option],
    calibration: Calibration,
    *,
    make_program: Callable[[Graph], Program],
    groups: int | None = None,
    step: int = STEP_TOKENS,
    prompt: int = 0,
    progress: Progress | None = None,
    store: SensitivityStore | None = None,
) -> dict[Key, Sensitivity]:
    """What each option adds to the KL and the log perplexity of the program, measured by itself.

    Each measurement lowers a copy of the graph with one option applied and runs the calibration rows
    against the exact program, which runs once if its logits fit in memory. Results are kept on disk as
    they come, so that an interruption loses one of them at most, and a second call measures nothing.

    With ``groups``, sites are put into that many contiguous groups of about equal size; an option is
    applied at all sites of a group at once and what it loses is divided among them evenly. That costs
    ``groups`` measurements for each pass and not one for each site. Both this and the planner's sums
    assume that losses add up over sites; measuring the chosen program once checks it.

    Args:
        graph: the exact program's graph; not changed.
        options: what to measure; sites in the order of the model.
        calibration: the text.
        make_program: lowers a graph, op by op: compiling would take longer than measuring.
        groups: measure contiguous sites together; None measures each site by itself.
        step: tokens of a row in one step.
        prompt: tokens at the start of each row that run as a prompt and are not compared.
        progress: called with a label and the share that is done.
        store: where results are kept; by default a file for these weights and this text.

    Returns:
        By (site, pass string), an entry for each option. An infinite one broke the program.

    Raises:
        InputError: fewer than one group, or a calibration without rows.
        PassError: an option does not apply.
        VerificationError: an option left a graph that breaks an invariant.
    """
    if groups is not None and groups < 1:
        raise InputError(
            f"sites cannot be put into {groups} groups", where="groups", hint="give 1 or more, or None"
        )
    if not options:
        return {}
    text = f"{calibration.fingerprint} after {prompt}" if prompt else calibration.fingerprint
    store = store or SensitivityStore(store_key(graph, text, step))
    found: dict[Key, Sensitivity] = {}
    reference: Reference | None = None
    bundles = list(_bundles(options, groups))
    for index, bundle in enumerate(bundles):
        known = store.read()  # anew each time: another process may be measuring the same
        found.update(_known(bundle, known))
        missing = [option for option in bundle if option.key not in found]
        if not missing:
            continue
        if progress is not None:
            progress(_label(missing), index / len(bundles))
        if reference is None:
            reference = Reference(make_program(graph), calibration.rows, step=step, prompt=prompt)
        result = _measure(graph, missing, reference, make_program)
        found.update({option.key: result for option in missing})
        store.add({_name(option): result for option in missing})
    return {option.key: found[option.key] for option in options}


def combine(sensitivities: Iterable[Sensitivity]) -> Sensitivity:
    """The prediction for several options at once: the sum."""
    chosen = list(sensitivities)
    return Sensitivity(sum(s.kl for s in chosen), sum(s.log_perplexity for s in chosen))


# --- one measurement -----------------------------------------------------------------------------


def _measure(
    graph: Graph, options: Sequence[Option], reference: Reference, make_program: Callable[[Graph], Program]
) -> Sensitivity:
    changed = graph.copy()
    for option in options:
        option.apply(changed)
    changed.eliminate_dead_code()
    changed.drop_unused_placeholders()
    verify(changed)
    quality = reference.measure(make_program(changed))
    share = len(options)
    return Sensitivity(quality.kl / share, quality.log_perplexity / share, share)


def _at_site(rewrite: Pass, name: str) -> Callable[[Graph], None]:
    """``rewrite`` at the site of this name, whatever else was rewritten before."""

    def apply(graph: Graph) -> None:
        sites = [s for s in rewrite.find(graph) if s.name == name and rewrite.legal(s).ok]
        if not sites:
            raise PassError(f"{rewrite} does not apply any more", where=name)
        for site in sites:
            rewrite.apply(site, graph)

    return apply


# --- which sites are measured together -----------------------------------------------------------


def _bundles(options: Sequence[Option], groups: int | None) -> Iterator[list[Option]]:
    """Options that are measured together: one pass at neighbouring sites, each option once."""
    sites = list(dict.fromkeys(option.site for option in options))
    parts = min(groups or len(sites), len(sites))
    group = {site: index * parts // len(sites) for index, site in enumerate(sites)}
    bundles: dict[tuple[int, str], dict[Key, Option]] = {}
    for option in options:
        bundle = bundles.setdefault((group[option.site], option.pass_string), {})
        bundle.setdefault(option.key, option)
    for bundle in bundles.values():
        yield list(bundle.values())


def _known(bundle: Sequence[Option], stored: dict[str, Sensitivity]) -> dict[Key, Sensitivity]:
    """What was measured before, at least as finely as it would be now."""
    found = {option.key: stored.get(_name(option)) for option in bundle}
    return {key: entry for key, entry in found.items() if entry is not None and entry.shared <= len(bundle)}


def _name(option: Option) -> str:
    return "|".join(filter(None, (option.site, option.pass_string, option.version)))


def _label(options: Sequence[Option]) -> str:
    where = options[0].site if len(options) == 1 else f"{options[0].site} to {options[-1].site}"
    return f"measuring {options[0].pass_string} at {where}"
