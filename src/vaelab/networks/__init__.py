"""Encoder and decoder networks. Each takes any image of C x H x W with both sides at least 8, odd and unequal ones too.

An encoder maps images to features, ``out_features`` of them, of which a posterior makes a distribution; a decoder maps
latent vectors to the parameters of every pixel, of which a likelihood makes one. Neither knows which.

An encoder is built from its spec and the shape (C, H, W) of an image; a decoder from its spec, the number D of latent
dimensions and ``out_shape`` (P*C, H, W): what the likelihood asks for, P parameters for each channel.
"""

from vaelab.networks.convolutional import ConvDecoder as ConvDecoder
from vaelab.networks.convolutional import ConvEncoder as ConvEncoder
from vaelab.networks.dense import MLPDecoder as MLPDecoder
from vaelab.networks.dense import MLPEncoder as MLPEncoder
from vaelab.networks.dropout import Dropout as Dropout
from vaelab.networks.network import Decoder as Decoder
from vaelab.networks.network import batch_norms as batch_norms
from vaelab.networks.network import has_dropout as has_dropout
from vaelab.networks.network import initialise as initialise
from vaelab.networks.residual import ResidualDecoder as ResidualDecoder
from vaelab.networks.residual import ResidualEncoder as ResidualEncoder
