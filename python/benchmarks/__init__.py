"""Benchmarks of fused_lstm and torch.nn.LSTM; run from `python/`: `python -m benchmarks.lstm`."""
