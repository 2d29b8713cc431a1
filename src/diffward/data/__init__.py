"""The pictures: layouts, near-duplicates, splits by file hash, and the cache of what is encoded.

Importing this needs Pillow and numpy only.
"""

from diffward.data.cache import FeatureCache, cache_root
from diffward.data.duplicates import near_duplicate_groups, near_duplicate_pairs
from diffward.data.load import load_pictures
from diffward.data.manifest import Manifest, manifest_from_folders, select
from diffward.data.pictures import Picture, Pictures
from diffward.data.split import random_split

__all__ = [
    "FeatureCache",
    "Manifest",
    "Picture",
    "Pictures",
    "cache_root",
    "load_pictures",
    "manifest_from_folders",
    "near_duplicate_groups",
    "near_duplicate_pairs",
    "random_split",
    "select",
]
