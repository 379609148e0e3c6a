"""The networks of the four papers, and training one until it makes few enough errors."""

from fisherviz.models.fitting import train_to_error
from fisherviz.models.networks import (
    ACTIVATIONS,
    AUTOENCODERS,
    Images,
    autoencoder,
    build,
    cwngd_convnet,
    foof_mlp,
    kfac_mlp,
    names,
    shrestha_mlp,
    sparse_init,
)
from fisherviz.models.transformed import logistic_twin, restored, transformed, whitening

__all__ = [
    "ACTIVATIONS",
    "AUTOENCODERS",
    "Images",
    "autoencoder",
    "build",
    "cwngd_convnet",
    "foof_mlp",
    "kfac_mlp",
    "logistic_twin",
    "names",
    "restored",
    "shrestha_mlp",
    "sparse_init",
    "train_to_error",
    "transformed",
    "whitening",
]
