"""From logits to probabilities that mean what they say, and the point where they become a call."""

import numpy as np
from numpy.typing import NDArray


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Row-wise softmax, (n, classes) -> (n, classes)."""
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def nll(probabilities: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """Mean negative log-likelihood of the labels, in nats."""
    given = probabilities[np.arange(len(labels)), labels]
    return float(-np.log(np.maximum(given, np.finfo(np.float64).tiny)).mean())


def fit_temperature(
    logits: NDArray[np.float64], labels: NDArray[np.int64], offset: NDArray[np.float64]
) -> float:
    """The T in [0.05, 20] that minimises the NLL of softmax(logits / T - offset).

    Temperature scaling is Guo et al. 2017, "On Calibration of Modern Neural Networks". The offset is the
    logarithm of the training loss's class weights: a weighted loss learns w_c p(c|x) up to a constant, and
    subtracting it brings the probabilities back to the prevalence of the data (Elkan 2001).
    """
    given = logits[np.arange(len(labels)), labels].mean()
    low, high = np.log(0.05), np.log(20.0)  # of beta = 1 / T, in which the NLL is convex: bisect its slope
    for _ in range(60):
        middle = (low + high) / 2
        expected = (softmax(logits * np.exp(middle) - offset) * logits).sum(axis=1).mean()
        low, high = (middle, high) if expected < given else (low, middle)
    return float(np.exp(-(low + high) / 2))


def choose_threshold(
    scores: NDArray[np.float64],
    positives: NDArray[np.bool_],
    rule: str,
    *,
    sensitivity: float = 0.9,
    specificity: float = 0.9,
    cost: float = 1.0,
) -> float:
    """The operating point: positive is called where score >= threshold.

    It lies midway between the lowest score that is called and the next, so that rounding does not turn that
    sample's call. Where several calls are as good, it calls the fewest.

    Args:
        scores: (n,) probability of the positive class.
        positives: (n,) whether a sample is of that class; both kinds must be there.
        rule: `youden` maximises sensitivity + specificity (Youden 1950); `sensitivity` calls the
            fewest that reach `sensitivity`; `specificity` the most that keep `specificity`; `cost`
            minimises `cost` × missed + false alarms among these samples; `half` is 0.5.
        sensitivity, specificity: what the rules of these names ask for, 0..1.
        cost: how many false alarms one missed positive weighs.
    """
    if rule == "half":
        return 0.5
    distinct, where = np.unique(-scores, return_inverse=True)  # highest first
    edges = np.concatenate([[max(1.0, np.nextafter(-distinct[0], np.inf))], -distinct, [0.0]])
    candidates = (edges[:-1] + edges[1:]) / 2
    candidates = np.where(candidates > edges[1:], candidates, edges[:-1])  # of neighbours the middle is one
    caught = np.append(0, np.cumsum(np.bincount(where, positives))).astype(np.int64)
    alarms = np.append(0, np.cumsum(np.bincount(where, ~positives))).astype(np.int64)
    if rule == "sensitivity":
        best = max(1, int(np.argmax(caught / caught[-1] >= sensitivity)))
    elif rule == "specificity":
        best = int(np.flatnonzero(1 - alarms / alarms[-1] >= specificity)[-1])
    elif rule == "cost":
        best = int(np.argmin(cost * (caught[-1] - caught) + alarms))
    else:
        # In integers, so that ties are ties; calling nothing is no operating point.
        best = 1 + int(np.argmax(caught[1:] * alarms[-1] - alarms[1:] * caught[-1]))
    return float(candidates[best])
