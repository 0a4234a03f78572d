"""Losses: ``(prediction, target) -> scalar``. They know no decoder, no trainer and no data set.

RGB is float in [-1, 1], clips are "b 3 t h w" (the axis legend is in ``datamodules/batch.py``). Terms are unweighted;
weights and schedules are the experiment's business.
"""
