"""A thousand frames through encode, decode and reconstruct, in flat memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli_files import export, frames_of
from video_files import make_film

ROOT = Path(__file__).parent.parent
SIZE = (48, 80)
SHORT, LONG = 100, 1000
ROOM_MIB = 10  # measured: 1.2; 900 frames more are 40 MiB as float32 pixels
# glibc gives freed memory back at once, else the peak wanders by 30 MiB with how threads met (measured).
CALM = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
# Of this process since it was started; ru_maxrss would still know the memory of the one that forked it.
MEASURE = """
import json, re, sys
from experiments.cli import main
status = main(sys.argv[1:])
peak = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())
print(json.dumps([status, int(peak[1]) / 1024]))
"""


def peak_mib(*arguments: object) -> float:
    """Largest resident set of a command of its own process."""
    command = [sys.executable, "-c", MEASURE, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **CALM})
    assert done.returncode == 0, done.stderr
    status, peak = json.loads(done.stdout.splitlines()[-1])
    assert status == 0, done.stderr
    return peak


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="peak memory is read from /proc")
def test_a_thousand_frames_in_flat_memory(tmp_path):
    model = export("baseline_debug", tmp_path / "model")
    peaks: dict[str, list[float]] = {"encode": [], "decode": [], "reconstruct": []}
    for num in (SHORT, LONG):
        film = make_film(tmp_path / f"{num}.mp4", num, SIZE)
        latents, out, again = (tmp_path / f"{num}{end}" for end in (".safetensors", ".out.mp4", ".again.mp4"))
        peaks["encode"].append(peak_mib("encode", model, film, "-o", latents))
        peaks["decode"].append(peak_mib("decode", model, latents, "-o", out))
        peaks["reconstruct"].append(peak_mib("reconstruct", model, film, "-o", again))
        assert len(frames_of(out)) == len(frames_of(again)) == num
    print(peaks)
    for command, (short, long) in peaks.items():
        assert long - short < ROOM_MIB, f"{command}: {short:.0f} MiB for {SHORT} frames, {long:.0f} for {LONG}"
