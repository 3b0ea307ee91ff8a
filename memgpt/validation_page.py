"""The HTML page about one source's validation: self-contained, light and dark, with counts but never a row's text."""

from collections.abc import Mapping
from html import escape
from typing import Any

_STYLE = """
:root { color-scheme: light dark;
  --line: #d5d9e0; --soft: #f4f6f9; --dim: #5b6472; --good: #1a7f45; --bad: #b3261e; --bar: #3b6fb6 }
@media (prefers-color-scheme: dark) {
  :root { --line: #3a404a; --soft: #20242b; --dim: #a3acb9; --good: #5fc98b; --bad: #ff8a80; --bar: #7aa7e8 } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; width: 100%; font-size: .9rem }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--line) }
th { color: var(--dim); font-weight: 600 } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
.pass { color: var(--good); font-weight: 600 } .fail { color: var(--bad); font-weight: 600 }
tr.failed { background: var(--soft) }
figure { margin: 1rem 0 } figcaption { color: var(--dim); font-size: .9rem } svg { max-width: 100%; height: auto }
svg text { font: 13px system-ui, sans-serif; fill: currentColor } svg rect { fill: var(--bar) }
p.note { color: var(--dim) }
.scroll { overflow-x: auto }
""".strip()


def render(report: Mapping[str, Any], pictures: Mapping[str, Mapping[str, int]]) -> str:
    """HTML of a report as `validate` writes it, with one bar chart per entry of `pictures` (title → bar → count)."""
    source, failed = report["source"], report["failed"]
    verdict = (
        f'<span class="pass">All {report["checks"]} checks passed.</span>'
        if not failed
        else f'<span class="fail">{failed} of {report["checks"]} checks failed;</span> training waits until they pass.'
    )
    sizes = ", ".join(f"{name} {count:,}" for name, count in report["rows"].items())
    licence = escape(report["licence"] or "not known") + (" (non-commercial)" if report["non_commercial"] else "")
    rows = "\n".join(_row(result) for result in sorted(report["results"], key=lambda result: result["success"]))
    figures = "\n".join(_figure(title, bars) for title, bars in pictures.items() if bars)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Validation of {escape(source)}</title><style>
{_STYLE}
</style></head><body>
<h1>Validation of {escape(source)}</h1>
<p>{verdict}</p>
<p>Source: {escape(report["uri"])}<br>Rows: {escape(sizes)}<br>Licence: {licence}</p>
<h2>Checks</h2>
<div class="scroll"><table><thead><tr><th>Result</th><th>Table</th><th>Check</th><th>Column</th><th class="n">Rows</th>
<th class="n">Failing</th><th class="n">Threshold</th><th>First failing rows</th></tr></thead><tbody>
{rows}
</tbody></table></div>
<p class="note">Rows are named by id (by number where a table has no id). Their texts are not shown here;
on the machine that ran the validation they are in reports/errors/{escape(source)}.jsonl.</p>
<h2>The data</h2>
{figures}
</body></html>
"""


def _row(result: Mapping[str, Any]) -> str:
    word = "pass" if result["success"] else "fail"
    threshold = "" if result["threshold"] is None else f"{result['threshold']:g}"
    cells = (
        f'<td class="{word}">{word}</td><td>{escape(result["table"])}</td><td>{escape(result["name"])}</td>'
        f'<td>{escape(result["column"] or "")}</td><td class="n">{result["checked"]:,}</td>'
        f'<td class="n">{result["unexpected"]:,}</td><td class="n">{threshold}</td>'
        f"<td>{escape(', '.join(result['rows']))}</td>"
    )
    return f'<tr class="{"" if result["success"] else "failed"}">{cells}</tr>'


def _figure(title: str, bars: Mapping[str, int]) -> str:
    """Horizontal bars, one per entry, scaled to the largest."""
    largest = max(max(bars.values()), 1)
    left, width, step = 170, 420, 24
    parts = []
    for index, (name, count) in enumerate(bars.items()):
        y, length = index * step, width * count / largest
        shown = name if len(name) <= 22 else f"{name[:21]}…"
        parts.append(
            f'<text x="{left - 8}" y="{y + 16}" text-anchor="end">{escape(shown)}</text>'
            f'<rect x="{left}" y="{y + 4}" width="{length:.1f}" height="16" rx="2"/>'
            f'<text x="{left + length + 6:.1f}" y="{y + 16}">{count:,}</text>'
        )
    height = step * len(bars)
    described = escape(f"{title}: " + ", ".join(f"{name} {count}" for name, count in bars.items()))
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg role="img" aria-label="{described}" '
        f'viewBox="0 0 680 {height}" width="680" height="{height}">{"".join(parts)}</svg></figure>'
    )
