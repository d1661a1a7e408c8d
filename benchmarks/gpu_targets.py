"""What the GPU benchmark aims at, whether it got there, and the table of its figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_K = 1024
Sections = Mapping[str, Any]


@dataclass(frozen=True)
class Aim:
    """A target: what is measured, and at least how much of it."""

    name: str
    least: float
    figure: Callable[[Sections], float | None]


def _rows(sections: Sections, kind: str, **wanted: Any) -> list[dict[str, Any]]:
    rows = sections.get("attention", {}).get(kind, [])
    return [r for r in rows if all(r.get(k) == v for k, v in wanted.items())]


def _bandwidth(batch: int) -> Callable[[Sections], float | None]:
    """The lowest share of the copy bandwidth at 32k and more."""

    def figure(sections: Sections) -> float | None:
        shares = [
            r["share_of_copy"]
            for r in _rows(sections, "dense", batch=batch)
            if r["context"] >= 32 * _K and r.get("share_of_copy")
        ]
        return min(shares, default=None)

    return figure


def _codec(name: str) -> Callable[[Sections], float | None]:
    """The lowest speed-up over the best bfloat16 attention at 128k."""

    def figure(sections: Sections) -> float | None:
        rows = _rows(sections, "codecs", codec=name, context=128 * _K)
        return min((r["speedup"] for r in rows if r.get("speedup")), default=None)

    return figure


def _selection(sections: Sections) -> float | None:
    rows = _rows(sections, "selection", context=128 * _K)
    return min((r["speedup_over_dense"] for r in rows if r.get("speedup_over_dense")), default=None)


def _model(case: str, figure: str) -> Callable[[Sections], float | None]:
    def read(sections: Sections) -> float | None:
        rows = sections.get("model", {}).get("cases", [])
        return next((r.get(figure) for r in rows if r["case"] == case), None)

    return read


def _all_pass(sections: Sections) -> float | None:
    found = sections.get("correctness")
    total = 0 if found is None else found["passed"] + len(found["failed"])
    return found["passed"] / total if found is not None and total else None


AIMS = (
    Aim("bf16 attention, batch 8, 32k and more: share of the copy bandwidth", 0.90, _bandwidth(8)),
    Aim("bf16 attention, batch 1, 32k and more: share of the copy bandwidth", 0.85, _bandwidth(1)),
    Aim("int8 attention at 128k: times faster than the best in bf16", 1.8, _codec("int8")),
    Aim("int4 attention at 128k: times faster than the best in bf16", 3.2, _codec("int4")),
    Aim("int2 attention at 128k: times faster than the best in bf16", 5.0, _codec("int2")),
    Aim("1/16 of the pages at 128k, selection included: times faster than dense", 8.0, _selection),
    Aim("model, batch 1, 1k: share of the roofline", 0.85, _model("1k", "share_of_roofline")),
    Aim("model, batch 1, 128k, 4-bit cache: times transformers", 2.5, _model("128k, 4-bit cache", "ratio")),
    Aim("tests on the chip: share that passes", 1.0, _all_pass),
)


def judge(sections: Sections, rehearsal: bool) -> list[dict[str, Any]]:
    """Every target with its figure; ``met`` is None where nothing was measured, as in a rehearsal."""
    found = []
    for aim in AIMS:
        value = None if rehearsal else aim.figure(sections)
        met = None if value is None else value >= aim.least
        found.append({"name": aim.name, "least": aim.least, "figure": value, "met": met})
    return found


# --- the table -------------------------------------------------------------------------------------


def show(record: Mapping[str, Any]) -> None:
    """The figures, the targets last."""
    print()
    if record["rehearsal"]:
        print("A rehearsal at toy sizes: times mean nothing.")
    sections = record["sections"]
    for lines in (_ceilings(sections), _attention(sections), _models(sections), _others(sections)):
        print("\n".join(lines), flush=True)
    for aim in record.get("targets", []):
        word = {None: "not measured", True: "met", False: "MISSED"}[aim["met"]]
        figure = "" if aim["figure"] is None else f"{aim['figure']:.3g}"
        print(f"{aim['name']}: {figure} (at least {aim['least']}) {word}")


def _ceilings(sections: Sections) -> Iterator[str]:
    found = sections.get("ceilings")
    if found is not None:
        copy, product = found["copy_bytes_per_second"], found["matmul_flops_per_second"]
        yield f"copy {copy / 1e12:.2f} TB/s, matmul {product / 1e12:.0f} TFLOP/s"


def _attention(sections: Sections) -> Iterator[str]:
    found = sections.get("attention")
    if found is None:
        return
    heads = ("batch", "context", "us", "of copy", "speed-up", "1st try")
    widths = (5, 8, 9, 8, 9, 8)
    yield " ".join(["attention".ljust(14), *(h.rjust(w) for h, w in zip(heads, widths, strict=True))])
    kinds = (("dense", "sdpa_seconds"), ("selection", None), ("codecs", None))
    for kind, rival in kinds:
        for r in found.get(kind, []):
            if not r.get("seconds"):
                continue
            over = r.get("speedup") or r.get("speedup_over_dense")
            if rival and r.get(rival):
                over = r[rival] / r["seconds"]
            yield (
                f"{r.get('codec', kind):14} {r['batch']:5} {r['context']:8} {r['seconds'] * 1e6:9.1f} "
                f"{r['share_of_copy']:8.1%} {_times(over):>9} {r['first_seconds'] / r['seconds']:7.2f}x"
            )


def _models(sections: Sections) -> Iterator[str]:
    for r in sections.get("model", {}).get("cases", []):
        if not r.get("seconds"):
            continue
        yield (
            f"model {r['case']}: {r['tokens_per_second']:.0f} tokens/s, {r['share_of_roofline']:.1%} of the "
            f"roofline, predicted {r['predicted_seconds'] / r['seconds']:.2f} of the time, "
            f"{_times(r.get('ratio'))} transformers"
        )


def _others(sections: Sections) -> Iterator[str]:
    found = sections.get("speculation")
    if found is not None:
        steps, host = found["step_seconds"], found["host_seconds"]
        gaps = found.get("gap_seconds", {})
        yield (
            f"step {steps[1] * 1e6:.0f} us, of 8 tokens {found['verify_8_over_decode_1']:.2f}x; host "
            f"{host[1] * 1e6:.0f} us; between kernels {gaps.get(1, float('nan')) * 1e6:.0f} us"
        )
    checks = sections.get("correctness")
    if checks is not None:
        yield f"tests: {checks['passed']} passed, {checks['skipped']} skipped, {len(checks['failed'])} failed"
        yield from (f"  {failed[:160]}" for failed in checks["failed"][:10])


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"
