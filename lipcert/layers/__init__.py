"""Layers with known Lipschitz behaviour, drop-in for torch.nn: `forward` and, where weights are derived, `export()`."""

from lipcert.layers.activations import GroupSort as GroupSort
from lipcert.layers.activations import MaxMin as MaxMin
from lipcert.layers.almost_orthogonal import AOLLinear as AOLLinear
from lipcert.layers.attention import DotProductAttention as DotProductAttention
from lipcert.layers.attention import ScaledCosineAttention as ScaledCosineAttention
from lipcert.layers.dropout import Dropout as Dropout
from lipcert.layers.dropout import DropPath as DropPath
from lipcert.layers.head import NormalizedLinear as NormalizedLinear
from lipcert.layers.head import pairwise_distances as pairwise_distances
from lipcert.layers.normalisation import CenterNorm as CenterNorm
from lipcert.layers.pooling import AvgPool2d as AvgPool2d
from lipcert.layers.pooling import L2Pool2d as L2Pool2d
from lipcert.layers.power import PowerIteration as PowerIteration
from lipcert.layers.residual import LiResConv as LiResConv
from lipcert.layers.residual import convolve as convolve
from lipcert.layers.shift import Shift as Shift
from lipcert.layers.windows import WindowMix as WindowMix
