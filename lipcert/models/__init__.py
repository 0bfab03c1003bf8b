"""Architectures, one per file. Importing this package registers all of them."""

from lipcert.models import cswin as cswin
from lipcert.models import lipsegformer as lipsegformer
from lipcert.models import lipsformer_certified as lipsformer_certified
from lipcert.models import segformer as segformer
from lipcert.models import shiftvit as shiftvit
from lipcert.models import swin as swin
