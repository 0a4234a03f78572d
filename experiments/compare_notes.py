"""What a reader of a comparison must know, in sentences for below its tables: how it was measured, and what its marks say."""

from experiments.comparison import METHOD, RUN, Comparison, clips_of_films
from metrics.intervals import ENOUGH

BUSY = 0.05  # share of the cores, taken by other processes, above which the table says so
INTERVALS = (
    f"Brackets: 95 % interval of the mean over clips (bootstrap, below {ENOUGH} clips Student's), as if clips were independent: "
    "those of one film are not."
)
OF_TRUTH = "{}: neither less nor more is better, nearer the truth's is; no run is best there."
COMPRESSION = (
    "Compression: numbers of video for one of the latent, in the limit of a long video with its first frames counted; REGEN's "
    "paper leaves the first frame out (T - 1 frames)."
)
MARKED = "The best run of a column is marked, with all whose paired difference from it has an interval that holds zero."


def protocol_line(comparison: Comparison, stream: str) -> str:
    """Clips, frames, size, resize, how pixels were made, machine, versions and dates, of one stream's scores."""
    s = comparison.stream(stream)
    rows = [row for row in comparison.rows if row.kind in (RUN, METHOD)]
    dtypes = "/".join(dict.fromkeys(str(row.made.get("dtype")) for row in rows if row.made))
    runs = comparison.runs
    devices = "/".join(dict.fromkeys(run.evaluated_on for run in runs))
    versions = "; ".join(dict.fromkeys(", ".join(f"{k} {v}" for k, v in run.versions.items()) for run in runs))
    dates = "/".join(dict.fromkeys(run.evaluated[:10] for run in runs))
    protocol = comparison.columns_of(stream)[0].protocol
    first, last = protocol["frames"]
    stride = "" if s.stride is None else f" with stride {s.stride}"
    return (
        f"{clips_of_films(s.clips, s.films)} (list {protocol['clips']}), frames {first}..{last - 1}{stride}, {s.size[0]}x{s.size[1]}, "
        f"{s.resize}; decoded in {dtypes} on {devices}; {versions}; evaluated {dates}."
    )


def speed_notes(comparison: Comparison) -> list[str]:
    """On what the speed was measured, and whether the machine was quiet."""
    machine = comparison.machine
    if not machine:
        return ["Speed was not measured (speed=false)."]
    speed = next(row.speed for row in comparison.rows if row.speed)
    threads = f", threads: {machine['threads']}" if machine["threads"] else ""
    lines = [
        f"One clip of {speed.frames} frames at {speed.size[0]}x{speed.size[1]} at a time, whole, without encoding; "
        f"{machine['dtype']}; {machine['device']}{threads}; median and range of {machine['rounds']} rounds in turns; torch "
        f"{comparison.versions['torch']}; {comparison.date[:10]}."
    ]
    if (others := machine["others_cpu_share"]) is not None and others > BUSY:
        lines.append(f"Other processes took {others:.0%} of the cores meanwhile: measure again on a quiet machine.")
    return lines


def notes(comparison: Comparison) -> list[str]:
    """What a reader must know of the rows: the command, marks, merged rows, runs that did not come to their end."""
    lines = [INTERVALS]
    lines += [MARKED] if any(score.best for row in comparison.rows for score in row.scores.values()) else []
    if not all(column.per_clip for column in comparison.columns):
        lines.append(
            "Scores of all clips together (FVD) have no interval; the lowest is marked, which says nothing of chance."
        )
    if shared := [row.label for row in comparison.rows if len(row.runs) > 1]:
        lines.append(f"The same in several runs, shown once: {', '.join(shared)}.")
    for stream in comparison.streams:
        for row in comparison.rows:
            clips = max(
                (row.scores[c.id].clips for c in comparison.columns_of(stream.name) if c.id in row.scores), default=0
            )
            if 0 < clips < stream.clips:
                lines.append(f"{row.label} was scored on {clips} of the {stream.clips} clips of {stream.name}.")
    if of_truth := dict.fromkeys(column.metric for column in comparison.columns if column.of_truth):
        lines.append(OF_TRUTH.format(", ".join(of_truth)))
    broken = (row.label for row in comparison.rows if any(score.mean is None for score in row.scores.values()))
    lines += [f"{label} gave pixels that are not finite: it has no mean there, and no mark." for label in broken]
    lines += [f"{run.name} has not come to its last step." for run in comparison.runs if not run.finished]
    spaces = {run.fingerprint for run in comparison.runs}
    if len(spaces) > 1:
        told = ", ".join(f"{run.name} {run.compression:.4g}" for run in comparison.runs)
        lines.append(f"The runs decode different latents; numbers of video for one of the latent: {told}.")
    return lines
