"""The drawn data set, to train and evaluate the demo models with."""
