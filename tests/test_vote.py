"""The blind vote: what is asked, what is kept, whose answers count, and that nothing tells which side is which."""

import http.client
import json
import math
import os
import socket
import sqlite3
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from experiments import decoded, vote, vote_results
from experiments.compose import ConfigError
from experiments.vote_results import Rule, clustered, wilson
from experiments.vote_store import DEGRADED, TRUTH, Refused, Store, Study, draw_trials
from tests.chromium import launched, watched

SECRET = ("zebra_decoder", "okapi_decoder")  # names that a page must not know
KEYS = ["films/a.mp4#0@0,9,32x48", "films/<script>alert(1)</script>.mp4#1", "films/c.mp4#2"]


def frames(seed: int, t: int = 4, h: int = 24, w: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (t, h, w, 3), dtype=np.uint8)


def fake_decode(run: str, stream: str, keys, sets=None, overrides=()):
    found = {}
    for key in keys:
        truth = frames(len(key))
        off = np.clip(truth.astype(int) + (3 if run == SECRET[0] else 40), 0, 255).astype(np.uint8)
        found[key] = {"truth": truth, "decoder": off, "2 steps": off}
    return found


def study(**changed) -> Study:
    values = {"methods": list(SECRET), "clips": [["unseen", key] for key in KEYS], "films": [["0", "1"]] * len(KEYS)}
    return Study(**(values | changed))


@pytest.fixture
def config(tmp_path, monkeypatch, runs_root):
    """A vote whose runs need not be trained: their films are made up."""
    monkeypatch.setattr(decoded, "decode", fake_decode)
    monkeypatch.setattr(vote, "draw_clips", lambda config: [["unseen", key] for key in KEYS])
    return vote.VoteConfig(list(SECRET), db=str(tmp_path / "votes.db"), port=0)


@contextmanager
def served(config: vote.VoteConfig):
    store, folder = vote.prepare(config)
    server = vote.Server((config.host, 0), store, folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        store.close()


def ask(server, path: str, body: dict | bytes, **headers) -> tuple[int, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, sent, {"Content-Type": "application/json"} | headers)
    answer = connection.getresponse()
    content = json.loads(answer.read())
    connection.close()
    return answer.status, content


def raw(server, request: bytes) -> bytes:
    """The answer to bytes that no client would clean up."""
    with socket.create_connection(("127.0.0.1", server.server_address[1]), timeout=10) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def get(server, path: str, host: str | None = None) -> bytes:
    host = host or f"127.0.0.1:{server.server_address[1]}"
    return raw(server, f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())


# --- what is asked ----------------------------------------------------------------------------------------------------


def test_sides_and_order_are_drawn_for_everyone_and_can_be_drawn_again():
    many = study(clips=[["unseen", str(i)] for i in range(60)], films=[["0", "1"]] * 60, trials=60)
    first, again, other = draw_trials(many, 1), draw_trials(many, 1), draw_trials(many, 2)
    shown = [[(t.pair, t.left, t.right) for t in trials] for trials in (first, again, other)]
    assert shown[0] == shown[1] != shown[2], "seeded by the participant's number"
    left = [t.left for t in first if t.kind == "pair"]
    assert 15 < sum(left) < 45, "either method on either side"
    assert {t.left_film for t in first}.isdisjoint({t.left_film for t in again}), (
        "addresses are not drawn from the seed"
    )
    assert len({t.pair for t in first}) == len(first)


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
    store.vote(token, first.id, "none")
    second = store.next_trial(token)[0]
    again = Store(path)  # the first was never closed: a server that was killed
    again.begin_study(study())
    assert again.next_trial(token)[0] == second and len(again.votes()) == 1
    assert again.film(second.left_film) == (second.clip, second.left)
    assert sqlite3.connect(path).execute("PRAGMA journal_mode").fetchone() == ("wal",)
    with pytest.raises(ValueError, match=r"another study \(different: seed\)"):
        again.begin_study(study(seed=1))


def test_a_file_that_is_no_database_is_refused(tmp_path):
    path = tmp_path / "votes.db"
    path.write_bytes(b"not a database at all, but long enough to be looked at" * 40)
    with pytest.raises(ValueError, match="no file of votes"):
        Store(path)


# --- results ----------------------------------------------------------------------------------------------------------


def test_wilson_interval_has_known_answers():
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)  # Newcombe 1998, and any table
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert all(map(math.isnan, wilson(0, 0)))


def test_clustered_interval_widens_with_the_clusters():
    """Ten people of one mind each say less than a hundred answers would."""
    minds = np.repeat([[8.0], [0.0]], 5, axis=0) * np.ones((1, 4)) / 8 * 10
    agreed = clustered(minds, np.full((10, 4), 10.0))
    mixed = clustered(np.full((10, 4), 5.0), np.full((10, 4), 10.0))
    low, high = wilson(200, 400)
    assert mixed == (0.5, 0.5) and agreed[1] - agreed[0] > 2 * (high - low)
    assert all(map(math.isnan, clustered(np.ones((1, 4)), np.ones((1, 4)))))


def answers(kind: str, choice: str, left: int, right: int, number: int = 1, seconds: float = 3.0) -> list[dict]:
    return [{"kind": kind, "choice": choice, "left": left, "right": right, "clip": 0, "seconds": seconds}] * number


@pytest.mark.parametrize(
    ("votes", "reason"),
    [
        ([], None),
        (answers("pair", "right", 0, 1, 3), None),
        (answers("identical", "left", 0, 0), "identical pairs"),
        (answers("pair", "left", 0, 1, 2, seconds=0.1), "median answer in 100 ms"),
        (answers("pair", "left", 0, 1, 9), "chose left all 10 times"),
        (answers("degraded", "none", TRUTH, DEGRADED), "in 1 of 2 checks"),
        (answers("degraded", "right", TRUTH, DEGRADED), "in 1 of 2 checks"),
    ],
)
def test_exclusion_rule(votes, reason):
    checked = answers("degraded", "left", TRUTH, DEGRADED)
    found = Rule().reasons(checked + votes)
    assert (not found) if reason is None else (len(found) == 1 and reason in found[0])
    assert Rule().reasons(answers("pair", "left", 0, 1)) == ["answered no check"]


def test_results_count_whom_the_rule_leaves(tmp_path):
    """Four people: three prefer the first method, one clicks through and is left out."""
    store = Store(tmp_path / "votes.db")
    store.begin_study(study())
    for person in range(4):
        token = store.begin(f"person {person}")
        while (trial := store.next_trial(token)[0]) is not None:
            better = {0: 0, TRUTH: 0}
            honest = "none" if trial.left == trial.right else "left" if trial.left in better else "right"
            store.vote(token, trial.id, honest if person < 3 else "left")
    with store._writing() as db:
        db.execute("UPDATE vote SET seconds = 4")
    found = vote_results.results(store, Rule())
    assert [one["participant"] for one in found["excluded"]] == [4] and found["participants"] == 3
    (pair,) = found["pairs"]
    assert (pair["first_preferred"], pair["second_preferred"], pair["share"]) == (9, 0, 1.0)
    assert pair["wilson"] == wilson(9, 9) and pair["clustered"] == (1.0, 1.0)
    said = vote_results.text(found)
    assert "100.0%" in said and "excluded: participant 4 (person 3): " in said and "identical" in said


# --- the server -------------------------------------------------------------------------------------------------------


def test_films_of_a_clip_have_one_size_and_hold_exactly_their_frames(config):
    store, folder = vote.prepare(config)
    store.close()
    sizes = {}
    for path in folder.iterdir():
        sizes.setdefault(path.name.split("-")[0], set()).add(path.stat().st_size)
    assert len(sizes) == len(KEYS) and all(len(found) == 1 for found in sizes.values())
    content = (folder / vote.pack_name(0, 1)).read_bytes()
    import io
    import struct

    from PIL import Image

    (number,) = struct.unpack_from(">I", content)
    (length,) = struct.unpack_from(">I", content, 4)
    first = np.asarray(Image.open(io.BytesIO(content[8 : 8 + length])).convert("RGB"))
    assert number == 4 and np.array_equal(first, fake_decode(SECRET[1], "unseen", KEYS)[KEYS[0]]["decoder"][0])


def test_nothing_that_is_sent_names_a_method(config):
    with served(config) as server:
        token = ask(server, "/api/begin", {"name": "Ada"})[1]["participant"]
        trial = ask(server, "/api/next", {"participant": token})[1]
        assert trial.keys() == {"trial", "left", "right", "done", "total", "fps"}
        sent = b"".join(get(server, path) for path in ("/", "/vote.js", "/view.js", "/page.css"))
        films = [get(server, f"/film/{trial[side]}") for side in ("left", "right")]
        sent += json.dumps(trial).encode() + b"".join(films)
    heads = [film.partition(b"\r\n\r\n")[0].split(b"\r\n") for film in films]
    assert [line for line in heads[0] if b"Date" not in line] == [line for line in heads[1] if b"Date" not in line]
    assert b"200 OK" in heads[0][0]
    for word in (*SECRET, *KEYS, "zebra", "okapi", "unseen", "identical", "degraded"):
        assert word.encode() not in sent.lower()


@pytest.mark.parametrize(
    "path",
    [
        "/../votes.db",
        "/film/../../votes.db",
        "/%2e%2e/votes.db",
        "/film/%2e%2e%2fvotes.db",
        "/..%5cvotes.db",
        "//etc/passwd",
        "/film//etc/passwd",
        "/film/" + "A" * 22,
        "/film/0-0.film",
        "/vote.html/../../vote.py",
        "/vote.py",
        "/film/" + "A" * 22 + "%00",
        "http://elsewhere/vote.js",
        "/?x=../votes.db",
    ],
)
def test_no_path_leads_out_of_the_folder(config, path):
    with served(config) as server:
        answer = get(server, path)
        assert answer.startswith(b"HTTP/1.1 404") and b"SQLite" not in answer and b"root:" not in answer


def test_a_link_out_of_the_folder_is_not_followed(config, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"not to be told")
    with served(config) as server:
        token = ask(server, "/api/begin", {})[1]["participant"]
        trial = ask(server, "/api/next", {"participant": token})[1]
        place = server.folder / vote.pack_name(*server.store.film(trial["left"]))
        place.unlink()
        os.symlink(secret, place)
        assert get(server, f"/film/{trial['left']}").startswith(b"HTTP/1.1 404")
        assert get(server, f"/film/{trial['right']}").startswith(b"HTTP/1.1 200")


def test_requests_are_bounded_and_must_be_of_this_page(config):
    with served(config) as server:
        port = server.server_address[1]
        assert ask(server, "/api/begin", {"name": "x" * 4000})[0] == 413
        assert ask(server, "/api/begin", b"[1, 2]")[0] == 400
        assert ask(server, "/api/begin", b'{"name": 3}')[0] == 400
        assert ask(server, "/api/begin", b"[" * 2000)[0] == 400
        assert ask(server, "/api/nothing", {})[0] == 404
        assert ask(server, "/api/begin", {}, Origin="http://elsewhere.example")[0] == 403
        assert ask(server, "/api/begin", {}, Host=f"elsewhere.example:{port}")[0] == 403
        assert ask(server, "/api/begin", {}, **{"Content-Type": "text/plain"})[0] == 415
        assert ask(server, "/api/next", {"participant": "nobody"})[0] == 403
        assert get(server, "/", host="elsewhere.example").startswith(b"HTTP/1.1 403")
        head = f"POST /api/begin HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        assert raw(server, f"{head}\r\n".encode()).startswith(b"HTTP/1.1 411")
        assert raw(server, f"{head}Content-Length: -1\r\n\r\n".encode()).startswith(b"HTTP/1.1 411")
        assert raw(server, f"{head}Transfer-Encoding: chunked\r\n\r\n".encode()).startswith(b"HTTP/1.1 415")
        assert raw(server, b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 414")
        assert ask(server, "/api/begin", {"name": "Ada\n\x00" + "x" * 500})[0] == 200
        assert server.store.participants()[0]["name"] == ("Ada" + "x" * 500)[: vote.LONGEST_NAME]


def test_a_film_is_served_only_once_somebody_was_told_to_look_at_it(config):
    with served(config) as server:
        server.store.begin("")
        with server.store._writing() as db:
            address = db.execute("SELECT left_film FROM trial").fetchone()[0]
        assert get(server, f"/film/{address}").startswith(b"HTTP/1.1 404")


def test_options_and_their_errors(runs_root):
    found = vote.options(["a b", "sets=[x,y]", "port=8001"], vote.VoteConfig)
    assert (found.runs, found.sets, found.port, found.host) == (["a", "b"], ["x", "y"], 8001, "127.0.0.1")
    with pytest.raises(ConfigError, match="which two runs"):
        vote.options(["a"], vote.VoteConfig)
    with pytest.raises(ConfigError, match="no file of votes"):
        vote.main(["results=true", f"db={runs_root / 'none.db'}"])
    with pytest.raises(ConfigError, match="magvit2_debug"):
        vote.main(["magvit2_debug", "baseline_debug"])


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    with launched() as found:
        yield found


def test_a_vote_in_a_browser_is_kept(config, browser):
    with served(config) as server:
        page, trouble = watched(browser)
        page.goto(f"http://127.0.0.1:{server.server_address[1]}/")
        page.fill("#name", "Ada")
        page.click("text=Begin")
        seen = []
        for number in range(5):
            page.wait_for_function(
                "seen => document.body.dataset.trial && !seen.includes(document.body.dataset.trial)", arg=seen
            )
            seen.append(page.evaluate("document.body.dataset.trial"))
            if number == 0:
                assert page.locator(".name.left").inner_text() == "left"
                before = page.locator(".divider").get_attribute("aria-valuenow")
                page.locator(".divider").focus()
                page.keyboard.press("Shift+ArrowLeft")
                assert (before, page.locator(".divider").get_attribute("aria-valuenow")) == ("50", "40")
            if number == 2:  # going away and coming back goes on where one was
                page.reload()
                page.wait_for_function("() => document.body.dataset.trial")
                assert page.evaluate("document.body.dataset.trial") == seen[-1]
            page.keyboard.press("gfh"[number % 3]) if number % 2 else page.click(
                ("#choose-left", "#choose-right")[number % 4 // 2]
            )
        page.wait_for_selector("#thanks:not([hidden])")
        text = page.content() + json.dumps(page.evaluate("({...localStorage})"))
        page.close()
    assert not trouble, trouble
    assert not any(word in text for word in SECRET)
    votes = Store(Path(config.db)).votes()
    assert [v["choice"] for v in votes] == ["left", "left", "right", "none", "left"]
    assert len({(v["clip"], v["kind"]) for v in votes}) == 5
