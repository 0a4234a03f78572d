"""The blind vote: what is asked, what is kept, whose answers count, and that nothing tells which side is which."""

import http.client
import json
import os
import socket
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from experiments import decoded, vote, vote_results
from experiments.compose import ConfigError
from experiments.vote_store import Store
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


@pytest.fixture
def config(tmp_path, monkeypatch, runs_root):
    """A vote whose runs need not be trained: their films are made up."""
    monkeypatch.setattr(decoded, "decode", fake_decode)
    monkeypatch.setattr(vote, "draw_clips", lambda config: [["unseen", key] for key in KEYS])
    return vote.VoteConfig(list(SECRET), db=str(tmp_path / "votes.db"), port=0)


def back(store: Store, seconds: float) -> None:
    """As if all films had been shown so much earlier."""
    with store._writing() as db:
        db.execute("UPDATE trial SET shown = shown - ?", (seconds,))


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
        assert trial.keys() == {"trial", "left", "right", "done", "total", "fps", "seconds"}
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
        "/vote.py?x=/vote.js",
        "/film/?../votes.db",
    ],
)
def test_no_path_leads_out_of_the_folder(config, path):
    with served(config) as server:
        answer = get(server, path)
        assert answer.startswith(b"HTTP/1.1 404") and b"SQLite" not in answer and b"root:" not in answer


def test_what_is_behind_a_question_mark_changes_nothing(config):
    with served(config) as server:
        for path in ("/", "/vote.js"):
            plain, more = get(server, path), get(server, f"{path}?utm=1&x=../votes.db")
            assert (
                more.startswith(b"HTTP/1.1 200") and more.partition(b"\r\n\r\n")[2] == plain.partition(b"\r\n\r\n")[2]
            )


def test_the_server_takes_an_answer_when_films_were_fetched_and_are_over(config):
    config.fps = 20.0
    with served(config) as server:
        who = {"participant": ask(server, "/api/begin", {})[1]["participant"]}
        trial = ask(server, "/api/next", who)[1]
        answer = who | {"trial": trial["trial"], "choice": "left"}
        assert trial["seconds"] == 0.2
        assert ask(server, "/api/vote", answer)[0] == 425
        assert ask(server, "/api/shown", answer)[0] == 409
        for side in ("left", "right"):
            get(server, f"/film/{trial[side]}")
        assert ask(server, "/api/shown", answer)[0] == 200
        assert ask(server, "/api/vote", answer)[0] == 425
        back(server.store, 0.2)
        assert ask(server, "/api/vote", answer)[0] == 200


def test_a_link_out_of_the_folder_is_not_followed(config, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"not to be told")
    with served(config) as server:
        token = ask(server, "/api/begin", {})[1]["participant"]
        trial = ask(server, "/api/next", {"participant": token})[1]
        assert get(server, f"/film/{trial['left']}").startswith(b"HTTP/1.1 200")
        place = server.folder / vote.pack_name(*server.store.film(trial["left"]))
        place.unlink()
        os.symlink(secret, place)
        assert get(server, f"/film/{trial['left']}").startswith(b"HTTP/1.1 404")


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
        for path in ("next", "shown", "vote"):
            assert ask(server, f"/api/{path}", b'{"participant": "\\ud800", "trial": "\\udfff"}')[0] == 400
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
    with pytest.raises(ConfigError, match="a is named twice"):
        vote.options(["a a"], vote.VoteConfig)
    with pytest.raises(ConfigError, match="spoilt and identical between 0 and 1"):
        vote.options(["a b", "spoilt=1"], vote.VoteConfig)
    files = [vote.VoteConfig(["a", "b"], sets).file() for sets in (None, ["x"], ["y"])]
    files += [vote.VoteConfig(["a" * 200, name]).file() for name in "bc"]
    assert len(set(files)) == 5 and all(len(file.name) < 200 for file in files)
    with pytest.raises(ConfigError, match="no file of votes"):
        vote.main(["results=true", f"db={runs_root / 'none.db'}"])
    with pytest.raises(ConfigError, match="magvit2_debug"):
        vote.main(["magvit2_debug", "baseline_debug"])


@pytest.mark.parametrize(
    ("changed", "said"), [({"host": "no.such.host.invalid"}, "host=no"), ({"host": "::1"}, "host=::1")]
)
def test_a_host_that_is_none_is_told_as_such(config, monkeypatch, changed, said):
    for key, value in changed.items():
        setattr(config, key, value)
    monkeypatch.setattr(vote, "options", lambda *_: config)
    with pytest.raises(ConfigError, match=f"{said}.*this machine alone"):
        vote.main([])


def test_a_port_that_is_taken_is_told(config, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        config.port = other.getsockname()[1]
        monkeypatch.setattr(vote, "options", lambda *_: config)
        with pytest.raises(ConfigError, match="give another port="):
            vote.main([])


def test_equal_films_are_not_voted_on(config, monkeypatch):
    monkeypatch.setattr(decoded, "decode", lambda run, *more: fake_decode(SECRET[0], *more))
    with pytest.raises(ConfigError, match="have the same films of all clips"):
        vote.prepare(config)


def test_the_rule_is_kept_with_the_vote(config):
    config.same_side = 5
    store, _ = vote.prepare(config)
    assert store.study().rule["same_side"] == 5 and store.study().lengths == [4] * len(KEYS)
    found = vote_results.results(store)
    assert "same side 5 times" in found["rule"] and not found["changed"]
    tried = vote_results.text(vote_results.results(store, {"same_side": 9}))
    assert "another than the one that the vote began with" in tried and "same side 9 times" in tried
    config.same_side = None
    with pytest.raises(ValueError, match="different: rule"):
        vote.prepare(config)


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    with launched() as found:
        yield found


def open_vote(server, browser, name: str):
    page, trouble = watched(browser)
    page.goto(f"http://127.0.0.1:{server.server_address[1]}/?utm=1")
    begin(page, name)
    return page, trouble


def begin(page, name: str) -> None:
    page.fill("#name", name)
    page.click("text=Begin")


def can_answer(page, seen: list[str]) -> None:
    """Wait until a pair may be answered that was not before, and remember it."""
    page.wait_for_function(
        "seen => document.body.dataset.trial && !seen.includes(document.body.dataset.trial)", arg=seen
    )
    seen.append(page.evaluate("document.body.dataset.trial"))


def test_a_vote_in_a_browser_is_kept(config, browser):
    config.fps = 20.0
    with served(config) as server:
        page, trouble = open_vote(server, browser, "Ada")
        seen = []
        for number in range(5):
            can_answer(page, seen)
            if number == 0:
                assert page.locator(".name.left").inner_text() == "left"
                before = page.locator(".divider").get_attribute("aria-valuenow")
                page.locator(".divider").focus()
                page.keyboard.press("Shift+ArrowLeft")
                assert (before, page.locator(".divider").get_attribute("aria-valuenow")) == ("50", "40")
            if number == 2:  # going away and coming back goes on where one was
                page.reload()
                seen.pop()
                can_answer(page, seen)
            page.keyboard.press("gfh"[number % 3]) if number % 2 else page.click(
                ("#choose-left", "#choose-right")[number % 4 // 2]
            )
        page.wait_for_selector("#thanks:not([hidden])")
        text = page.content() + json.dumps(page.evaluate("({...localStorage})"))
        page.click("#another")  # somebody else at the same screen
        begin(page, "Bob")
        can_answer(page, seen)
        page.click("#choose-left")
        can_answer(page, seen)
        page.once("dialog", lambda dialog: dialog.accept())
        page.click("#another")  # and another one, half-way
        assert page.evaluate("Object.keys(localStorage).length") == 0 and page.input_value("#name") == ""
        begin(page, "Cid")
        can_answer(page, seen)
        page.click("#choose-none")
        can_answer(page, seen)
        page.close()
    assert not trouble, trouble
    assert not any(word in text for word in SECRET)
    votes, people = Store(Path(config.db)).votes(), Store(Path(config.db)).participants()
    assert [v["choice"] for v in votes] == ["left", "left", "right", "none", "left", "left", "none"]
    assert [v["participant"] for v in votes] == [1, 1, 1, 1, 1, 2, 3]
    assert [p["name"] for p in people] == ["Ada", "Bob", "Cid"]
    assert len({(v["clip"], v["kind"]) for v in votes[:5]}) == 5


def test_a_key_that_is_held_answers_no_pair_that_nobody_saw(config, browser):
    config.fps = 5.0  # 0.8 s a film
    with served(config) as server:
        page, trouble = open_vote(server, browser, "Ada")
        page.wait_for_function("() => document.body.dataset.shown")
        page.keyboard.press("f")  # before the films were played
        assert page.locator("#choose-left").is_disabled() and not server.store.votes()
        seen = []
        can_answer(page, seen)
        page.keyboard.down("f")
        can_answer(page, seen)
        for _ in range(30):  # held: the browser repeats it
            page.keyboard.down("f")
        page.keyboard.up("f")
        page.wait_for_timeout(100)
        assert len(server.store.votes()) == 1
        page.keyboard.press("f")
        can_answer(page, seen)
        votes = server.store.votes()
        assert len(votes) == 2 and all(v["seconds"] >= 0.75 for v in votes), "nobody answers sooner than a film takes"
        page.keyboard.press("h")
        page.wait_for_function("seen => document.body.dataset.shown !== seen", arg=seen[-1])
        page.evaluate(
            "() => { if (view.playing) view.toggle(); }"
        )  # stopped: however long one waits, it is not through
        page.wait_for_timeout(1000)
        assert page.locator("#choose-left").is_disabled()
        page.close()
    assert not trouble, trouble
