"""Do conditional samples show the class asked for? A support-vector machine that saw only real images decides."""

from typing import NamedTuple

import numpy as np

MAX_TRAIN = 20_000  # an SVC's time grows with the square of this; beyond it MNIST gains half a percent
MAX_HELD_OUT = 10_000  # enough for its accuracy within half a percent


class Verdict(NamedTuple):
    agreement: float  # share of samples put in the class asked for
    real_accuracy: float  # the judge's own, on held-out real images
    per_class: dict[int, float]  # agreement of each class asked for
    train_images: int


def _features(images: np.ndarray) -> np.ndarray:
    return np.asarray(images, np.float32).reshape(len(images), -1)


def judge(
    real: np.ndarray,
    real_labels: np.ndarray,
    held_out: np.ndarray,
    held_out_labels: np.ndarray,
    samples: np.ndarray,
    asked: np.ndarray,
) -> Verdict:
    """Fits an RBF SVC on `real` [N, H, W, C] and judges `samples` [M, H, W, C]; all in [-1, 1]."""
    from sklearn.svm import SVC

    pick = np.random.default_rng(0).permutation(len(real))[:MAX_TRAIN]
    svc = SVC(C=10.0, gamma="scale").fit(_features(real[pick]), real_labels[pick])
    right = svc.predict(_features(samples)) == asked
    return Verdict(
        agreement=float(right.mean()),
        real_accuracy=float(np.mean(svc.predict(_features(held_out)) == held_out_labels)),
        per_class={int(c): float(right[asked == c].mean()) for c in np.unique(asked)},
        train_images=len(pick),
    )
