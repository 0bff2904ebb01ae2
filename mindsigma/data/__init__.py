"""Captioned images for training: records of any layout, buckets, decoding, batches, stored features."""

from mindsigma.data.feature_set import FeatureSet
from mindsigma.data.features import is_feature_folder
from mindsigma.data.loader import Batch, Loader
from mindsigma.data.randomness import generator
from mindsigma.data.records import Records, open_records
from mindsigma.data.resolution import Bucket, Resolution
from mindsigma.data.sampler import BucketSampler


def open_data(path, **options):
    """FeatureSet of a folder of features, else Records of whatever is there; options are those of open_records."""
    return FeatureSet(path) if is_feature_folder(path) else open_records(path, **options)


__all__ = [
    "Batch",
    "Bucket",
    "BucketSampler",
    "FeatureSet",
    "Loader",
    "Records",
    "Resolution",
    "generator",
    "open_data",
    "open_records",
]
