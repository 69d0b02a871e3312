"""What training and evaluation read at a time: clips, in pixels or latents, with their texts, as ids or features."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from starflow_jax.flow.control import LatentCameras, cameras_of_latents

Array = Any  # jax.Array or np.ndarray; where only shapes count, jax.ShapeDtypeStruct


class Batch(flax.struct.PyTreeNode):
    """A batch as a pytree; either kind of clip, and either kind of text, is None.

    A codec in time is causal: the first latent of a clip stands for fewer frames than each later one, so a clip that
    begins in the middle of a video can't have its length. Clips of video are therefore recorded one latent longer than
    trained on, and `drop_first_B` says which end each of them loses once it is encoded (`without_one_end`).

    Where the data have cameras, a clip of video has one for each of its recorded frames, also where it comes in
    latents: of the several frames that a latent stands for all cameras are used (flow/control.py). They are in the
    world of the recording, whose first frame a clip need not have.
    """

    frames_BTHWC: Array | None = None  # uint8
    latents_BNhwC: Array | None = None  # float16 or float32
    text_ids_BS: Array | None = None  # int32
    features_BSD: Array | None = None  # float16 or float32, padding zero
    intrinsics_BT4: Array | None = None  # float32 fx, fy, cx, cy, by the frame's width and height
    world_to_camera_BT34: Array | None = None  # float32
    drop_first_B: Array | None = None  # bool: the first latent is dropped, else the last; None: clips keep both ends
    rays_BNSK: Array | None = None  # float32: through the tokens of the latents, in place of cameras
    valid_B: Array | None = None  # bool: False where an evaluation's last batch repeats a clip to keep its shape

    @property
    def clips_B(self) -> Array:
        """The clips, in latents where these are prepared, else in pixels."""
        clips = self.frames_BTHWC if self.latents_BNhwC is None else self.latents_BNhwC
        assert clips is not None
        return clips

    @property
    def text_B(self) -> Array:
        """The texts: features (B, S, D) where these are prepared, else ids (B, S)."""
        text = self.text_ids_BS if self.features_BSD is None else self.features_BSD
        assert text is not None
        return text

    @property
    def is_image(self) -> bool:
        return self.clips_B.shape[1] == 1

    def without_one_end(self, latents_BN: jax.Array) -> jax.Array:
        """This batch's latents, or what else there is of each, (B, N, ...), as trained on: without the first where
        drop_first_B says so, else without the last."""
        if self.drop_first_B is None:
            return latents_BN
        drop_first = jnp.asarray(self.drop_first_B).reshape(-1, *[1] * (latents_BN.ndim - 1))
        return jnp.where(drop_first, latents_BN[:, 1:], latents_BN[:, :-1])

    def cameras_of_latents(self, time_stride: int) -> LatentCameras:
        """Those of the latents as trained on. Only for a batch that has cameras."""
        assert self.intrinsics_BT4 is not None and self.world_to_camera_BT34 is not None
        of_recorded = cameras_of_latents(self.intrinsics_BT4, self.world_to_camera_BT34, time_stride)
        return jax.tree.map(self.without_one_end, of_recorded)
