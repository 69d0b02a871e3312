"""Pictures from clients, decoded in a process of their own, with little memory and time:

    python -m starflow_jax.serving.uploads HEIGHT WIDTH FIT < picture > pixels
"""

import os
import resource
import subprocess
import sys
from io import BytesIO

import numpy as np

from starflow_jax.config import UserError
from starflow_jax.io import pictures

SECONDS, MEMORY, MOST_PIXELS = 10, 2 * 2**30, 40_000_000
FITS = ("resize_crop", "resize_then_crop")  # of io/pictures.py
CANT = "image: can't be read as a picture; send an undamaged PNG or JPEG of at most 40 million pixels"


def read_picture(content: bytes, height: int, width: int, fit: str = "resize_crop") -> np.ndarray:
    """The picture as (height, width, 3) uint8. Raises UserError for what is none, or takes too much."""
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OPENBLAS_NUM_THREADS": "1",
                   "OMP_NUM_THREADS": "1"}
    try:
        ended = subprocess.run([sys.executable, "-m", __name__, str(height), str(width), fit], input=content,
                               capture_output=True, env=environment, timeout=2 * SECONDS)
    except subprocess.TimeoutExpired as error:
        raise UserError(CANT) from error
    if ended.returncode or len(ended.stdout) != height * width * 3:
        raise UserError(CANT)
    return np.frombuffer(ended.stdout, np.uint8).reshape(height, width, 3)


def main(height: int, width: int, fit: str) -> None:
    """In the process of its own."""
    for limit, most in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CPU, SECONDS), (resource.RLIMIT_FSIZE, 0),
                        (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(limit, (most, most))
    picture = pictures.open_picture(BytesIO(sys.stdin.buffer.read()), MOST_PIXELS)
    fitted = getattr(pictures, FITS[FITS.index(fit)])(np.asarray(picture)[None], height, width)
    sys.stdout.buffer.write(fitted[0].tobytes())


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
