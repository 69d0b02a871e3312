"""Every reader of files that others made, with whole files for it: READERS."""

from tests.robustness.foreign_readers import FOREIGN
from tests.robustness.own_readers import OWN
from tests.robustness.trial import Reader

READERS: dict[str, Reader] = FOREIGN | OWN
