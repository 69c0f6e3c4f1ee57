"""Ask Prometheus every query of the Grafana dashboard, and say how many series each returns.

    python check.py [http://127.0.0.1:9090] [--with "Workers lost" ...]

Plain Python. Exit code 1 if a query returned nothing in the last minutes. Panels that have data only under some
condition (their description begins with "Only") are listed apart and may be empty, but for those named by --with.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

DASHBOARD = Path(__file__).parent / "grafana" / "dashboards" / "datm-ray.json"
LABEL_VALUES = re.compile(r"label_values\((?P<series>.+), *(?P<label>\w+)\)")


class Query(NamedTuple):
    """One query of the dashboard."""

    row: str
    panel: str
    condition: str
    """Condition under which the query has data; "" if it always has."""
    text: str


def queries(dashboard: dict[str, Any]) -> Iterator[Query]:
    """All queries, those of the variables first."""
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            yield Query("Variables", variable["label"], "", variable["query"]["query"])
    row = ""
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            row = panel["title"]
        described = panel.get("description", "")
        condition = described.partition(". ")[0].rstrip(".") if described.startswith("Only ") else ""
        for target in panel.get("targets", []):
            yield Query(row, panel["title"], condition, target["expr"])


def filled(text: str, interval: str) -> str:
    """A query with Grafana's variables replaced: all runs, and rates over an interval."""
    text = text.replace("$__rate_interval", interval).replace("$run", ".*")
    if "$" in text:
        raise ValueError(f"a variable is left in {text!r}")
    return text


def ask(prometheus: str, path: str, **parameters: str | float) -> Any:
    """The data of an answer of Prometheus's HTTP API."""
    url = f"{prometheus.rstrip('/')}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return json.load(answer)["data"]
    except urllib.error.HTTPError as refused:
        raise SystemExit(f"Prometheus refuses {parameters}: {refused.read().decode(errors='replace')}") from None
    except (OSError, ValueError) as failure:
        raise SystemExit(f"No Prometheus answers at {prometheus}: {failure}") from None


def series(prometheus: str, query: str, minutes: float) -> int:
    """How many time series a query returns over the last minutes, as a panel would ask for them."""
    now = time.time()
    if variable := LABEL_VALUES.fullmatch(query):
        values = ask(prometheus, f"label/{variable['label']}/values", **{"match[]": variable["series"]})
        return len(values)
    found = ask(prometheus, "query_range", query=query, start=now - 60 * minutes, end=now, step=5)["result"]
    # A rate that is 0 everywhere counts as a series. A series without any number does not.
    return sum(any(value != "NaN" for _, value in one["values"]) for one in found)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prometheus", nargs="?", default="http://127.0.0.1:9090", help="address of Prometheus")
    parser.add_argument("--dashboard", type=Path, default=DASHBOARD, help="another dashboard")
    parser.add_argument("--minutes", type=float, default=15, help="how far to look back")
    parser.add_argument("--interval", default="1m", help="over which rates are taken")
    parser.add_argument("--with", action="append", default=[], dest="required", help="a conditional panel to insist on")
    given = parser.parse_args()

    found = list(queries(json.loads(given.dashboard.read_text())))
    unknown = set(given.required) - {query.panel for query in found}
    if unknown:
        raise SystemExit(f"No panel is called {', '.join(sorted(unknown))}")
    counted = [(query, series(given.prometheus, filled(query.text, given.interval), given.minutes)) for query in found]
    always = [each for each in counted if not each[0].condition or each[0].panel in given.required]
    for title, part in (("Queries", always), ("Conditional queries", [each for each in counted if each not in always])):
        print(f"\n{title}\n\n| row | panel | query | series |\n| --- | --- | --- | ---: |")
        for query, count in part:
            when = f" ({query.condition[0].lower()}{query.condition[1:]})" if query.condition else ""
            print(f"| {query.row} | {query.panel}{when} | `{query.text}` | {count} |")
    empty = sum(not count for _, count in always)
    others = [count for query, count in counted if (query, count) not in always]
    print(
        f"\n{len(always) - empty} of {len(always)} queries return data, "
        f"and {sum(count > 0 for count in others)} of {len(others)} conditional ones."
    )
    return 1 if empty else 0


if __name__ == "__main__":
    sys.exit(main())
