"""A run as one self-contained page, RUN/report.html, made from the run directory alone.

No script, no font, no address outside: the page can be mailed, archived and opened offline. All that the run wrote is
text to it - prompts and responses are hostile until escaped. A file that is missing or torn is named on the page and
the rest is shown, since the page is wanted most when a run has died.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import attrs
import yaml

from rlhf import hub
from rlhf.charts import bar, chart, columns, is_number, written
from rlhf.errors import Problem, RequestError
from rlhf.timeline import PARTS

NAMESPACES = (
    "heldout", "reward", "response", "", "loss", "kl", "policy", "value", "engine", "importance", "time", "perf",
    "memory",
)  # fmt: skip
"""The order of the charts; "" are the metrics without a namespace. Others follow by name."""
SAMPLES = 4
"""Shown of the first step and of the last; the others are counted."""


@attrs.define
class Run:
    """What a run directory holds, as far as it can be read."""

    path: Path
    recipe: str = ""
    plan: dict[str, Any] = attrs.Factory(dict)
    environment: dict[str, Any] = attrs.Factory(dict)
    summary: dict[str, Any] = attrs.Factory(dict)
    metrics: list[dict[str, Any]] = attrs.Factory(list)
    samples: list[dict[str, Any]] = attrs.Factory(list)
    gaps: list[str] = attrs.Factory(list)
    """What is missing or torn."""


def write(run_dir: Path) -> Path:
    """Make RUN/report.html; returns its path.

    Raises:
        RequestError: the folder is no run, or can't be written.
    """
    run = read(run_dir)
    page = run_dir / "report.html"
    try:
        # A model can emit half a surrogate pair, which JSON holds and UTF-8 doesn't.
        page.write_text(_page(run), encoding="utf-8", errors="replace")
    except OSError as error:
        raise RequestError(Problem(f"{page}: cannot be written: {error.strerror}")) from error
    return page


def read(run_dir: Path) -> Run:
    """Read what is there.

    Raises:
        RequestError: the folder is no run.
    """
    if not any((run_dir / name).is_file() for name in ("plan.json", "recipe.yaml", "metrics.jsonl")):
        what = "is no run: it has no plan.json" if run_dir.is_dir() else "there is no such folder"
        what = "is a file" if run_dir.is_file() else what
        hint = f"{hub.near(str(run_dir), Path.is_dir)}give a run's folder, such as one under runs/"
        raise RequestError(Problem(f"{run_dir}: {what}", hint))
    run = Run(run_dir)
    run.recipe = _text(run, "recipe.yaml")
    run.plan = _object(run, "plan.json")
    run.environment = _object(run, "environment.json")
    if (run_dir / "summary.json").is_file():
        run.summary = _object(run, "summary.json")
    else:
        run.gaps.append("summary.json is not there: the run is still going, or it died")
    run.metrics = sorted(_lines(run, "metrics.jsonl"), key=lambda line: line["step"])
    if (run_dir / "samples.jsonl").is_file() or run.plan.get("engine"):  # a run that samples nothing has none
        run.samples = _lines(run, "samples.jsonl")
    return run


def _text(run: Run, name: str) -> str:
    try:
        return (run.path / name).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        run.gaps.append(f"{name} cannot be read: {error.strerror}")
        return ""


def _object(run: Run, name: str) -> dict[str, Any]:
    text = _text(run, name)
    if not text:
        return {}
    try:
        content = json.loads(text)
    except ValueError as error:
        run.gaps.append(f"{name} is torn: {error}")
        return {}
    if isinstance(content, dict):
        return content
    run.gaps.append(f"{name} holds no JSON object")
    return {}


def _lines(run: Run, name: str) -> list[dict[str, Any]]:
    """The lines that are JSON objects with a step. Split at newlines alone: U+2028 may stand within a line."""
    lines = _text(run, name).split("\n")
    kept, torn = [], []
    for at, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except ValueError:
            content = None
        if isinstance(content, dict) and is_number(content.get("step")):
            kept.append(content)
        else:
            torn.append(at)
    if torn:
        where = ", ".join(map(str, torn[:5])) + (", ..." if len(torn) > 5 else "")
        run.gaps.append(f"{name}: {len(torn)} torn line{'s' * (len(torn) > 1)} left out ({where} of {len(lines)})")
    return kept


# The page


def _page(run: Run) -> str:
    name = escape(str(run.path))
    sections = [
        _headline(run),
        _gaps(run),
        _timeline(run),
        *_charts(run),
        *_samples(run),
        *_plan(run),
        _section("Environment", _tree(run.environment)) if run.environment else "",
        _repeat(run),
    ]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{name}</title>
<style>{_STYLE}</style>
</head>
<body>
{"".join(sections)}
</body>
</html>
"""


def _headline(run: Run) -> str:
    recipe = _parsed(run.recipe)
    roles = [role for role in _items(run.plan.get("roles")) if isinstance(role.get("model"), Mapping)]
    models = {str(role["model"].get("path")): None for role in roles} or {str(recipe.get("model", "unknown")): None}
    algo = run.plan.get("algo") or recipe.get("algo") or {}
    title = algo.get("name", "unknown") if isinstance(algo, Mapping) else algo
    last = run.metrics[-1]["step"] if run.metrics else 0
    facts = {
        "model": ", ".join(models),
        "status": run.summary.get("status", "no summary yet"),
        "steps": run.summary.get("steps", last),
        "wall time": _duration(run.summary.get("wall_seconds")),
        "peak memory": _gigabytes(run.summary.get("peak_rss_bytes")),
        "peak memory, planned": _gigabytes(_predicted(run).get("needed_bytes")),
        "peak memory of the device": _gigabytes(run.summary.get("peak_device_bytes")),
        "tokens per second, median": _median(run.metrics, "perf/tokens_per_second"),
        "floor ratio, median": _median(run.metrics, "perf/floor_ratio"),
    }
    shown = "".join(
        f"<dt>{escape(key)}</dt><dd>{escape(str(value))}</dd>" for key, value in facts.items() if value != ""
    )
    return (
        f"<header><h1>{escape(str(title))}</h1><p>{escape(str(run.path))}</p><dl>{shown}</dl>{_heldout(run)}</header>"
    )


def _heldout(run: Run) -> str:
    before, after = run.summary.get("heldout_before"), run.summary.get("heldout_after")
    before, after = (part if isinstance(part, Mapping) else {} for part in (before, after))
    rows = []
    for name in dict.fromkeys([*before, *after]):
        old, new = before.get(name), after.get(name)
        change = f"{new - old:+.4g}" if is_number(old) and is_number(new) else ""
        rows.append([str(name), written(old), written(new), change])
    return _table(["held-out", "before", "after", "change"], rows) if rows else ""


def _gaps(run: Run) -> str:
    if not run.gaps:
        return ""
    return '<section class="gaps"><h2>Not complete</h2>' + _list(run.gaps) + "</section>"


def _charts(run: Run) -> Iterable[str]:
    names = sorted({name for line in run.metrics for name in line if name != "step"})
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.partition("/")[0] if "/" in name else "", []).append(name)
    order = {namespace: at for at, namespace in enumerate(NAMESPACES)}
    if not run.metrics:
        yield _section("Metrics", "<p>No step has ended yet.</p>")
    for namespace in sorted(groups, key=lambda found: (order.get(found, len(order)), found)):
        charts = []
        for name in groups[namespace]:
            points = [
                (line["step"], line[name] if is_number(line[name]) else None) for line in run.metrics if name in line
            ]
            charts.append(chart(name, points))
        yield _section(namespace or "Training", f'<div class="charts">{"".join(charts)}</div>')


def _timeline(run: Run) -> str:
    """Where a step's seconds go: the mean step, and every one. Empty where the run tells of none."""
    lines = [line for line in run.metrics if all(is_number(line.get(f"time/{part}")) for part in (*PARTS, "step"))]
    steps = [(line["step"], [max(0.0, line[f"time/{part}"]) for part in PARTS]) for line in lines]
    means = [sum(values) / len(steps) for values in zip(*(parts for _, parts in steps), strict=True)]
    total = sum(means)
    if not total:
        return ""
    rows = "".join(
        f'<tr><td><i class="p{at}"></i>{part}</td><td>{seconds:.3g}</td><td>{seconds / total:.1%}</td></tr>'
        for at, (part, seconds) in enumerate(zip(PARTS, means, strict=True))
    )
    wall = sum(line["time/step"] for line in lines) / len(lines)
    table = f"<tr><th></th><th>s, mean of {len(steps)} steps</th><th>share</th></tr>{rows}"
    table += f"<tr><th>step</th><td>{wall:.3g}</td><td>{total / wall:.1%}</td></tr>" if wall > 0 else ""
    body = bar(list(zip(PARTS, means, strict=True)), "s") + f'<div class="wide"><table>{table}</table></div>'
    return _section("A step's timeline", body + columns("seconds of each step by phase", steps, "s"))


def _samples(run: Run) -> Iterable[str]:
    if not run.samples:
        return
    steps = [sample["step"] for sample in run.samples]
    for title, step in zip(("First samples", "Last samples"), dict.fromkeys((steps[0], steps[-1])), strict=False):
        of_step = [sample for sample in run.samples if sample["step"] == step]
        shown = "".join(_sample(sample) for sample in of_step[:SAMPLES])
        rest = len(of_step) - SAMPLES
        more = f"<p>{rest} more of this step are in samples.jsonl.</p>" if rest > 0 else ""
        yield _section(f"{title}: step {step}", shown + more)


def _sample(sample: Mapping[str, Any]) -> str:
    rest = [
        f"{key} {written(value) if isinstance(value, float) else _value(value)}"
        for key, value in sample.items()
        if key not in ("step", "prompt", "response")
    ]
    return (
        f'<article><pre class="prompt">{escape(str(sample.get("prompt", "")))}</pre>'
        f"<pre>{escape(str(sample.get('response', '')))}</pre><p>{escape(', '.join(rest))}</p></article>"
    )


def _plan(run: Run) -> Iterable[str]:
    plan = run.plan
    if not plan:
        return
    rows = []
    for part in plan.values():
        for component in [part] if isinstance(part, Mapping) else _items(part):
            rows.extend(_component_rows(component))
    roles = []
    for part in _items(plan.get("roles")):
        role, model = part.get("role"), part.get("model")
        mem = list(_items(part.get("mem")))
        rows.extend(row for component in mem for row in _component_rows(component) if row not in rows)
        role, model = (found if isinstance(found, Mapping) else {} for found in (role, model))
        trained = "trained" if role.get("trainable") else "frozen"
        names = ", ".join(str(component.get("name")) for component in mem)
        module = f"{part.get('module')} ({part.get('view')})"
        roles.append([str(role.get("name")), trained, str(model.get("path")), module, names])
    body = _table(["kind", "component", "options", "from"], rows)
    body += _table(["role", "", "model", "module", "memory"], roles)
    for key in ("run", "machine"):
        if isinstance(plan.get(key), Mapping):
            body += f"<details><summary>{key}</summary>{_tree(plan[key])}</details>"
    data = [str(source.get("path")) for key in ("data", "eval_data", "ptx_data") for source in _items(plan.get(key))]
    body += "<h3>Data</h3>" + _list(data) if data else ""
    notes = [str(note) for note in plan.get("notes") or ()]
    body += "<h3>Decided by the composition</h3>" + _list(notes) if notes else ""
    yield _section("Plan", body)


def _predicted(run: Run) -> Mapping[str, Any]:
    """What the plan said that the run would take, at the longest sequences."""
    found = run.plan.get("prediction")
    return found if isinstance(found, Mapping) else {}


def _component_rows(component: Mapping[str, Any]) -> list[list[str]]:
    if not {"kind", "name", "options"} <= set(component):
        return []
    options = component["options"] if isinstance(component["options"], Mapping) else {}
    name = ":".join(str(part) for part in (component["name"], component.get("label")) if part)
    chosen = ", ".join(f"{key}={_value(value)}" for key, value in options.items())
    source = f"{component.get('distribution', '')} {component.get('version', '')}"
    return [[str(component["kind"]), name, chosen, source.strip()]]


def _repeat(run: Run) -> str:
    command = f"rlhf run {shlex.quote(str(run.path / 'recipe.yaml'))} --output NEW_FOLDER"
    recipe = f"<details><summary>recipe.yaml</summary><pre>{escape(run.recipe)}</pre></details>" if run.recipe else ""
    return _section("Repeat it", f"<pre>{escape(command)}</pre>{recipe}")


# Pieces of HTML; each escapes what it is given, except `_section` and its body


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(cells: Iterable[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f'<div class="wide"><table>{line(head, "th")}{"".join(line(row, "td") for row in rows)}</table></div>'


def _list(items: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"


def _tree(content: Mapping[str, Any]) -> str:
    return _table(["", ""], [[str(key), _value(value)] for key, value in content.items()])


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_value(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(_value(item) for item in value)
    return str(value)


def _duration(seconds: Any) -> str:
    if not is_number(seconds):
        return ""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _gigabytes(count: Any) -> str:
    return f"{count / 1e9:.2f} GB" if is_number(count) and count else ""


def _median(metrics: Iterable[Mapping[str, Any]], name: str) -> str:
    values = sorted(line[name] for line in metrics if is_number(line.get(name)))
    return written(values[len(values) // 2]) if values else ""


def _items(value: Any) -> Iterable[Mapping[str, Any]]:
    return (item for item in value if isinstance(item, Mapping)) if isinstance(value, list) else ()


def _parsed(recipe: str) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(recipe)
    except yaml.YAMLError:
        return {}
    return content if isinstance(content, Mapping) else {}


_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --dim: #667; --rule: #d8dce2; --paper: #fff; --box: #f5f6f8;
  --line: #2563c9 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ec; --dim: #99a; --rule: #363b44; --paper: #14161a; --box: #1d2026; --line: #7ab0ff }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 72rem; margin: 0 auto; padding: 1rem }
h1, h2, h3 { line-height: 1.2 }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--rule) }
header p, figcaption, dt, th, article p { color: var(--dim) }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem }
dd { margin: 0; overflow-wrap: anywhere }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); gap: 1rem }
.p0 { --of: #3b6fc4 } .p1 { --of: #d98a2b } .p2 { --of: #5aa469 } .p3 { --of: #9a5fb5 } .p4 { --of: #c9504f }
.p5 { --of: #4aa7ae } .p6 { --of: #9aa0a8 } rect { fill: var(--of) }
i { display: inline-block; width: .8em; height: .8em; margin-right: .5em; background: var(--of) }
figure { margin: 0 } figcaption { font-size: .85rem; overflow-wrap: anywhere } figcaption b { color: var(--ink) }
svg { width: 100%; height: auto } svg text { font-size: 9px; fill: var(--dim) }
.line { fill: none; stroke: var(--line); stroke-width: 1.5; stroke-linejoin: round }
.frame { stroke: var(--rule) } circle { fill: var(--line) }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .9rem; margin: 1rem 0 }
td, th { text-align: left; vertical-align: top; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid var(--rule) }
pre { background: var(--box); padding: .6rem; border-radius: .3rem; white-space: pre-wrap; overflow-wrap: anywhere;
  max-height: 24rem; overflow-y: auto; margin: .3rem 0 }
.prompt { color: var(--dim) } article { margin: 1.2rem 0 } article p { margin: 0; font-size: .85rem }
.gaps { border-left: 4px solid #d08700; padding-left: 1rem }
"""
