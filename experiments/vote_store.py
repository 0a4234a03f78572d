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
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

Choice = Literal["left", "right", "none"]
Kind = Literal["pair", "identical", "degraded"]
CHOICES: tuple[Choice, ...] = ("left", "right", "none")
TRUTH, DEGRADED = -1, -2  # films that are no method's: for checks of attention
MOST_PARTICIPANTS = 10_000
BEGINS_A_MINUTE = 120  # of all together, so that nobody fills the file with participants
IDLE_S = 3600.0  # after which a participant without any answer gives way to others
EARLY_S = 0.05  # that a browser's clock may be ahead of ours
SCHEMA = """
CREATE TABLE IF NOT EXISTS study (id INTEGER PRIMARY KEY CHECK (id = 1), definition TEXT NOT NULL, began REAL NOT NULL);
CREATE TABLE IF NOT EXISTS participant (
    number INTEGER PRIMARY KEY, token TEXT NOT NULL UNIQUE, name TEXT NOT NULL, began REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS trial (
    id TEXT PRIMARY KEY, participant INTEGER NOT NULL REFERENCES participant, position INTEGER NOT NULL,
    kind TEXT NOT NULL, clip INTEGER NOT NULL, pair TEXT NOT NULL, left INTEGER NOT NULL, right INTEGER NOT NULL,
    left_film TEXT NOT NULL UNIQUE, right_film TEXT NOT NULL UNIQUE, served REAL, shown REAL,
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
    trials: int = 40  # pairs that a participant is shown at most, without checks
    checks_every: int = 10  # trials: for so many, one identical pair and one of the truth against a spoilt copy
    fps: float = 16.0
    lengths: list[int] = field(
        default_factory=list
    )  # clip -> its frames: nobody may answer before they have been shown
    rule: dict[str, float] = field(default_factory=dict)  # whose answers will not count: decided before the first vote

    def __post_init__(self) -> None:
        if len(self.methods) < 2 or not self.clips:
            raise ValueError("a vote needs two methods and a clip")

    def seconds(self, clip: int) -> float:
        """How long a clip's films take at speed 1; 0 where that is not known."""
        return self.lengths[clip] / self.fps if self.lengths else 0.0

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


def draw_trials(study: Study, participant: int, draw: random.Random | None = None) -> list[Trial]:
    """What a participant is shown: pairs in an order and on sides of their own, checks among them.

    Nobody can foretell them: without ``draw``, which is for tests, the operating system draws. They are kept, not drawn again.
    """
    draw = draw or random.SystemRandom()
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
        try:
            return Study(**json.loads(rows[0]["definition"]))
        except TypeError:
            raise ValueError(f"{self.path} was begun by another version of this command; give another db=") from None

    # ---- participants

    def begin(self, name: str) -> str:
        """A new participant; all that they will be shown is drawn now. Returns their token.

        Raises Refused for too many in a minute. Participants who have not answered anything for an hour give way to new ones:
        whoever begins again and again shuts nobody out for longer than that.
        """
        study, token, now = self.study(), secrets.token_urlsafe(24), time.time()
        with self._writing() as db:
            if (
                db.execute("SELECT count(*) FROM participant WHERE began > ?", (now - 60,)).fetchone()[0]
                >= BEGINS_A_MINUTE
            ):
                raise Refused("too many begin at once: try again in a minute", 429)
            if db.execute("SELECT count(*) FROM participant").fetchone()[0] >= MOST_PARTICIPANTS:
                self._make_room(db, now - IDLE_S)
            number = db.execute("SELECT coalesce(max(number), 0) + 1 FROM participant").fetchone()[0]
            db.execute("INSERT INTO participant VALUES (?, ?, ?, ?)", (number, token, name, now))
            for t in draw_trials(study, number):
                place = (t.id, t.participant, t.position, t.kind, t.clip, t.pair)
                films = (t.left, t.right, t.left_film, t.right_film)
                db.execute("INSERT INTO trial VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, NULL, NULL)", (*place, *films))
        return token

    def _make_room(self, db: sqlite3.Connection, before: float) -> None:
        """Forget those who began before then and answered nothing."""
        idle = "SELECT number FROM participant WHERE began < ? AND number NOT IN (SELECT participant FROM vote)"
        db.execute(f"DELETE FROM trial WHERE participant IN ({idle})", (before,))
        if not db.execute(f"DELETE FROM participant WHERE number IN ({idle})", (before,)).rowcount:
            raise Refused("there are too many participants: try again later", 503)

    def _number(self, token: str) -> int:
        rows = self._all("SELECT number FROM participant WHERE token = ?", token)
        if not rows:
            raise Refused("no such participant: begin again", 403)
        return rows[0]["number"]

    def next_trial(self, token: str) -> tuple[Trial | None, int, int]:
        """What this participant is to answer next (None: nothing is left), how many were answered, and of how many."""
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
        return Trial(**{each.name: row[each.name] for each in fields(Trial)}), done, total

    def shown(self, token: str, trial: str, sent: Collection[str]) -> None:
        """The films of a trial are about to be looked at: its clock starts, the first time only.

        Raises Refused unless both are among the addresses ``sent``: what was not fetched cannot be shown.
        """
        number = self._number(token)
        with self._writing() as db:
            row = self._served(db, trial, number)
            if not {row["left_film"], row["right_film"]} <= {*sent}:
                raise Refused("its films were not fetched", 409)
            db.execute("UPDATE trial SET shown = ? WHERE id = ? AND shown IS NULL", (time.time(), trial))

    def _served(self, db: sqlite3.Connection, trial: str, number: int) -> sqlite3.Row:
        row = db.execute("SELECT * FROM trial WHERE id = ? AND participant = ?", (trial, number)).fetchone()
        if row is None or row["served"] is None:
            raise Refused("no such trial", 404)
        return row

    def vote(self, token: str, trial: str, choice: str) -> None:
        """Keep an answer and how long it took since the films were shown.

        Raises Refused for a choice that there is not, another's trial, a second answer, or one before the films were over once.
        """
        if choice not in CHOICES:
            raise Refused(f"choice must be one of {', '.join(CHOICES)}")
        study, number, now = self.study(), self._number(token), time.time()
        with self._writing() as db:
            row = self._served(db, trial, number)
            if db.execute("SELECT 1 FROM vote WHERE trial = ?", (trial,)).fetchone():
                raise Refused("this pair was answered already", 409)
            if row["shown"] is None or 0 <= now - row["shown"] < study.seconds(row["clip"]) - EARLY_S:
                raise Refused("the films have not been shown to their end", 425)
            values = (trial, number, row["pair"], choice, now, now - row["shown"])
            db.execute("INSERT INTO vote VALUES (?, ?, ?, ?, ?, ?)", values)

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
