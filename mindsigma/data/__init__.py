"""Captioned images for training: records of any layout, buckets, decoding, batches, stored features."""

from mindsigma.data.feature_set import FeatureSet
from mindsigma.data.feature_shards import open_features
from mindsigma.data.features import is_feature_folder
from mindsigma.data.index import Index, is_index, open_index
from mindsigma.data.loader import Batch, Loader
from mindsigma.data.mixture import is_mixture, open_mixture
from mindsigma.data.randomness import generator
from mindsigma.data.records import Records, open_records
from mindsigma.data.resolution import Bucket, Resolution
from mindsigma.data.sampler import BucketSampler


def open_data(path, **options):
    """FeatureSet of a folder of features, else Records of whatever is there; options are those of open_records.

    An index, and a mixture of data sets, is opened as what it stands for.
    """
    if is_mixture(path):
        return open_mixture(path, lambda one: open_data(one, **options))
    if is_feature_folder(path):
        return open_features(path)
    return open_index(path, **options) if is_index(path) else open_records(path, **options)


__all__ = [
    "Batch",
    "Bucket",
    "BucketSampler",
    "FeatureSet",
    "Index",
    "Loader",
    "Records",
    "Resolution",
    "generator",
    "is_index",
    "is_mixture",
    "open_data",
    "open_features",
    "open_records",
]
