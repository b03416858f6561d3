"""Making training data: captions of single images, pairs of a model's own samples, and rounds of both."""
