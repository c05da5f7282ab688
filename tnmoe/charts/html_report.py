"""A report of planned layers as one HTML file: tables, formulas, diagrams and source, with nothing to fetch."""

from __future__ import annotations

import html
from collections.abc import Sequence

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer
from sympy.printing.mathml import mathml

from tnmoe.analysis.explain import explain
from tnmoe.emission.emit import emit
from tnmoe.errors import CostError, EmitError
from tnmoe.measuring.measured import check_machine, measured
from tnmoe.planning.plan import Plan
from tnmoe.render.table import grouped
from tnmoe.reports.calls import cost
from tnmoe.reports.cost_report import CostReport
from tnmoe.reports.figures import FIGURES, HEADINGS
from tnmoe.timing.device import Device
from tnmoe.timing.predict import predict
from tnmoe.timing.predict_training import predict_training

CARDS = ("parameters", "flops", "training_flops", "max_rank", "weight_bytes", "saved_bytes")

STYLE = """
:root { color-scheme: light; --ink: #1d2430; --soft: #5b6573; --line: #dde2e8; --back: #f6f7f9; --accent: #2e6fa7; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: white;
       font: 16px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1rem 1.25rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 1rem 0 .25rem; }
h2 { font-size: 1.3rem; margin: 3rem 0 .5rem; padding-top: 1rem; border-top: 3px solid var(--accent); }
h3 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
h2, p, figcaption { overflow-wrap: anywhere; }
p { margin: .5rem 0; }
a { color: var(--accent); }
.soft { color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .75rem; margin: 1rem 0; }
.card { background: var(--back); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem; }
.card b { display: block; font-size: 1.1rem; font-variant-numeric: tabular-nums; }
.card span { font-size: .8rem; color: var(--soft); }
.wide { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .25rem 0; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); }
thead th { border-bottom: 2px solid var(--ink); }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
figure { margin: 0; padding: .5rem; border: 1px solid var(--line); border-radius: .5rem; max-width: 100%;
         overflow-x: auto; }
figcaption { font-size: .85rem; color: var(--soft); contain: inline-size; }
math { font-size: 1.05rem; }
pre { overflow-x: auto; background: var(--back); border: 1px solid var(--line); border-radius: .5rem;
      padding: .75rem 1rem; font-size: .8rem; line-height: 1.45; margin: .5rem 0; white-space: pre; }
pre.prose { white-space: pre-wrap; }
summary { cursor: pointer; font-weight: 600; }
@media (max-width: 40rem) {
  .cards { grid-template-columns: 1fr 1fr; }
  .card b { font-size: .95rem; }
  figure svg { min-width: 32rem; }
}
@media print { h2 { break-before: page; } }
"""


def html_report(
    plans: Sequence[Plan],
    title: str = "Layers and their costs",
    labels: Sequence[str] = (),
    profile: Device | None = None,
) -> str:
    """One self-contained page: no script, no font, no picture comes from elsewhere.

    Args:
        plans: what to report, in order.
        title: of the page.
        labels: a heading for each plan, by default the layer's name.
        profile: of a device, for predicted times; those measured stand beside them if it is a calibration of this
            machine.
    """
    names = labels or [p.layer.name for p in plans]
    chapters = [_chapter(p, name, f"layer-{k}", profile) for k, (p, name) in enumerate(zip(plans, names, strict=True))]
    links = " · ".join(f'<a href="#layer-{k}">{html.escape(name)}</a>' for k, name in enumerate(names))
    source_style = HtmlFormatter(style="friendly").get_style_defs("pre.code")
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(title)}</title>",
            f"<style>{STYLE}{source_style}</style>",
            "</head>",
            "<body>",
            "<main>",
            f"<h1>{html.escape(title)}</h1>",
            f'<p class="soft">{links}</p>' if len(names) > 1 else "",
            *chapters,
            "</main>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _chapter(plan: Plan, name: str, anchor: str, profile: Device | None) -> str:
    report = cost(plan)
    parts = [
        f'<section id="{anchor}">',
        f"<h2>{html.escape(name)}</h2>",
        f'<p class="soft">{html.escape(report.title)}</p>',
        _cards(report),
        report.parts().render("html"),
        "<h3>Formulas</h3>",
        _formulas(report),
        "<h3>Networks and their orders</h3>",
        _pictures(plan),
        f'<pre class="prose">{html.escape(explain(plan))}</pre>',
        "<h3>Steps</h3>",
        plan.table().render("html"),
        *([] if profile is None else ["<h3>Time</h3>", _times(plan, profile)]),
        "<h3>Emitted module</h3>",
        _source(plan),
        "</section>",
    ]
    return "\n".join(parts)


def _cards(report: CostReport) -> str:
    cards = "".join(
        f'<div class="card"><b>{grouped(int(getattr(report, figure)))}</b>'
        f"<span>{html.escape(HEADINGS[figure])}</span></div>"
        for figure in CARDS
    )
    return f'<div class="cards">{cards}</div>'


def _formulas(report: CostReport) -> str:
    rows = "".join(
        f'<tr><th style="text-align:left;white-space:nowrap">{html.escape(HEADINGS[figure])}</th>'
        f"<td><math>{mathml(report.formula(figure), printer='presentation')}</math></td>"
        f'<td style="text-align:right">{grouped(int(getattr(report, figure)))}</td></tr>'
        for figure in FIGURES
    )
    return (
        '<div class="wide"><table><thead><tr><th style="text-align:left">figure</th><th style="text-align:left">formula'
        f'</th><th style="text-align:right">value</th></tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _pictures(plan: Plan) -> str:
    figures = []
    for node in plan.layer.contractions:
        expression = html.escape(f"{node.out.name} = {node.network}")
        figures.append(
            f"<figure>{node.network.diagram(plan.bound.sizes).svg()}<figcaption>{expression}</figcaption></figure>"
        )
        if len(node.network.tensors) > 2:
            tree = plan.diagram(node.out.name).svg()
            figures.append(f"<figure>{tree}<figcaption>order of {html.escape(node.out.name)}</figcaption></figure>")
    return f'<div class="pictures">{"".join(figures)}</div>'


def _times(plan: Plan, profile: Device) -> str:
    try:
        check_machine(profile)
    except CostError:  # of another machine: there is nothing to measure here
        own, flavour = plan.adjoint, plan.flavour
        tables = [predict(plan.executed, profile, adjoint=own, flavour=flavour).table()]
        training = predict_training(plan.bound, profile, inputs=plan.input_gradients, adjoint=own, flavour=flavour)
        return "".join(t.render("html") for t in (*tables, *([training.table()] if training else [])))
    return measured(plan, profile).table().render("html")


def _source(plan: Plan) -> str:
    try:
        source = emit(plan)
    except EmitError as error:
        return f'<p class="soft">{html.escape(str(error))}</p>'
    code = highlight(source, PythonLexer(), HtmlFormatter(nowrap=True))
    return f'<details open><summary>{len(source.splitlines())} lines</summary><pre class="code">{code}</pre></details>'
