"""The three-line loop, and what streams can besides: pause, two at once, begin anew, an image.

PYTHONPATH=. python docs/examples/stream.py           # an installed package needs no PYTHONPATH
"""

import torch

import decoders
from decoders.streaming import Stream

model = decoders.load("wan_mini")
latents = model.encode(torch.rand(1, 3, 9, 64, 96) * 2 - 1)  # "1 c 3 8 12"; a diffusion model would give these

# The loop: push latent frames as they come, take the frames that are ready, flush at the end.
video = Stream(model, height=64, width=96)
pieces = [video.push(latent_frame) for latent_frame in latents.unbind(2)]
pieces.append(video.finish())
print("frames per push:", [piece.shape[2] for piece in pieces])  # 1, 4, 4, then nothing left
assert torch.equal(torch.cat(pieces, 2), model.decode(latents))

# Two videos on one model, in turn: each has its own state, and a stream that gets nothing is paused.
one, other = Stream(model, 64, 96), Stream(model, 64, 96)
first = one.push(latents[:, :, 0])
other.push(-latents[:, :, 0])
second = one.push(latents[:, :, 1])
assert torch.equal(torch.cat([first, second], 2), torch.cat(pieces, 2)[:, :, :5])

# Another video with the same size: forget what was pushed.
one.reset()
assert torch.equal(one.push(latents[:, :, 0]), first)

# An image is a clip of one frame.
image = Stream(model, 64, 96)
frame = torch.cat([image.push(latents[:, :, 0]), image.finish()], 2)
print("image:", tuple(frame.shape))
