"""What a batch shows at each layer, and which layers may be believed to show it."""
