"""Benchmarks of fused_lstm and torch.nn.LSTM; run from `python/`.

`python -m benchmarks.lstm` measures one suite, `python -m benchmarks.gpu` does all that a GPU
machine is wanted for, `python -m benchmarks.streaming` times single steps, `benchmarks.peers` whole
sequences beside other libraries and `benchmarks.charlm` whole steps of training, `python -m
benchmarks.plot` makes the README's tables and plots of results.
"""
