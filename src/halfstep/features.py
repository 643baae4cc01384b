"""temporary"""

from halfstep.evaluate import Extractor, FeatureNet, accuracy, extract, feature_net_for, load_features, train_features

__all__ = ["Extractor", "FeatureNet", "accuracy", "extract", "feature_net_for", "load_features", "train_features"]
