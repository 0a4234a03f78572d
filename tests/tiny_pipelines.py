"""diffusers' own video pipelines, small and with random weights, built offline: the classes are real, only sizes are not.

    pipe = tiny_pipeline("wan_i2v")
    frames = pipe(**call_arguments("wan_i2v"), output_type="np").frames

Strides, channels, the causal rule and the order of calls are those of the releases. ``save_pretrained`` and ``from_pretrained``
work on them as on any pipeline. A call takes about a second on one CPU core.
"""

import string
from typing import Any

import numpy as np
import torch
from torch import nn

KINDS = ("wan_t2v", "wan_i2v", "wan22_t2v", "wan22_i2v", "ltx_t2v", "ltx_i2v")
IMAGE_KINDS = tuple(kind for kind in KINDS if kind.endswith("i2v"))
TEXT_WIDTH = 32
PROMPT = "a red kite over the sea"
NUM_FRAMES = {"wan": 5, "wan22": 5, "ltx": 9}
SIZES = {"wan": (32, 48), "wan22": (64, 96), "ltx": (64, 96)}  # height, width in pixels: 4x6, 4x6 and 2x3 latent pixels


def space_of(kind: str) -> str:
    """The latent space of a pipeline: wan, wan22 or ltx."""
    return kind.partition("_")[0]


def tiny_pipeline(kind: str, seed: int = 0) -> Any:
    """A diffusers pipeline of one of ``KINDS``, float32, on the CPU, without a progress bar; equal for equal seeds.

    wan_*: Wan 2.1. wan22_*: Wan 2.2 TI2V, one time step per token (``expand_timesteps``) and 48 latent channels.
    """
    import diffusers

    space = space_of(kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {"vae": tiny_vae(space), "tokenizer": tiny_tokenizer(), "text_encoder": _text_encoder(space)}
        if space == "ltx":
            parts |= {"transformer": _ltx_transformer(), "scheduler": diffusers.FlowMatchEulerDiscreteScheduler()}
            cls = diffusers.LTXImageToVideoPipeline if kind in IMAGE_KINDS else diffusers.LTXPipeline
        else:
            parts |= {"transformer": _wan_transformer(kind), "expand_timesteps": space == "wan22"}
            parts["scheduler"] = diffusers.UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            )
            cls = diffusers.WanImageToVideoPipeline if kind in IMAGE_KINDS else diffusers.WanPipeline
            if kind in IMAGE_KINDS:
                parts |= {"image_encoder": None, "image_processor": None}  # as in Wan 2.2; optional in the pipeline
        pipe = cls(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_arguments(kind: str, seed: int = 0) -> dict[str, Any]:
    """What a short call of the pipeline takes, besides ``output_type``: two steps, a few small frames, a seeded generator."""
    space = space_of(kind)
    height, width = SIZES[space]
    arguments = {
        "prompt": PROMPT,
        "negative_prompt": "",
        "height": height,
        "width": width,
        "num_frames": NUM_FRAMES[space],
        "num_inference_steps": 2,
        "guidance_scale": 1.5,
        "max_sequence_length": 32,
        "generator": torch.Generator().manual_seed(seed),
    }
    return arguments | ({"image": tiny_image(height, width)} if kind in IMAGE_KINDS else {})


def tiny_image(height: int, width: int, seed: int = 0) -> Any:
    """A PIL image of smooth random colours."""
    from PIL import Image

    coarse = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def tiny_vae(space: str) -> nn.Module:
    """The autoencoder of a release with few channels: its strides, latent channels (LTX: 8 of 128) and kinds of statistics."""
    from diffusers import AutoencoderKLLTXVideo, AutoencoderKLWan

    if space == "ltx":
        widths, ones = (4, 4, 8, 8), (1, 1, 1, 1, 1)
        vae = AutoencoderKLLTXVideo(
            latent_channels=8,
            block_out_channels=widths,
            decoder_block_out_channels=widths,
            layers_per_block=ones,
            decoder_layers_per_block=ones,
            scaling_factor=0.8,
        )
        vae.latents_mean += torch.linspace(-1, 1, 8)
        vae.latents_std *= torch.linspace(0.5, 2, 8)
    elif space == "wan22":
        vae = AutoencoderKLWan(
            base_dim=4,
            decoder_base_dim=8,
            z_dim=48,
            num_res_blocks=1,
            is_residual=True,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            scale_factor_spatial=16,
            latents_mean=torch.linspace(-1, 1, 48).tolist(),
            latents_std=torch.linspace(0.5, 2, 48).tolist(),
        )
    else:
        vae = AutoencoderKLWan(base_dim=4, num_res_blocks=1)  # the statistics of Wan 2.1 are the defaults
    return _livelier(vae)


def tiny_tokenizer() -> Any:
    """T5's tokenizer over letters."""
    from transformers import T5TokenizerFast

    letters = [(letter, -3.0) for letter in string.ascii_lowercase + string.digits + ",.-"]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("\u2581", -2.0), *letters]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=32)


def _text_encoder(space: str) -> nn.Module:
    from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

    config, model = (T5Config, T5EncoderModel) if space == "ltx" else (UMT5Config, UMT5EncoderModel)
    sizes = {"vocab_size": 64, "d_model": TEXT_WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return model(config(**sizes)).eval()


def _wan_transformer(kind: str) -> nn.Module:
    from diffusers import WanTransformer3DModel

    channels = 48 if space_of(kind) == "wan22" else 16
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=channels + 20 if kind == "wan_i2v" else channels,  # the condition and its mask of 4
        out_channels=channels,
        text_dim=TEXT_WIDTH,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=32,
    ).eval()


def _ltx_transformer() -> nn.Module:
    from diffusers import LTXVideoTransformer3DModel

    return LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=TEXT_WIDTH,
    ).eval()


def _livelier(vae: nn.Module) -> nn.Module:
    """Random weights that let a picture through: at their initial values two inputs decode to almost the same grey."""
    with torch.no_grad():
        for parameter in vae.parameters():
            if parameter.ndim > 1 and parameter[0].numel() > 1:
                parameter.normal_(0, 1.3 / parameter[0].numel() ** 0.5)
    return vae.requires_grad_(False).eval()
