"""What an attack is, and the registry of them: a score a picture, higher = member."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from diffward.membership.bank import Bank
from diffward.registry import Registry

Attack = Callable[[Bank], np.ndarray]

ATTACKS: Registry[Attack] = Registry("attack")
