"""What a blind vote remembers: the study, its participants, what each was shown on which side, and what they answered.

SQLite with a write-ahead log, so a server that is killed loses no answer and goes on where it stopped. Methods are numbers in
here; only the study's definition, which no page is ever given, says their names. Every film that is shown has an address of its
own for every participant, trial and side: nothing that two trials share can be told from an address.
"""

import json
import random
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Choice = Literal["left", "right", "none"]
Kind = Literal["pair", "identical", "degraded"]
CHOICES: tuple[Choice, ...] = ("left", "right", "none")
TRUTH, DEGRADED = -1, -2  # films that are no method's: for checks of attention
MOST_PARTICIPANTS = 10_000
SCHEMA = """
CREATE TABLE IF NOT EXISTS study (id INTEGER PRIMARY KEY CHECK (id = 1), definition TEXT NOT NULL, began REAL NOT NULL);
CREATE TABLE IF NOT EXISTS participant (
    number INTEGER PRIMARY KEY, token TEXT NOT NULL UNIQUE, name TEXT NOT NULL, began REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS trial (
    id TEXT PRIMARY KEY, participant INTEGER NOT NULL REFERENCES participant, position INTEGER NOT NULL,
    kind TEXT NOT NULL, clip INTEGER NOT NULL, pair TEXT NOT NULL, left INTEGER NOT NULL, right INTEGER NOT NULL,
    left_film TEXT NOT NULL UNIQUE, right_film TEXT NOT NULL UNIQUE, served REAL,
    UNIQUE (participant, position), UNIQUE (participant, pair)
);
CREATE TABLE IF NOT EXISTS vote (
    trial TEXT PRIMARY KEY REFERENCES trial, participant INTEGER NOT NULL, pair TEXT NOT NULL,
    choice TEXT NOT NULL CHECK (choice IN ('left', 'right', 'none')), answered REAL NOT NULL, seconds REAL NOT NULL,
    UNIQUE (participant, pair)
);
"""


class Refused(ValueError):
    """A request that cannot be granted; ``status`` is HTTP's."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Study:
    """What is voted on. Equal definitions are one study, whose votes go into one file."""

    methods: list[str]
    clips: list[list[str]]  # stream, key
    films: list[list[str]]  # clip -> method -> sha256 of its frames
    seed: int = 0
    trials: int = 40  # pairs that a participant is shown at most, without checks
    checks_every: int = 10  # trials: for so many, one identical pair and one of the truth against a spoilt copy
    fps: float = 16.0

    def __post_init__(self) -> None:
        if len(self.methods) < 2 or not self.clips:
            raise ValueError("a vote needs two methods and a clip")

    def pairs(self) -> list[tuple[int, int, int]]:
        """(clip, method, method) of all that can be asked."""
        numbers = range(len(self.methods))
        return [(c, a, b) for c in range(len(self.clips)) for a in numbers for b in numbers if a < b]


@dataclass(frozen=True)
class Trial:
    """Two films as one participant is shown them. ``left`` and ``right`` are numbers of methods, or TRUTH, DEGRADED."""

    id: str
    participant: int
    position: int
    kind: Kind
    clip: int
    pair: str
    left: int
    right: int
    left_film: str
    right_film: str


def draw_trials(study: Study, participant: int) -> list[Trial]:
    """What a participant is shown: pairs in an order and on sides of their own, checks among them.

    Order and sides are drawn from the study's seed and the participant's number; addresses are random and say nothing.
    """
    draw = random.Random(f"{study.seed}/{participant}")
    pairs = draw.sample(study.pairs(), min(study.trials, len(study.pairs())))
    asked: list[tuple[Kind, int, str, int, int]] = [("pair", c, f"{c}/{a}/{b}", a, b) for c, a, b in pairs]
    checks = min(max(1, round(len(pairs) / study.checks_every)), len(study.clips))
    for clip in draw.sample(range(len(study.clips)), checks):
        method = draw.randrange(len(study.methods))
        asked.append(("identical", clip, f"identical/{clip}", method, method))
    for clip in draw.sample(range(len(study.clips)), checks):
        asked.append(("degraded", clip, f"degraded/{clip}", TRUTH, DEGRADED))
    draw.shuffle(asked)
    trials = []
    for position, (kind, clip, pair, a, b) in enumerate(asked):
        left, right = (a, b) if draw.random() < 0.5 else (b, a)
        own = [secrets.token_urlsafe(16) for _ in range(3)]
        trials.append(Trial(own[0], participant, position, kind, clip, pair, left, right, own[1], own[2]))
    return trials


class Store:
    """The file of a study's votes. Safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._lock = threading.Lock()
        self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._connection.row_factory = sqlite3.Row
        try:
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")  # an answer that was thanked for is on the disk
            self._connection.execute("PRAGMA foreign_keys = ON")
            self._connection.executescript(SCHEMA)
        except sqlite3.DatabaseError as error:
            self._connection.close()
            raise ValueError(f"{path} is no file of votes ({error}); give another db=") from None

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def _all(self, query: str, *values: Any) -> list[sqlite3.Row]:
        with self._lock:
            return self._connection.execute(query, values).fetchall()

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()

    # ---- the study

    def begin_study(self, study: Study) -> None:
        """Remember what is voted on. Raises ValueError if this file holds votes on something else."""
        definition = json.dumps(asdict(study), sort_keys=True)
        with self._writing() as db:
            db.execute("INSERT OR IGNORE INTO study VALUES (1, ?, ?)", (definition, time.time()))
            kept = db.execute("SELECT definition FROM study").fetchone()[0]
        if kept != definition:
            before, now = json.loads(kept), json.loads(definition)
            changed = ", ".join(key for key in now if before.get(key) != now[key])
            raise ValueError(
                f"{self.path} holds votes on another study (different: {changed}); give another db=, or the options that it was "
                "begun with"
            )

    def study(self) -> Study:
        """What is voted on. Raises ValueError for a file without a study."""
        rows = self._all("SELECT definition FROM study")
        if not rows:
            raise ValueError(f"{self.path} holds no study")
        return Study(**json.loads(rows[0]["definition"]))

    # ---- participants

    def begin(self, name: str) -> str:
        """A new participant; all that they will be shown is drawn now. Returns their token."""
        study, token = self.study(), secrets.token_urlsafe(24)
        with self._writing() as db:
            number = db.execute("SELECT coalesce(max(number), 0) + 1 FROM participant").fetchone()[0]
            if number > MOST_PARTICIPANTS:
                raise Refused("there are too many participants", 503)
            db.execute("INSERT INTO participant VALUES (?, ?, ?, ?)", (number, token, name, time.time()))
            for t in draw_trials(study, number):
                place = (t.id, t.participant, t.position, t.kind, t.clip, t.pair)
                films = (t.left, t.right, t.left_film, t.right_film)
                db.execute("INSERT INTO trial VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, NULL)", (*place, *films))
        return token

    def _number(self, token: str) -> int:
        rows = self._all("SELECT number FROM participant WHERE token = ?", token)
        if not rows:
            raise Refused("no such participant: begin again", 403)
        return rows[0]["number"]

    def next_trial(self, token: str) -> tuple[Trial | None, int, int]:
        """What this participant is to answer next (None: nothing is left), how many were answered, and of how many.

        The clock of a trial starts when it is served first.
        """
        number = self._number(token)
        with self._writing() as db:
            done = db.execute("SELECT count(*) FROM vote WHERE participant = ?", (number,)).fetchone()[0]
            total = db.execute("SELECT count(*) FROM trial WHERE participant = ?", (number,)).fetchone()[0]
            row = db.execute(
                "SELECT * FROM trial WHERE participant = ? AND id NOT IN (SELECT trial FROM vote) ORDER BY position LIMIT 1",
                (number,),
            ).fetchone()
            if row is None:
                return None, done, total
            db.execute("UPDATE trial SET served = ? WHERE id = ? AND served IS NULL", (time.time(), row["id"]))
        return Trial(**{key: row[key] for key in row.keys() if key != "served"}), done, total  # noqa: SIM118

    def vote(self, token: str, trial: str, choice: str) -> None:
        """Keep an answer. Raises Refused for a choice that there is not, another's trial, or a second answer."""
        if choice not in CHOICES:
            raise Refused(f"choice must be one of {', '.join(CHOICES)}")
        number, now = self._number(token), time.time()
        with self._writing() as db:
            row = db.execute("SELECT * FROM trial WHERE id = ? AND participant = ?", (trial, number)).fetchone()
            if row is None or row["served"] is None:
                raise Refused("no such trial", 404)
            try:
                db.execute(
                    "INSERT INTO vote VALUES (?, ?, ?, ?, ?, ?)",
                    (trial, number, row["pair"], choice, now, now - row["served"]),
                )
            except sqlite3.IntegrityError:
                raise Refused("this pair was answered already", 409) from None

    def film(self, address: str) -> tuple[int, int] | None:
        """(clip, method) behind an address; None if there is none, or if its trial was not served yet."""
        query = "SELECT clip, {0} AS method FROM trial WHERE {0}_film = ? AND served IS NOT NULL"
        for side in ("left", "right"):
            if rows := self._all(query.format(side), address):
                return rows[0]["clip"], rows[0]["method"]
        return None

    # ---- what was answered

    def participants(self) -> list[dict[str, Any]]:
        """Number and name of everyone who began."""
        return [dict(row) for row in self._all("SELECT number, name, began FROM participant ORDER BY number")]

    def votes(self) -> list[dict[str, Any]]:
        """Every answer with what stood on which side, in the order in which they came."""
        query = """
            SELECT vote.participant, vote.choice, vote.seconds, vote.answered, trial.kind, trial.clip, trial.left, trial.right
            FROM vote JOIN trial ON trial.id = vote.trial ORDER BY vote.answered, trial.position
        """
        return [dict(row) for row in self._all(query)]


def method_numbers(study: Study, films: Sequence[int] = (TRUTH, DEGRADED)) -> list[int]:
    """Numbers of all films of a clip: the methods', and those of checks."""
    return [*range(len(study.methods)), *films]
