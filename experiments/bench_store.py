"""The file that remembers what ``make bench-all`` has measured."""

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FINAL = ("measured", "out of memory", "not available")  # not tried again; what failed or was refused is


class Store:
    """Rows by id, saved after every change; those of other conditions or code are forgotten when it is opened."""

    def __init__(self, path: Path, conditions: dict[str, Any], fresh: bool = False) -> None:
        self.path, self.about = path, dict(conditions)
        self.rows: dict[str, dict[str, Any]] = {}
        self.conditions = conditions
        if path.exists() and not fresh:
            before = json.loads(path.read_text())
            if {key: before.get(key) for key in conditions} == conditions:
                self.rows = {key: row for key, row in before["rows"].items() if row["status"] in FINAL}
                self.about |= {"rates": before["rates"]} if self.rows and "rates" in before else {}
                print(f"{len(self.rows)} rows of {path} are kept", file=sys.stderr)
            else:
                changed = [key for key in conditions if before.get(key) != conditions[key]]
                print(f"{path} is measured anew: other {', '.join(changed)}", file=sys.stderr)

    def has(self, key: str) -> bool:
        return key in self.rows

    def put(self, key: str, row: dict[str, Any]) -> None:
        self.rows[key] = row | {"date": datetime.now(UTC).isoformat(timespec="seconds")}
        self.save()

    def content(self) -> dict[str, Any]:
        return self.about | {"rows": self.rows}

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".json.new")
        new.write_text(json.dumps(self.content(), indent=1) + "\n")
        new.replace(self.path)
