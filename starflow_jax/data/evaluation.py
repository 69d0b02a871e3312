"""The first clips of a source, each once and in order."""

from collections.abc import Iterator

import numpy as np

from starflow_jax.config import UserError
from starflow_jax.data.batch import Batch
from starflow_jax.data.examples import ClipLength, Source, TextInput, cameras_of, decoded, features_of, parts_of


def evaluation_batches(source: Source, length: ClipLength, text: TextInput, *, batch_size: int, limit: int
                       ) -> Iterator[Batch]:
    """The first `limit` clips (or all) once, in order, with long captions; of several sizes in one order, each
    batch of one size. Clips are the first `length` of each, an image's where that is one frame; valid_B says which
    are not repeated.
    """
    is_image = length.pixel_frames == 1
    for part in parts_of(source, "images" if is_image else "videos"):
        kind, wanted = ("latents", length.latents) if "latents" in part[0] else ("frames", length.pixel_frames)
        recorded = len(part[0][kind])
        if wanted > recorded:
            raise UserError(f"pixel_frames is {length.pixel_frames}, {wanted} {kind}: the clips have 1 to {recorded} "
                            f"{kind}")
        count = min(limit, len(part))
        limit -= count
        for begin in range(0, count, batch_size):
            indices_B = np.arange(begin, begin + batch_size)
            records = [part[int(index)] for index in np.minimum(indices_B, count - 1)]
            prompts = [text.prompt(record, decoded(record["caption_long"]), is_image) for record in records]
            clips = {"latents_BNhwC" if kind == "latents" else "frames_BTHWC":
                     np.stack([record[kind][:wanted] for record in records])}
            if not is_image:
                cameras = [cameras_of(record, 0, length.pixel_frames) for record in records]
                clips |= {name: np.stack([of_one[name] for of_one in cameras]) for name in cameras[0]}
            features = [features_of(record, prompt) for record, prompt in zip(records, prompts)]
            yield Batch(**clips, **text.arrays(prompts, features), valid_B=indices_B < count)
