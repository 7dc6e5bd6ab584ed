"""The Fréchet distance of samples to real images in the features of a classifier trained on those."""

import numpy as np

import jax_diffusion as jd
from jax_diffusion.evals import classifier, frechet


class Judge:
    """Of a model's samples: its classifier saw one half of the training images, the reference is the other."""

    def __init__(self, model: jd.Model):
        sources = {split: jd.data.load(model.config.data, split) for split in ("train", "eval")}
        real, self.held_out = (s.batch(np.arange(len(s))) for s in sources.values())
        for batch in (real, self.held_out):
            batch["image"] = np.asarray(jd.data.to_float(batch["image"]))
        # Compared with images that the classifier has not learned by heart either.
        half = len(real["image"]) // 2
        self.classifier = classifier.train(real["image"][:half], real["label"][:half])
        self.reference = frechet.moments(self.classifier.features(real["image"][half:]))
        self.classes = len(model.class_names)

    def distance(self, images: np.ndarray) -> float:
        return frechet.from_moments(*frechet.moments(self.classifier.features(images)), *self.reference)

    def accuracy(self, images: np.ndarray, labels: np.ndarray) -> float:
        return self.classifier.accuracy(images, labels)

    def real_ones(self, num: int) -> np.ndarray:
        """Held-out images, as many of each class as `num` samples of all classes in turn."""
        labels = self.held_out["label"]
        order = np.random.default_rng(0).permutation(len(labels))
        by_class = [order[labels[order] == c] for c in range(self.classes)]
        return self.held_out["image"][[by_class[i % self.classes][i // self.classes] for i in range(num)]]
