"""What a vote remembers: what is asked, what is kept, and that nobody votes twice or before looking."""

import random
import sqlite3

import pytest

from experiments import vote_store
from experiments.vote_store import DEGRADED, TRUTH, Refused, Store, Study, draw_trials

SECRET = ("zebra_decoder", "okapi_decoder")
KEYS = ["films/a.mp4#0", "films/b.mp4#1", "films/c.mp4#2"]


def study(**changed) -> Study:
    values = {"methods": list(SECRET), "clips": [["unseen", key] for key in KEYS], "films": [["0", "1"]] * len(KEYS)}
    return Study(**(values | changed))


def look(store: Store, token: str, trial) -> None:
    """The films of a trial were fetched, and are about to be played."""
    store.shown(token, trial.id, [trial.left_film, trial.right_film])


def back(store: Store, seconds: float) -> None:
    """As if all films had been shown so much earlier."""
    with store._writing() as db:
        db.execute("UPDATE trial SET shown = shown - ?", (seconds,))


def test_sides_and_order_are_drawn_for_everyone_and_can_be_drawn_again():
    many = study(clips=[["unseen", str(i)] for i in range(60)], films=[["0", "1"]] * 60, trials=60)
    first, again, other = (draw_trials(many, number, random.Random(seed)) for number, seed in ((1, 5), (1, 5), (2, 6)))
    shown = [[(t.pair, t.left, t.right) for t in trials] for trials in (first, again, other)]
    assert shown[0] == shown[1] != shown[2]
    left = [t.left for t in first if t.kind == "pair"]
    assert 15 < sum(left) < 45, "either method on either side"
    assert {t.left_film for t in first}.isdisjoint({t.left_film for t in again}), (
        "addresses are not drawn from the seed"
    )
    assert len({t.pair for t in first}) == len(first)


def test_nobody_can_foretell_sides_and_checks():
    """The same participant of the same study: drawn by the operating system, whatever Python's own generator is at."""
    many = study(clips=[["unseen", str(i)] for i in range(60)], films=[["0", "1"]] * 60, trials=60)
    drawn = []
    for _ in range(2):
        random.seed(0)
        drawn.append([(t.kind, t.clip, t.left, t.right) for t in draw_trials(many, 1)])
    assert drawn[0] != drawn[1]


def test_checks_are_among_the_pairs():
    trials = draw_trials(study(trials=3), 5)
    kinds = [t.kind for t in trials]
    assert sorted(kinds) == ["degraded", "identical", "pair", "pair", "pair"]
    identical, spoilt = (next(t for t in trials if t.kind == kind) for kind in ("identical", "degraded"))
    assert identical.left == identical.right >= 0 and {spoilt.left, spoilt.right} == {TRUTH, DEGRADED}


def test_one_vote_for_a_pair_and_only_by_whom_it_was_asked(tmp_path):
    store = Store(tmp_path / "votes.db")
    store.begin_study(study())
    token, other = store.begin("Ada"), store.begin("")
    trial, done, total = store.next_trial(token)
    assert (done, total) == (0, 5)
    with pytest.raises(Refused, match="no such trial"):
        store.vote(other, trial.id, "left")
    with pytest.raises(Refused, match="must be one of"):
        store.vote(token, trial.id, "both")
    later = draw_trials(study(), 1)[1]
    with pytest.raises(Refused, match="no such trial"):  # its id was drawn anew and never told
        store.vote(token, later.id, "left")
    with pytest.raises(Refused, match="have not been shown") as refused:
        store.vote(token, trial.id, "left")
    assert refused.value.status == 425
    look(store, token, trial)
    store.vote(token, trial.id, "left")
    with pytest.raises(Refused, match="answered already") as refused:
        store.vote(token, trial.id, "right")
    assert refused.value.status == 409
    assert [(v["choice"], v["participant"]) for v in store.votes()] == [("left", 1)]
    assert store.next_trial(token)[0].id != trial.id


def test_a_vote_survives_a_restart_and_refuses_another_study(tmp_path):
    path = tmp_path / "votes.db"
    store = Store(path)
    store.begin_study(study())
    token = store.begin("")
    first = store.next_trial(token)[0]
    look(store, token, first)
    store.vote(token, first.id, "none")
    second = store.next_trial(token)[0]
    again = Store(path)  # the first was never closed: a server that was killed
    again.begin_study(study())
    assert again.next_trial(token)[0] == second and len(again.votes()) == 1
    assert again.film(second.left_film) == (second.clip, second.left)
    assert sqlite3.connect(path).execute("PRAGMA journal_mode").fetchone() == ("wal",)
    with pytest.raises(ValueError, match=r"another study \(different: rule\)"):
        again.begin_study(study(rule={"same_side": 3}))


def test_an_answer_is_taken_when_the_films_were_fetched_and_are_over(tmp_path):
    store = Store(tmp_path / "votes.db")
    store.begin_study(study(lengths=[8] * len(KEYS), fps=16.0))
    token = store.begin("")
    trial = store.next_trial(token)[0]
    with pytest.raises(Refused, match="not fetched") as refused:
        store.shown(token, trial.id, [trial.left_film])
    assert refused.value.status == 409
    look(store, token, trial)
    with pytest.raises(Refused, match="to their end"):
        store.vote(token, trial.id, "left")
    back(store, 0.4)
    with pytest.raises(Refused, match="to their end"):
        store.vote(token, trial.id, "left")
    look(store, token, trial)  # the page was read again: the clock goes on
    back(store, 0.2)
    store.vote(token, trial.id, "left")
    assert 0.6 <= store.votes()[0]["seconds"] < 5, "from when they were shown"
    with pytest.raises(Refused, match="no such trial"):
        store.shown(store.begin(""), trial.id, [trial.left_film, trial.right_film])


def test_who_begins_again_and_again_locks_nobody_out_for_good(tmp_path, monkeypatch):
    store = Store(tmp_path / "votes.db")
    store.begin_study(study())
    monkeypatch.setattr(vote_store, "BEGINS_A_MINUTE", 3)
    first = store.begin("answers")
    trial = store.next_trial(first)[0]
    look(store, first, trial)
    store.vote(first, trial.id, "left")
    for _ in range(2):
        store.begin("")
    with pytest.raises(Refused, match="in a minute") as refused:
        store.begin("too soon")
    assert refused.value.status == 429
    monkeypatch.setattr(vote_store, "MOST_PARTICIPANTS", 3)
    with store._writing() as db:
        db.execute("UPDATE participant SET began = began - 120")
    with pytest.raises(Refused, match="too many participants"):  # they may be looking at their first films
        store.begin("")
    with store._writing() as db:
        db.execute("UPDATE participant SET began = began - 3600")
    late = store.begin("late")
    assert {p["name"] for p in store.participants()} == {"answers", "late"} and store.next_trial(late)[2] == 5
    assert store.next_trial(first)[1] == 1, "whoever has answered stays"


def test_a_file_of_another_version_is_told(tmp_path):
    store = Store(tmp_path / "votes.db")
    with store._writing() as db:
        db.execute('INSERT INTO study VALUES (1, \'{"methods": ["a", "b"], "seed": 0}\', 0)')
    with pytest.raises(ValueError, match="another version"):
        store.study()


def test_a_file_that_is_no_database_is_refused(tmp_path):
    path = tmp_path / "votes.db"
    path.write_bytes(b"not a database at all, but long enough to be looked at" * 40)
    with pytest.raises(ValueError, match="no file of votes"):
        Store(path)
