"""Learning curves from event files, and scores by frame index: known answers."""

import math

import pytest
from torch.utils.tensorboard import SummaryWriter

from experiments.compare_curves import by_frame, learning_curves


def session(folder, second: int, points, gap: float) -> None:
    """An event file that began at ``second`` of a fictive clock, with (seconds after, step, value) of val/psnr."""
    writer = SummaryWriter(folder / "new")
    writer.add_text("config", "text is no curve")
    path = next((folder / "new").glob("*"))
    begun = path.stat().st_mtime  # the first event's time is the real one: the others are told from it
    for after, step, value in points:
        writer.add_scalar("val/psnr", value, step, walltime=begun + after)
        writer.add_scalar("train/loss", 1.0, step, walltime=begun + after)
    writer.close()
    path.rename(folder / f"events.out.tfevents.{second}.host.1.{gap}")


def test_pauses_do_not_count_and_repeated_steps_show_the_later_value(tmp_path):
    session(tmp_path, 100, [(3600, 10, 20.0), (7200, 20, 21.0)], 0)
    session(tmp_path, 900_000, [(1800, 20, 22.0), (3600, 30, 23.0)], 1)  # days later; step 20 is done again
    curve = learning_curves(tmp_path, devices=2)["val/psnr"]
    assert (curve.steps, curve.values) == ([10, 20, 30], [20.0, 22.0, 23.0])
    assert curve.hours == pytest.approx([2.0, 5.0, 6.0], abs=0.01)
    assert list(learning_curves(tmp_path, prefix="train/")) == ["train/loss"]
    assert learning_curves(tmp_path / "nowhere") == {}


def test_scores_by_frame_are_the_evaluations_own(tmp_path):
    """``by_frame.csv`` has no mean where a prediction was not finite; means made anew of what is left in frames.csv would."""
    lines = ["stream,method,frame,clips,psnr,jump", "s,decoder,0,2,15,", "s,decoder,1,1,30,0.5", "s,floor,0,1,1,"]
    lines += ["s,broken,0,2,,", "s,broken,1,2,,"]
    (tmp_path / "by_frame.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "frames.csv").write_text("stream,key,method,frame,psnr\ns,a,broken,0,nan\ns,b,broken,0,20\n")
    found = by_frame(tmp_path)
    assert found["s", "decoder"]["psnr"] == [15.0, 30.0] and found["s", "floor"]["psnr"] == [1.0]
    jump = found["s", "decoder"]["jump"]
    assert math.isnan(jump[0]) and jump[1] == 0.5 and set(found["s", "decoder"]) == {"psnr", "jump"}
    assert all(map(math.isnan, found["s", "broken"]["psnr"])) and len(found["s", "broken"]["psnr"]) == 2
