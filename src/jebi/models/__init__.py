"""From a model's name to a loaded decoder: files, configs, weights, and the shell that transformers knows."""
