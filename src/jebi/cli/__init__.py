"""The commands, one module each; torch and what needs it are imported inside them, so that --help is quick."""
