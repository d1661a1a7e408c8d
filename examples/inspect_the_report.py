"""The report is data: ask it questions, save it, show it, and run the graph it prints."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import graphwright as gw


def main() -> None:
    """Every view of one report."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=256, n_embd=64, n_layer=3, n_head=4, n_positions=128)
    ).eval()
    report = gw.optimize(model, target="cpu", workload=gw.Workload(prompt=16, generate=16)).report

    print("semantic ops found:", report.ops)
    print("decisions by status:", dict(Counter(str(decision.status) for decision in report.decisions)))
    for decision in report.decisions:
        if decision.status != "applied":
            where = decision.site or "program"
            print(f"  {decision.pass_name} at {where}: {decision.status}, {decision.reason}")

    decode = {side: getattr(report, side).get("decode", {}) for side in ("predicted", "measured")}
    for side, numbers in decode.items():
        if "seconds_per_token" in numbers:
            print(f"decode, {side}: {numbers['seconds_per_token'] * 1e3:.3f} ms a token")

    before, after = report.code_before.splitlines(), report.code_after.splitlines()
    print(f"captured graph: {len(before)} lines of Python; optimized: {len(after)}. It begins:")
    print("\n".join(f"    {line}" for line in after[:8]))

    with tempfile.TemporaryDirectory() as folder:
        page, data = Path(folder, "report.html"), Path(folder, "report.json")
        report.to_html(page)
        data.write_text(report.to_json())
        again = gw.Report.from_json(data.read_text())
        assert again.to_dict() == report.to_dict()
        print(f"saved as HTML ({page.stat().st_size:,} bytes) and JSON ({data.stat().st_size:,} bytes)\n")

    print(report)


if __name__ == "__main__":
    main()
