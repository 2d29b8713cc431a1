"""How good the pictures are and how well members stand out: pure functions of arrays."""

from diffward.metrics import fid as _fid  # noqa: F401  (registers it)
from diffward.metrics import kid as _kid  # noqa: F401  (registers it)
from diffward.metrics.metric import METRICS as METRICS
from diffward.metrics.metric import Estimate as Estimate
from diffward.metrics.metric import FeatureFunction as FeatureFunction
