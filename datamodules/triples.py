"""Triples for style transfer: an input, a style image as the reference, and the stylised target.

A source of ``kind: triple`` is a CSV list with the columns input, reference, target (paths, relative ones from the list's
own folder). Input and target are images or videos, the reference is an image. What is an image is repeated to the
clip's length. Batches are {video: target, source: input, reference: style, key}.

Input and target are cut by the same box, so they must have the same aspect ratio (within 2 %; the input is resized to
the target's) and, where both are videos, the same frame rate: frame i of one belongs to frame i of the other. The
reference is cropped about its centre to the clip's aspect ratio and resized to it (``stills.load_reference``).

OmniStyle-150K (143,992 triplets of images) has, as its users describe it, three folders: ``content``, ``style`` and
``OmniStyle-150K``, whose files are called <content file>&&<style file>.png. Its list is made by

    import csv, os
    targets = sorted(os.listdir("OmniStyle-150K"))
    with open("omnistyle.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["input", "reference", "target"])
        for name in targets:
            content, style = name.removesuffix(".png").split("&&")
            rows.writerow([f"content/{content}", f"style/{style}", f"OmniStyle-150K/{name}"])
"""

from datamodules.probe import BadFile, Info
from datamodules.sources import SUFFIXES

ASPECT_TOLERANCE = 0.02
RATE_TOLERANCE = 1e-3
ANY_LENGTH = 2**31 - 1  # frames of a triple of images


def is_image(path: str) -> bool:
    """By its suffix."""
    return path.lower().endswith(SUFFIXES["image"])


def check_shapes(given: tuple[int, int], target: tuple[int, int]) -> None:
    """Raise BadFile unless one crop box can cut an input and a target of these (height, width)."""
    if abs(given[0] * target[1] / (given[1] * target[0]) - 1) > ASPECT_TOLERANCE:
        raise BadFile(
            f"its input is {given[0]}x{given[1]} and its target {target[0]}x{target[1]}: one crop cannot cut both; crop them "
            "to one aspect ratio first"
        )


def triple_info(given: Info, reference: Info, target: Info) -> Info:
    """What a triple offers to a stream: the smaller of the two sizes, the shorter of the two lengths; of images any.

    Raises BadFile where input and target do not belong together.
    """
    if reference.fps:
        raise BadFile("its reference is a video, not an image")
    check_shapes((given.height, given.width), (target.height, target.width))
    if given.fps and target.fps and abs(given.fps / target.fps - 1) > RATE_TOLERANCE:
        raise BadFile(f"its input has {given.fps:g} frames per second and its target {target.fps:g}")
    length = min((info.num_frames for info in (given, target) if info.fps), default=ANY_LENGTH)
    width, height = min(given.width, target.width), min(given.height, target.height)
    return Info(width, height, length, given.fps or target.fps)
