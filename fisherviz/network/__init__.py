"""What a model is before anything runs: its layers and their order, likelihoods, batches, the guest's promise."""
