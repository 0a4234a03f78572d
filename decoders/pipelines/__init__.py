"""Decoders of this project where diffusers' pipelines expect their autoencoder: WanPipeline, WanImageToVideoPipeline (Wan 2.1 and
2.2, TI2V too), LTXPipeline and LTXImageToVideoPipeline.

    with swap(pipe, decoders.load("exported/flashdecoder")):        # pipe.vae is the decoder; taken out again at the end
        frames = pipe(prompt, height=480, width=832).frames
    pipe = WanPipeline.from_pretrained(folder, vae=for_pipeline(decoders.load("exported/flashdecoder")))

Looked up lazily: diffusers is imported when the first of these names is used. `adapter.py` says what stands in for what.
"""

from importlib import import_module

_WHERE = {"for_pipeline": "swapping", "swap": "swapping", "Swapped": "swapping", "PipelineDecoder": "adapter"}
__all__ = sorted(_WHERE)


def __getattr__(name: str):
    if name in _WHERE:
        return getattr(import_module(f"decoders.pipelines.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
