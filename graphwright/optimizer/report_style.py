"""The style sheet of the report's page: light and dark, desktop and phone."""

from __future__ import annotations

STYLE = """
.gw { --ink: #1b1f24; --soft: #59636e; --line: #d5dae0; --paper: #fff; --wash: #f5f7f9;
  --good: #116329; --warn: #7d4e00; --bad: #a40e26; --calm: #0550ae;
  --c1: #2f6fb0; --c2: #e08e0b; --c3: #2a9d77; --c4: #b0558f; --c5: #7fb8e0; --c6: #c2491d; --c7: #b5a51c;
  --c0: #9aa3ad;
  max-width: 72rem; margin: 0 auto; padding: 1rem; color: var(--ink); background: var(--paper);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; box-sizing: border-box; }
@media (prefers-color-scheme: dark) {
  body:has(> main.gw) { background: #12161b; }
  main.gw { --ink: #e6eaef; --soft: #9aa5b1; --line: #333c46; --paper: #12161b; --wash: #1b2128;
    --good: #57c477; --warn: #e0a63a; --bad: #ff7b82; --calm: #79b4ff;
    --c1: #5b9bd9; --c2: #f0a93b; --c3: #3fb892; --c4: #d184b6; --c5: #a3d0f0; --c6: #e8794f; --c7: #d9cb4a;
    --c0: #6b7580; } }
body:has(> main.gw) { margin: 0; }
.gw h1 { font-size: 1.5rem; margin: .2rem 0 .8rem; }
.gw h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.gw h3 { font-size: 1rem; margin: 1rem 0 .3rem; }
.gw dl { display: flex; flex-wrap: wrap; gap: .3rem 2rem; margin: 0; }
.gw dt { color: var(--soft); font-size: .85rem; }
.gw dd { margin: 0; overflow-wrap: anywhere; }
.gw .scroll { overflow-x: auto; }
.gw table { border-collapse: collapse; width: 100%; }
.gw th, .gw td { text-align: left; vertical-align: top; padding: .35rem .6rem;
  border-bottom: 1px solid var(--line); }
.gw thead th { color: var(--soft); font-weight: 500; font-size: .85rem; }
.gw th[scope=rowgroup] { background: var(--wash); }
.gw .numbers td + td, .gw .numbers thead th + th { text-align: right; font-variant-numeric: tabular-nums; }
.gw code, .gw pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: .85rem; }
.gw td code { overflow-wrap: anywhere; display: inline-block; min-width: 11em; }
.gw .numbers td + td { white-space: nowrap; }
.gw pre { background: var(--wash); border: 1px solid var(--line); border-radius: 6px; padding: .8rem;
  overflow-x: auto; max-height: 32rem; }
.gw summary { cursor: pointer; }
.gw .status { white-space: nowrap; font-weight: 600; }
.gw .good { color: var(--good); } .gw .warn { color: var(--warn); } .gw .bad { color: var(--bad); }
.gw .calm { color: var(--calm); } .gw .dim { color: var(--soft); }
.gw footer { margin-top: 2rem; border-top: 1px solid var(--line); color: var(--soft); font-size: .85rem; }
.gw .plots { display: grid; grid-template-columns: 1fr 1fr; gap: 1.8rem 2.5rem; margin: 1.6rem 0; }
.gw figure { margin: 0; min-width: 0; max-width: 32rem; }
.gw figure h2 { margin: 0 0 .3rem; }
.gw figure svg { display: block; width: 100%; height: auto; font-family: inherit; }
.gw figcaption { color: var(--soft); font-size: .85rem; }
.gw .legend { display: flex; flex-wrap: wrap; gap: .1rem 1rem; list-style: none; margin: .2rem 0; padding: 0;
  font-size: .85rem; }
.gw .legend li { overflow-wrap: anywhere; }
.gw .legend i { font-style: normal; margin-right: .3em; }
.gw .c0 { color: var(--c0); } .gw .c1 { color: var(--c1); } .gw .c2 { color: var(--c2); }
.gw .c3 { color: var(--c3); } .gw .c4 { color: var(--c4); } .gw .c5 { color: var(--c5); }
.gw .c6 { color: var(--c6); } .gw .c7 { color: var(--c7); } .gw .soft { color: var(--soft); }
.gw tr.chosen { background: var(--wash); }
.gw tr.chosen td:first-child { font-weight: 600; }
.gw .plans td code { display: block; min-width: 25em; }
.gw .plans td:last-child { overflow-wrap: anywhere; min-width: 9em; }
.gw .plans small { display: block; color: var(--soft); white-space: nowrap; }
.gw .plans span { white-space: nowrap; }
.gw .facts { margin-top: .8rem; }
.gw .facts dd { font-size: 1.15rem; }
.gw .plots section h2 { margin-top: 0; }
.gw .outlook { margin: .3rem 0 0; padding-left: 1.2rem; }
.gw .outlook li { margin-bottom: .5rem; overflow-wrap: anywhere; }
.gw section > details { margin-top: .5rem; }
@media (max-width: 52rem) { .gw .plots { grid-template-columns: minmax(0, 1fr); } }
@media (max-width: 40rem) {
  .gw .wide thead { display: none; }
  .gw .wide tr { display: block; border-bottom: 1px solid var(--line); padding: .5rem 0; }
  .gw .wide td { display: block; border: 0; padding: .1rem 0; }
  .gw .wide tr.chosen { padding: .5rem; }
  .gw .plans td code { min-width: 0; }
  .gw .plans td div { display: inline; }
  .gw .plans small { display: inline; margin-left: .5em; }
  .gw .wide td::before { content: attr(data-name) ": "; color: var(--soft); font-size: .85rem; }
  .gw .wide td details { display: inline-block; vertical-align: top; } }
"""
