"""The report page: what is hostile stays text, what is not finite stays a gap, what is torn is named."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from rlhf import charts, report
from rlhf.errors import RequestError
from rlhf.timeline import PARTS

HOSTILE = """</pre><script>alert(1)</script><img src=x onerror="alert('2')">&amp; \u2028 \x00"""


class Page(HTMLParser):
    """Tags with their attributes, and the text, as a browser would see them."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == [], "every element that was opened is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def component(kind: str, name: str, **options: Any) -> dict[str, Any]:
    return {"kind": kind, "name": name, "label": "", "options": options, "distribution": "some-dist", "version": "3.1"}


def make_run(folder: Path, hostile: str = "what/is 2+2?") -> Path:
    """A finished run of two steps, with `hostile` wherever the user, the data or the model may write."""
    folder.mkdir(parents=True, exist_ok=True)
    mem = component("mem", "thin", rank=16)
    plan = {
        "algo": component("algo", "tempered", temperature=0.125, note=hostile),
        "engine": component("engine", "fast"),
        "rewards": [component("reward", "judge")],
        "roles": [
            {
                "role": {"name": "policy", "trainable": True},
                "model": {"path": hostile, "config": {}},
                "mem": [mem],
                "module": "policy",
                "view": "own",
            }
        ],
        "data": [{"path": hostile, "format": component("format", "lines")}],
        "eval_data": [],
        "run": {"seed": 0},
        "machine": {"cpus": 2},
        "notes": [hostile],
    }
    summary = {
        "status": "completed",
        "steps": 2,
        "wall_seconds": 3725.4,
        "peak_rss_bytes": 2_500_000_000,
        "peak_device_bytes": None,
        "heldout_before": {"reward/mean": 0.25, hostile: 1},
        "heldout_after": {"reward/mean": 0.75, hostile: None},
    }
    metrics: list[dict[str, Any]] = [
        {"step": 1, "loss": 0.5, "reward/mean": 0.25, "perf/tokens_per_second": 100.0, hostile: 1.0},
        {"step": 2, "loss": None, "reward/mean": 0.5, "perf/tokens_per_second": 300.0, hostile: 2.0},
    ]
    samples = [{"step": n, "prompt": hostile, "response": hostile, "reward": 0.5, "finish": "stop"} for n in (1, 2)]
    (folder / "recipe.yaml").write_text("algo: {name: tempered}\nmodel: " + json.dumps(hostile))
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "environment.json").write_text(json.dumps({"python": "3.11", "packages": {hostile: "1.0"}}))
    (folder / "summary.json").write_text(json.dumps(summary))
    lines(folder / "metrics.jsonl", metrics)
    lines(folder / "samples.jsonl", samples)
    return folder


def lines(path: Path, content: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in content), encoding="utf-8")


def written(run: Path) -> str:
    return report.write(run).read_text(encoding="utf-8")


def test_the_page_says_what_the_run_did(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert report.write(run) == run / "report.html"
    text = Page(written(run)).text
    for said in (
        "tempered",
        "completed",
        "1:02:05",  # 3725 s
        "2.50 GB",
        "temperature=0.125",  # options are exact
        "rank=16",  # of a memory strategy, which only the roles name
        "some-dist 3.1",
        "Not complete",
    ):
        assert (said in text) == (said != "Not complete")
    heldout = re.search(r"held-out.*?reward/mean(.*?)</tr>", written(run), re.S)
    assert heldout is not None
    assert re.findall(r"<td>(.*?)</td>", heldout.group(1)) == ["0.25", "0.75", "+0.5"]


def test_the_command_to_repeat_it_is_quoted_for_the_shell(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a run; rm -rf x")
    assert f"rlhf run '{run}/recipe.yaml' --output" in Page(written(run)).text


def test_hostile_text_is_text(tmp_path: Path) -> None:
    run = make_run(tmp_path / "<b>run</b>", HOSTILE)
    html = written(run)
    page = Page(html)
    harmless = Page(written(make_run(tmp_path / "harmless")))
    assert [tag for tag, _ in page.tags if tag in ("script", "img", "b")] == ["b"] * html.count("<figcaption>")
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    # The text makes no element and no attribute anywhere: the page is built as that of a harmless run.
    assert [(tag, set(attrs)) for tag, attrs in page.tags] == [(tag, set(attrs)) for tag, attrs in harmless.tags]
    # ... and it is all there to read: in samples (prompt and response of two steps), plan, notes, data, ...
    assert page.text.count("</pre><script>alert(1)</script>") >= 8


def test_nothing_outside_the_page_is_named(tmp_path: Path) -> None:
    html = written(make_run(tmp_path / "run"))
    assert not re.search(r"https?:|//\w|url\(|@import|\b(src|href|srcset|action)\s*=", html)
    assert not {"script", "link", "iframe", "img", "object", "base", "form"} & {tag for tag, _ in Page(html).tags}
    policy = [attrs["content"] for _, attrs in Page(html).tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_a_surrogate_half_does_not_keep_the_page_from_being_written(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "samples.jsonl").write_text('{"step": 1, "prompt": "\\ud800", "response": "rest"}\n')
    assert "rest" in written(run)


def test_a_torn_last_line_is_left_out_and_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 0.')
    text = Page(written(run)).text
    assert "metrics.jsonl: 1 torn line left out (3 of 3)" in text
    assert len(report.read(run).metrics) == 2


@pytest.mark.parametrize("line", ["[1]", "{}", '{"step": null}', '{"step": true}', '{"step": NaN}', "null", "\x80"])
def test_a_line_without_a_step_is_torn(tmp_path: Path, line: str) -> None:
    run = make_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a", encoding="latin-1") as file:
        file.write(line + "\n")
    assert report.read(run).gaps == ["metrics.jsonl: 1 torn line left out (3 of 4)"]


def test_a_line_is_not_torn_by_a_line_separator_within_its_text(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    lines(run / "samples.jsonl", [{"step": 1, "prompt": "a\u2028b\u0085c", "response": "d"}])
    assert [sample["prompt"] for sample in report.read(run).samples] == ["a\u2028b\u0085c"]
    assert report.read(run).gaps == []


def test_an_empty_run_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    text = Page(written(tmp_path)).text
    assert "No step has ended yet" in text
    for name in ("recipe.yaml", "environment.json", "metrics.jsonl"):
        assert f"{name} cannot be read" in text
    assert "summary.json is not there: the run is still going, or it died" in text
    assert "samples.jsonl" not in text  # a run without an engine samples nothing


def test_files_of_another_shape_are_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "plan.json").write_text('{"algo": {"name"')
    (run / "environment.json").write_text("[1, 2]")
    text = Page(written(run)).text
    assert "plan.json is torn" in text
    assert "environment.json holds no JSON object" in text
    assert "tempered" in text  # the recipe knows it too


@pytest.mark.parametrize(
    "plan", [{"algo": 3}, {"roles": {}}, {"roles": [1]}, {"notes": None}, {"data": "x", "run": []}]
)
def test_a_plan_of_another_version_keeps_no_page_from_being_written(tmp_path: Path, plan: dict[str, Any]) -> None:
    run = make_run(tmp_path / "run")
    (run / "plan.json").write_text(json.dumps(plan))
    assert "Repeat it" in Page(written(run)).text


def test_no_run_is_a_wrong_request(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="is no run"):
        report.write(tmp_path)
    with pytest.raises(RequestError, match="there is no such folder"):
        report.write(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_samples_of_the_first_and_the_last_step(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    content = [{"step": step, "prompt": "p", "response": f"r{step}.{i}"} for step in (1, 5, 9) for i in range(6)]
    lines(run / "samples.jsonl", content)
    text = Page(written(run)).text
    assert re.findall(r"r\d\.\d", text) == ["r1.0", "r1.1", "r1.2", "r1.3", "r9.0", "r9.1", "r9.2", "r9.3"]
    assert text.count("2 more of this step are in samples.jsonl") == 2


def test_charts_stand_by_namespace(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    names = ("zeta/x", "memory/peak", "kl/k1", "loss", "reward/mean", "policy/entropy", "time/update", "value/loss")
    lines(run / "metrics.jsonl", [{"step": 1, **dict.fromkeys(names, 1.0)}])
    found = re.findall(r"<figcaption>(\S+)", written(run))
    assert found == [
        "reward/mean", "loss", "kl/k1", "policy/entropy", "value/loss", "time/update", "memory/peak", "zeta/x",
    ]  # fmt: skip


# A step's timeline


def timed(step: int, **seconds: float) -> dict[str, Any]:
    """A line of metrics; what isn't said took no time."""
    parts = {part: seconds.get(part, 0.0) for part in PARTS}
    return {"step": step, **{f"time/{part}": taken for part, taken in parts.items()}, "time/step": sum(parts.values())}


def test_a_steps_timeline_is_drawn_to_scale(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    lines(run / "metrics.jsonl", [timed(1, rollout=2.0, update=6.0), timed(2, rollout=4.0, update=3.0, other=1.0)])
    html = written(run)
    section = html[html.index("timeline</h2>") : html.index("<h2>time</h2>")]
    cells = re.findall(r"</i>(\w+)</td><td>(.*?)</td><td>(.*?)</td>", section)
    assert [name for name, _, _ in cells] == list(PARTS)
    # means of 3, 4.5 and .5 s, of 8
    assert {name: (seconds, share) for name, seconds, share in cells if seconds != "0"} == {
        "rollout": ("3", "37.5%"), "update": ("4.5", "56.2%"), "other": ("0.5", "6.2%"),
    }  # fmt: skip
    assert "<td>8</td><td>100.0%</td>" in section
    widths = re.findall(r'class="p(\d)" x="([\d.]+)" y="4" width="([\d.]+)"', section)
    assert [(at, float(x), float(w)) for at, x, w in widths if float(w)] == [
        ("0", 4.0, 222.0), ("3", 226.0, 333.0), ("6", 559.0, 37.0),  # of 592
    ]  # fmt: skip


def test_a_run_without_times_has_no_timeline(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert "timeline" not in written(run)
    lines(run / "metrics.jsonl", [timed(1), {**timed(2, update=1.0), "time/step": None}])
    assert "timeline" not in written(run)


def test_columns_stand_on_each_other_and_neighbours_share_one() -> None:
    svg = charts.columns("m", [(1, (1.0, 3.0)), (2, (2.0, 0.0))], "s")
    found = re.findall(r'class="p(\d)" x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"', svg)
    # 106 high for 4 s, from y = 116 up; 296 wide each
    assert found == [
        ("0", "4.0", "89.5", "296.0", "26.5"), ("1", "4.0", "10.0", "296.0", "79.5"),
        ("0", "300.0", "63.0", "296.0", "53.0"), ("1", "300.0", "63.0", "296.0", "0.0"),
    ]  # fmt: skip
    many = charts.columns("m", [(n, (float(n % 2),)) for n in range(2 * charts.COLUMNS)], "s")
    assert set(re.findall(r' height="([\d.]+)"/>', many)) == {"106.0"}  # each the mean of 0 and 1, all alike
    assert many.count("<rect") == charts.COLUMNS and ">0.5 s<" in many


# Charts


def path(svg: str) -> str:
    found = re.search(r'<path class="line" d="([^"]*)"', svg)
    assert found is not None
    return found.group(1)


def test_a_line_runs_from_corner_to_corner() -> None:
    # The frame is 292 wide from x = 4 and 106 high from y = 10; values grow upwards.
    svg = charts.chart("m", [(10, -1.0), (20, 0.0), (30, 1.0)])
    assert path(svg) == "M4.0 116.0L150.0 63.0L296.0 10.0"
    assert "<circle" not in svg
    assert ">steps 10 to 30<" in svg and ">-1<" in svg and ">1<" in svg


def test_a_gap_breaks_the_line_and_is_counted() -> None:
    svg = charts.chart("m", [(1, 0.0), (2, 1.0), (3, None), (4, 1.0), (5, 0.0)])
    assert path(svg) == "M4.0 116.0L77.0 10.0M223.0 10.0L296.0 116.0"
    assert "(1 of 5 not finite)" in svg


def test_a_point_between_gaps_is_a_dot() -> None:
    svg = charts.chart("m", [(1, 0.0), (2, None), (3, 1.0), (4, None), (5, None)])
    assert path(svg) == ""
    assert re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg) == [("4.0", "116.0"), ("150.0", "10.0")]


@pytest.mark.parametrize("points", [[(1.0, None)], []])
def test_no_finite_value_is_said(points: list[tuple[float, float | None]]) -> None:
    svg = charts.chart("m", points)
    assert "no finite value" in svg and "<svg" not in svg


def test_one_point_and_equal_values_stand_in_the_middle() -> None:
    assert 'cx="150.0" cy="63.0"' in charts.chart("m", [(7, 3.0)])
    assert path(charts.chart("m", [(1, 3.0), (2, 3.0)])) == "M4.0 63.0L296.0 63.0"


def test_the_widest_range_of_floats_is_drawn() -> None:
    assert path(charts.chart("m", [(1, -1.7e308), (2, 1.7e308)])) == "M4.0 116.0L296.0 10.0"


def test_a_long_curve_keeps_its_spike_and_its_gap() -> None:
    points: list[tuple[float, float | None]] = [(step, 0.0) for step in range(100_000)]
    points[54_321] = (54_321, 1.0)
    points[77_777] = (77_777, None)
    svg = charts.chart("m", points)
    assert path(svg).count("L") <= 2 * charts.STRETCHES
    assert path(svg).count("M") == 2  # the gap
    # The spike: a step of x is 292 / 99999 of the width, so it stands at 4 + 158.6.
    assert "162.6 10.0" in path(svg)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**400, True, None, "1"])
def test_what_is_no_finite_number(value: Any) -> None:
    assert not charts.is_number(value)
    assert charts.written(value) == "-"


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (128, "128"), (12345.0, "12345"), (1.41e-5, "1.41e-05"), (0.123456, "0.1235")]
)
def test_numbers_are_written_in_four_digits(value: float, text: str) -> None:
    assert charts.written(value) == text
