"""One attack a file; importing this package registers them all."""

from diffward.membership.attacks import (  # noqa: F401
    adaptive,
    alignment,
    blackbox,
    calibrated,
    cdi,
    clid,
    gsa,
    lira,
    loss,
    mlp,
    pfami,
    pia,
    quantile,
    rmia,
    secmi,
    secmi_nn,
    sima,
)
