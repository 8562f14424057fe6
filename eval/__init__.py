"""A run folder -> figures with intervals, a report, predictions. Writes none of the weights."""
