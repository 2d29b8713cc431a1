"""One way of asking a model a file; importing this package registers them all."""

from diffward.membership.probes import (  # noqa: F401
    alignment,
    crops,
    errors,
    generated,
    gradients,
    maps,
    pia,
    secmi,
    sima,
)
