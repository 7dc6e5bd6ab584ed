"""Features of a classifier trained on the real images, to compare samples in as FID does in Inception's.

Pixels weigh every stroke's position; the last hidden layer of a classifier weighs what makes a digit a digit.
The network is scikit-learn's perceptron: small sets need no more, and it is the same on every machine.
"""

from typing import NamedTuple

import numpy as np

MAX_TRAIN = 20_000  # enough for 97 % on MNIST in half a minute
HIDDEN = (256, 32)  # the last is the dimension of the features: a covariance of it needs but hundreds of samples


class Classifier(NamedTuple):
    weights: list[np.ndarray]
    biases: list[np.ndarray]
    train_images: int

    def features(self, images: np.ndarray) -> np.ndarray:
        """The last hidden layer, [N, 32], of images [N, H, W, C] in [-1, 1]."""
        x = np.asarray(images, np.float32).reshape(len(images), -1)
        for w, b in zip(self.weights[:-1], self.biases[:-1], strict=True):
            x = np.maximum(x @ w + b, 0)
        return x

    def accuracy(self, images: np.ndarray, labels: np.ndarray) -> float:
        """The share of images [N, H, W, C] that it puts in their class."""
        logits = self.features(images) @ self.weights[-1] + self.biases[-1]
        return float(np.mean(logits.argmax(1) == labels))


def train(images: np.ndarray, labels: np.ndarray, seed: int = 0) -> Classifier:
    """Fits the perceptron to images [N, H, W, C] in [-1, 1] with labels 0..K-1, [N]."""
    from sklearn.neural_network import MLPClassifier

    pick = np.random.default_rng(seed).permutation(len(images))[:MAX_TRAIN]
    x = np.asarray(images, np.float32)[pick].reshape(len(pick), -1)
    # A tenth is held out to say when to stop.
    network = MLPClassifier(HIDDEN, early_stopping=True, n_iter_no_change=3, max_iter=100, random_state=seed)
    network.fit(x, labels[pick])
    return Classifier(network.coefs_, network.intercepts_, len(x))
