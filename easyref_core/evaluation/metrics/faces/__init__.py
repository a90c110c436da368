"""Identity of faces, by the networks of face-api in a folder that the user names."""

from .identity import FaceIdentity
from .model import SAME_PERSON, FaceModel

__all__ = ["SAME_PERSON", "FaceIdentity", "FaceModel"]
