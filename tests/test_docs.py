"""README.md and docs/: every block is run or says what it needs, every link resolves, and what is named exists.

What the marks of blocks mean is in ``docs_blocks.py``.
"""

import functools
import importlib
import re
import shlex
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from docs_blocks import (
    FILE,
    NEEDS_MORE,
    ROOT,
    RUN,
    SLOW,
    Block,
    Reader,
    Unmarked,
    blocks,
    commands,
    imported,
    slugs,
    spans,
)

from experiments import api_docs, compose
from experiments.config import load
from experiments.schema import Experiment

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
FAMILIES = sorted(path.parent.name for path in ROOT.glob("decoders/*/README.md"))
LINKING = [*PAGES, ROOT / "CONTRIBUTING.md", *(ROOT / "decoders" / name / "README.md" for name in FAMILIES)]
PICTURES = sorted((ROOT / "docs" / "pictures").glob("*.svg"))
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
PLACEHOLDER = re.compile(r"^[A-Z_]+$|[{<]|\.\.\.|^(a|b|c)$")
SVG = "{http://www.w3.org/2000/svg}"


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@functools.cache
def targets() -> dict[str, str]:
    """The Makefile's targets, each with its help."""
    return dict(re.findall(r"^([a-z-]+):.*?## (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE))


@functools.cache
def known_keys() -> set[str]:
    """Every name that is a field of a dataclass, a key of a YAML file, or a word in quotes (keys of dictionaries) here."""
    files = [*ROOT.glob("experiments/*.yaml"), *ROOT.glob("datamodules/sets/*.yaml")]
    files += [path for room in ("decoders", "datamodules", "experiments") for path in (ROOT / room).rglob("*.py")]
    texts = [path.read_text() for path in files]
    fields = {key for text in texts for key in re.findall(r'\b([a-z_]\w*)"? ?[:=]', text)}
    return fields | {key for text in texts for key in re.findall(r'"([a-z_]\w*)"', text)}  # of free dictionaries


# ---- the blocks


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_block_is_run_or_says_what_it_needs(page: Path):
    for block in blocks(page):
        if block.language == "python":
            compile(block.text, block.where, "exec")


def _run(page: Path, kinds: tuple[str, ...], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    todo = [block for block in blocks(page) if block.kind in kinds]
    reader = Reader(folder)
    monkeypatch.chdir(reader.checkout)
    monkeypatch.delenv("RUNS_ROOT", raising=False)
    monkeypatch.syspath_prepend(str(reader.checkout))  # for modules that the page writes; ours are imported already
    before = set(sys.modules)
    try:
        for block in todo:
            reader.do(block)
    finally:
        for name in set(sys.modules) - before:  # the page's own modules are no other test's
            if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(reader.checkout)):
                del sys.modules[name]


def pages_with(kind: str) -> list[Path]:
    found = []
    for page in PAGES:
        try:
            found += [page] if any(block.kind == kind for block in blocks(page)) else []
        except Unmarked:  # the test above says so
            continue
    return found


@pytest.mark.parametrize("page", pages_with(RUN), ids=relative)
def test_quick_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _run(page, (RUN, FILE), tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with(SLOW), ids=relative)
def test_all_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _run(page, (RUN, SLOW, FILE), tmp_path, monkeypatch)


def test_the_quick_start_and_every_way_of_use_run():
    """A page of needs alone would pass all of the above."""
    run = {relative(page): [b for b in blocks(page) if b.kind in (RUN, SLOW)] for page in PAGES}
    assert sum(b.language == "python" for b in run["docs/use.md"]) >= 3
    for command in ("latent2pixel encode", "latent2pixel decode", "latent2pixel reconstruct", "make export"):
        assert any(command in b.text for b in run["docs/use.md"]), command
    assert any(b.language == "python" for b in run["docs/own_latent_space.md"])
    assert any("make exp=" in b.text for b in run["docs/own_latent_space.md"])


# ---- what they name


@pytest.mark.parametrize("page", LINKING, ids=relative)
def test_links_resolve(page: Path):
    text = page.read_text()
    broken = []
    for link in LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in slugs(target.read_text())):
            broken.append(link)
    assert not broken, f"{relative(page)}: {broken}"


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_commands_name_what_exists(page: Path):
    own = {Path(b.value).stem for b in blocks(page) if b.kind == FILE and b.value.startswith("experiments/")}
    typed = [c for b in blocks(page) if b.language not in ("python", "yaml", "text") for c in commands(b.text)]
    typed += [command for span in spans(page.read_text()) for command in commands(span)]
    wrong = [f"{command}: {why}" for command in typed for why in odd_in(command, own)]
    assert not wrong, f"{relative(page)}:\n" + "\n".join(wrong)


def odd_in(command: str, own: set[str] = frozenset()) -> list[str]:
    """What a command names that is not there; ``own``: experiments that its page writes."""
    try:
        words = shlex.split(command)
    except ValueError:
        return []
    if words[:2] == ["python", "-m"] and len(words) > 2:
        return _odd_module(words[2], words[3:], own)
    if words[:1] != ["make"]:
        dotted = len(words) == 1 and re.match(r"(\w+(?:\.\w+)+)=", words[0])
        return _odd_key(dotted[1]) if dotted and dotted[1].split(".")[0] in Experiment.__dataclass_fields__ else []
    target = words[1] if len(words) > 1 and "=" not in words[1] else "train"
    if PLACEHOLDER.search(target):
        return []
    if target not in targets():
        return [f"no target '{target}'"]
    return _odd_options(target.replace("-", "_"), words[1:], own)


def _odd_module(module: str, words: list[str], own: set[str]) -> list[str]:
    """Of ``python -m module words``: the first word is an experiment, unless the module speaks of it (`layout`, `--list`)."""
    if module in ("pytest", "venv", "pip", "http.server"):
        return []
    source = (ROOT / Path(*module.split("."))).with_suffix(".py")
    if not source.is_file():
        return [f"no module {module}"]
    first = words[0] if words and "=" not in words[0] else ""
    if first and not first.startswith("-") and not re.search(rf"\b{first}\b", source.read_text()):
        words = [f"exp={first}", *words[1:]]
    return _odd_options(module.rpartition(".")[2], words, own)


def _odd_options(module: str, words: list[str], own: set[str]) -> list[str]:
    options = dict(word.strip("[]").split("=", 1) for word in words if "=" in word and not word.startswith("-"))
    names = [name.partition(":")[0] for key in ("exp", "exps") for name in options.pop(key, "").split()]
    real = [name for name in names if not PLACEHOLDER.search(name) and name not in own]
    wrong = [f"no experiment '{name}'" for name in real if name not in compose.names()]
    source = ROOT / "experiments" / f"{module}.py"
    says = (source.read_text() if source.is_file() else "") + targets().get(module.replace("_", "-"), "")
    for key, value in options.items():
        if re.match(r"\W*key$", key):
            continue
        plain = "." not in key or key.startswith("bench.")
        if plain:
            last = key.rpartition(".")[2]
            fields = Experiment.__dataclass_fields__
            spoken = last in fields or re.search(rf"\b{last}\b", says) or (key != last and last in known_keys())
            wrong += [] if spoken or last in ("PORT", "JOBS", "PYTHON", "python") else [f"no option '{key}'"]
        elif real and not wrong and not PLACEHOLDER.search(value):
            try:
                load(real[0], [f"{key}={value}"])
            except compose.ConfigError as error:
                wrong.append(str(error))
        else:
            wrong += _odd_key(key)
    return wrong


def _odd_key(key: str) -> list[str]:
    first, *rest = key.split(".")
    missing = [part for part in rest if part not in known_keys() and not part.isupper()]
    if first not in Experiment.__dataclass_fields__ or missing:
        return [f"no key '{key}'"]
    return []


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_blocks_that_are_not_run_import_what_exists(page: Path):
    for block in blocks(page):
        if block.kind != NEEDS_MORE or block.language != "python":
            continue
        for module, name in imported(block.text):
            if module.split(".")[0] in ("decoders", "datamodules", "losses", "metrics", "experiments"):
                found = importlib.import_module(module)
                there = not name or name in getattr(found, "__all__", ()) or hasattr(found, name)
                assert there, f"{block.where}: {module} has no {name}"


def test_every_family_has_a_page_and_a_picture():
    index = (ROOT / "docs" / "index.md").read_text()
    for module in ROOT.glob("decoders/*/module.py"):
        family = module.parent.name
        if family == "baseline":  # the row that comparisons start with; its README says all there is
            continue
        page = ROOT / "docs" / f"{family}.md"
        assert page.is_file() and f"]({family}.md)" in index, f"docs/{family}.md"
        text = page.read_text()
        assert f"pictures/{family}.svg" in text and f"decoders/{family}/README.md" in text


@pytest.mark.parametrize("picture", PICTURES, ids=relative)
def test_pictures_are_svg_within_their_frame_and_without_code(picture: Path):
    root = ET.fromstring(picture.read_text())
    left, top, width, height = map(float, root.get("viewBox").split())
    assert root.tag == f"{SVG}svg" and root.find(f"{SVG}title").text and root.find(f"{SVG}desc").text
    for element in root.iter():
        assert element.tag not in (f"{SVG}script", f"{SVG}image", f"{SVG}foreignObject")
        assert not any(name.startswith("on") or name.endswith("href") for name in element.attrib)
        if element.tag == f"{SVG}text":
            assert left <= float(element.get("x")) <= left + width and top <= float(element.get("y")) <= top + height


# ---- the reference of the interface


def test_what_the_reference_names_exists_and_is_documented():
    assert not api_docs.problems()


def test_the_reference_is_what_the_docstrings_say():
    assert api_docs.PAGE.read_text() == api_docs.page(), "make docs writes docs/api.md anew"


def test_a_missing_name_and_a_missing_docstring_are_seen():
    names = {
        "decoders.latent_spaces.base": ("LatentSpace", "pad_to_invalid"),
        "experiments.compose": ("names", "FOLDER"),
    }
    said = api_docs.problems({"bad": names})
    assert any("pad_to_invalid" in line for line in said) and any("FOLDER" in line for line in said)
    assert not any("LatentSpace" in line for line in said)


@pytest.mark.slow
def test_the_html_is_built(tmp_path: Path):
    pytest.importorskip("pdoc", reason="make docs needs pdoc")
    assert api_docs.main([f"out={tmp_path / 'html'}", "write=false"]) == 0
    assert (tmp_path / "html" / "index.html").is_file()
    assert "step_stream" in (tmp_path / "html" / "decoders" / "exported.html").read_text()


# ---- the checks themselves


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("```python\nx = 1\n```", RUN),
        ("```sh\ntrue\n```", RUN),
        ("<!-- runs: slow -->\n```sh\ntrue\n```", SLOW),
        ("<!-- needs: GPU, network -->\n\n```\ntrue\n```", NEEDS_MORE),
        ("- a list\n\n  <!-- file: a/b.py -->\n  ```python\n  x = 1\n  ```", FILE),
        ("```\ntrue\n```", None),
        ("```yaml\na: 1\n```", None),
        ("<!-- needs: -->\n```\ntrue\n```", None),
        ("<!-- needs: luck -->\n```\ntrue\n```", None),
        ("<!-- file: ../b.py -->\n```python\n1\n```", None),
        ("<!-- run -->\n```\ntrue\n```", None),
        ("```sh\ntrue\n", None),
    ],
)
def test_marks(text: str, kind: str | None, tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(text + "\n")
    if kind is None:
        with pytest.raises(Unmarked):
            blocks(page)
    else:
        assert [block.kind for block in blocks(page)] == [kind]


@pytest.mark.parametrize(
    ("command", "odd"),
    [
        ("make exp=flashdecoder_demo trainer.max_steps=4", False),
        ("make exp=flashdecoder_demo trainer.max_step=4", True),
        ("make exp=flashdecoder_dem", True),
        ("make exp=NAME key=value ...", False),
        ("make evaluat exp=NAME", True),
        ("make evaluate exp=flashdecoder_demo weights=start", False),
        ("make evaluate exp=flashdecoder_demo wights=start", True),
        ("python -m experiments.trian flashdecoder_demo", True),
        ("python -m experiments.train flashdecoder_demo optim.lr=1e-4", False),
        ("trainer.async_checkpoints=true", False),
        ("trainer.asynchronous_checkpoints=true", True),
    ],
)
def test_odd_commands_are_seen(command: str, odd: bool):
    assert bool(odd_in(command)) == odd


@pytest.mark.parametrize(("language", "text"), [("python", "x = 1\nassert x == 2"), ("sh", "false | true\n")])
def test_a_block_that_fails_fails_the_test(language: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("docs_blocks.shutil.copytree", lambda *_, **__: (tmp_path / "checkout").mkdir())
    reader = Reader(tmp_path)
    with pytest.raises(AssertionError):
        reader.do(Block("page.md", 3, language, text, RUN))
