"""Every dashboard query against a real Prometheus, for ``deploy/smoke.sh``: ``query_panels.py URL [FOLDER FOR
PICTURES]``.

Ends with 1 if a query gives no data. With a folder, draws what each panel would show, so that somebody can look at it.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import httpx

DASHBOARDS = Path(__file__).parents[2] / "deploy/grafana/dashboards"
VARIABLES = {"$__rate_interval": "1m", "$job": ".*inward.*", "$instance": ".*", "$head": ".*", "$run": ".*"}
MINUTES, STEP = 10, 5


def targets() -> list[tuple[str, dict[str, Any], str, str]]:
    """(dashboard, panel, expression, legend) of every query."""
    found = []
    for path in sorted(DASHBOARDS.glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", ()):
                expression = target["expr"]
                for variable, value in VARIABLES.items():
                    expression = expression.replace(variable, value)
                found.append((path.stem, panel, expression, target["legendFormat"]))
    return found


def ask(client: httpx.Client, expression: str) -> list[dict[str, Any]]:
    """Series with at least one number in the last minutes."""
    now = time.time()
    asked = {"query": expression, "start": now - 60 * MINUTES, "end": now, "step": STEP}
    answer = client.post("/api/v1/query_range", data=asked).json()
    if answer["status"] != "success":
        raise SystemExit(f"{expression}: {answer['error']}")
    return [
        series
        for series in answer["data"]["result"]
        if any(math.isfinite(float(value)) for _, value in series["values"])
    ]


def draw(folder: Path, dashboard: str, panels: list[tuple[dict[str, Any], list[tuple[str, dict[str, Any]]]]]) -> None:
    """One picture a dashboard, a small plot a panel."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = 3
    rows = math.ceil(len(panels) / columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(7 * columns, 3.2 * rows), squeeze=False)
    for axis, (panel, series) in zip(axes.flat, panels, strict=False):
        start = min((values["values"][0][0] for _, values in series), default=0)
        for legend, one in series[:12]:
            for name, value in one["metric"].items():
                legend = legend.replace("{{" + name + "}}", value)
            axis.plot(
                [at - start for at, _ in one["values"]],
                [float(value) for _, value in one["values"]],
                label=legend[:40],
                linewidth=1,
            )
        axis.set_title(f"{panel['title']} [{panel['fieldConfig']['defaults']['unit']}]", fontsize=9)
        axis.tick_params(labelsize=7)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=6, loc="upper left")
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    figure.tight_layout()
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{dashboard}.png", dpi=70)
    pyplot.close(figure)


def main(url: str, pictures: Path | None) -> int:
    """Exit status."""
    empty, drawn = [], {}
    with httpx.Client(base_url=url, timeout=30) as client:
        for dashboard, panel, expression, legend in targets():
            series = ask(client, expression)
            if not series:
                empty.append(f"{dashboard}: {panel['title']}: {expression}")
            panels = drawn.setdefault(dashboard, {})
            panels.setdefault(panel["id"], (panel, []))[1].extend((legend, one) for one in series)
    if pictures is not None:
        for dashboard, panels in drawn.items():
            draw(pictures, dashboard, list(panels.values()))
    print(f"{len(targets())} queries of {len(drawn)} dashboards, {len(empty)} without data", *empty, sep="\n  ")
    return 1 if empty else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]) if len(sys.argv) > 2 else None))
