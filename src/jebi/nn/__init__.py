"""The parts of a decoder: linear maps with adapters, attention over rows, one layer. No model, no config."""
