"""Guarding a base model: which tensors to freeze, who keeps to it, and what an attacker still can do."""

from diffward.guard import freeze as _freeze  # noqa: F401  (registers it)
from diffward.guard import imma as _imma  # noqa: F401  (registers it)
from diffward.guard import ranking as _ranking  # noqa: F401  (registers them)
from diffward.guard import uce as _uce  # noqa: F401  (registers it)
from diffward.guard.mask import FreezeMask as FreezeMask
from diffward.guard.settings import GuardSettings as GuardSettings
from diffward.guard.subject import GUARDS as GUARDS
from diffward.guard.subject import Found as Found
from diffward.guard.subject import Subject as Subject
