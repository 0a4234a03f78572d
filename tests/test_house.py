"""The house itself: one set of pins, a licence, a Makefile that explains itself, a README that names every room."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
LONGEST_FILE = 400
TARGETS = {"train", "list", "show", "evaluate", "bench", "tb", "test", "test-slow", "test-gpu", "lint", "flash-attn"}
TARGETS |= {
    "replay",
    "doctor",
    "pack",
    "check-shards",
    "cache-latents",
    "sets",
    "decode",
    "reconstruct",
    "export",
    "generate",
    "fixed-seed",
    "vbench",
    "bench-pipeline",
    "docs",
    "profile",
    "bench-all",
    "bench-gate",
    "bench-train",
    "quantise",
    "compare",
    "report",
    "vote",
    "index",
    "setup",
    "help",
}


def tracked() -> list[Path]:
    """Files under version control, or that would be: nothing that .gitignore names."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if run.returncode != 0:
        pytest.skip("not a git checkout")
    return [path for line in run.stdout.splitlines() if (path := ROOT / line).is_file()]


def requirements() -> list[str]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def test_one_set_of_pins():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert pip == requirements()
    assert all("==" in line for line in pip)


def test_malicious_lightning_is_not_pinned():
    version = next(line.split("==")[1] for line in requirements() if line.startswith("lightning=="))
    assert tuple(map(int, version.split("."))) >= (2, 6, 4)


def test_flash_attn_is_optional_and_named_once():
    pin = r"flash-attn==[\w.]+"
    named = re.search(rf"^ +# - ({pin})$", (ROOT / "environment.yml").read_text(), re.MULTILINE)
    built = re.search(rf"^flash-attn:.*\n(?:\t.*\n)*?.*({pin})$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert named[1] == built[1]
    assert not any(line.startswith("flash-attn") for line in requirements())


def test_licence():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text and "Copyright 2026 The contributors" in text


def test_help_lists_all_targets():
    makefile = (ROOT / "Makefile").read_text()
    documented = re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE)
    phony = re.search(r"^\.PHONY: (start .*)$", makefile, re.MULTILINE)[1].split()
    assert set(documented) == TARGETS == set(phony) - {"start"}


def test_tiers_of_tests():
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert "not slow and not gpu" in options["addopts"], "bare pytest is the fast tier"
    assert [marker.split(":")[0] for marker in options["markers"]] == ["slow", "gpu"]


def test_readme_names_every_room():
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("README.md is not written yet")
    text = readme.read_text()
    rooms = {path.relative_to(ROOT).parts[0] for path in tracked() if len(path.relative_to(ROOT).parts) > 1}
    families = {f"{path.parent.name}" for path in ROOT.glob("decoders/*/module.py")}
    missing = [room for room in sorted(rooms - {".ci"} | families) if f"{room}/" not in text]
    assert not missing, f"README's tree does not name {missing}"


def test_files_fit_in_the_head():
    lengths = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in tracked() if path.suffix == ".py"}
    long = {str(path): length for path, length in lengths.items() if length > LONGEST_FILE}
    assert not long, f"over {LONGEST_FILE} lines; where is the seam? {long}"


def test_nothing_of_one_machine():
    """No absolute path of somebody's machine and no private index in what is shipped."""
    texts = [
        p for p in tracked() if p.suffix in (".py", ".yaml", ".yml", ".md", ".txt", ".toml") or p.name == "Makefile"
    ]
    pattern = re.compile(r"(?<![\w.])/(?:home|root|Users|work|mnt)/\w|--(?:extra-)?index-url")
    found = {str(p.relative_to(ROOT)): m[0] for p in texts if (m := pattern.search(p.read_text()))}
    found.pop("tests/test_house.py", None)
    assert not found
